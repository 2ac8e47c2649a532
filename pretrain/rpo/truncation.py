"""Long pairs: a prompt keeps its end, a completion its beginning, and none is ever cut to nothing."""

from __future__ import annotations

from dataclasses import dataclass

from mixwright.pretrain.rpo.config import PairDataConfig
from mixwright.pretrain.rpo.pair_counts import BadPair
from mixwright.pretrain.rpo.templates import EncodedPair


@dataclass(frozen=True)
class FittedPair:
    """Ids that fit: the prompt with either completion has at most max_tokens. No completion is empty."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    cut_prompt: bool
    cut_completions: int


def fit(pair: EncodedPair, config: PairDataConfig) -> FittedPair:
    """The pair within the limits of `config`; raises BadPair where one is exceeded that may not be cut.

    A prompt that is cut keeps its head (BOS). A completion that is cut has no end of text, as its text goes on.
    Completions that differ only beyond the limit are identical.
    """
    prompt = _keep_end(pair.prompt, pair.num_head, config.max_prompt_tokens)
    cut_prompt = len(prompt) < len(pair.prompt)
    if cut_prompt and config.long_prompt == "bad":
        limit = f"data.max_prompt_tokens is {config.max_prompt_tokens:,}"
        raise BadPair(pair.where, "long_prompt", f"the prompt has {len(pair.prompt):,} tokens, {limit}")
    room = config.max_tokens - len(prompt)
    completions = (pair.chosen, pair.rejected)
    longest = max(map(len, completions))
    if longest > room and config.long_completion == "bad":
        limit = f"data.max_tokens leaves room for {room:,}"
        raise BadPair(pair.where, "long_completion", f"a completion has {longest:,} tokens, {limit}")
    chosen, rejected = (ids[:room] for ids in completions)
    if chosen == rejected:
        raise BadPair(pair.where, "identical", f"chosen and rejected have the same first {room:,} tokens")
    return FittedPair(prompt, chosen, rejected, cut_prompt, sum(len(ids) > room for ids in completions))


def _keep_end(ids: list[int], num_head: int, limit: int) -> list[int]:
    """At most `limit` ids: the first `num_head`, as far as there is room for more, and the last."""
    if len(ids) <= limit:
        return ids
    num_head = min(num_head, limit - 1)
    return [*ids[:num_head], *ids[len(ids) - (limit - num_head) :]]
