"""`mixwright generate`: what models write after a prompt, side by side, alone and together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixwright.launch.json_output import print_json
from mixwright.launch.mix_options import AsJson

if TYPE_CHECKING:
    from mixwright.pretrain.ensemble.member import Member


def generate(
    models: Annotated[list[Path], typer.Argument(help="run folders or exports: members, a student, anything")],
    ensemble: Annotated[
        str, typer.Option(help="run folders, separated by commas (or a folder of members), to sample from together")
    ] = "",
    prompt: Annotated[str, typer.Option(help="text to go on with (default: the start of a document)")] = "",
    num: Annotated[int, typer.Option(min=1, help="samples of each")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of each sample")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token")] = 1.0,
    pooling: Annotated[str, typer.Option(help="of the ensemble: logits or arithmetic")] = "logits",
    seed: Annotated[int, typer.Option(min=0, help="of the random numbers")] = 0,
    as_json: AsJson = False,
) -> None:
    """Print samples of models, and of an ensemble of them, one after the other with their names."""
    from mixwright.data_mixing.errors import ConfigError
    from mixwright.launch.ensemble_eval import find_members

    together = find_members([Path(part.strip()) for part in ensemble.split(",") if part.strip()], None)
    if ensemble and not together:
        raise ConfigError(f"--ensemble {ensemble!r}: names no members")
    groups = [(member.name, [member]) for member in find_members(models, None)]
    if together:
        groups.append((f"ensemble of {len(together)}", together))
    samples = (
        (name, continuations(members, prompt, num, tokens, temperature, pooling, seed)) for name, members in groups
    )
    if as_json:
        print_json([{"model": name, "texts": texts} for name, texts in samples])
    else:
        _print(samples)


def _print(samples: Iterable[tuple[str, list[str]]]) -> None:
    """Each model's name, and below it what it writes, as soon as it is written."""
    from rich.console import Console
    from rich.rule import Rule
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for name, texts in samples:
        console.print(Rule(Text(name)))
        for number, text in enumerate(texts, start=1):
            # What a model writes is text, never markup.
            console.print(Text(f"[{number}] {text}"))


def continuations(
    members: list[Member], prompt: str, num: int, tokens: int, temperature: float, pooling: str, seed: int
) -> list[str]:
    """`num` texts that go on after `prompt`, from the members together. Raises EnsembleError."""
    import torch

    from mixwright.data_mixing.tokenizer import load_tokenizer
    from mixwright.launch.ensemble_eval import pooling_named
    from mixwright.pretrain.distill.sampler import continue_rows
    from mixwright.pretrain.ensemble.member import check_together, load_member
    from mixwright.pretrain.errors import EnsembleError

    check_together(members)
    tokenizer = load_tokenizer(members[0].folder)
    ids = [tokenizer.eos_id, *(tokenizer.encode_batch([prompt])[0] if prompt else [])]
    loaded = [load_member(member) for member in members]
    limit = min(getattr(one.causal_lm.config, "max_position_embeddings", None) or 1 << 30 for one in loaded)
    if len(ids) + tokens - 1 > limit:
        raise EnsembleError(
            f"a prompt of {len(ids) - 1} tokens and {tokens} more do not fit the models' {limit} positions; ask for at "
            f"most {max(limit - len(ids) + 1, 0)} tokens"
        )
    prompt_BP = torch.tensor([ids] * num)
    generator = torch.Generator().manual_seed(seed)
    rows_BS = continue_rows(
        loaded, prompt_BP, tokens, generator, pooling=pooling_named(pooling), temperature=temperature
    )
    return [_until_end(row, tokenizer.eos_id, tokenizer.decode) for row in rows_BS[:, 1:].tolist()]


def _until_end(ids: list[int], eos_id: int, decode: Callable[[Sequence[int]], str]) -> str:
    """The text up to where the document ends."""
    ended = ids.index(eos_id) if eos_id in ids else len(ids)
    return decode(ids[:ended])
