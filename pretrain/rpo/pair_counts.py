"""Bad pairs, and the counts of what became of all pairs that were read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal, TypeVar

from pydantic import Field

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.errors import DataError

Reason = Literal[
    "malformed", "field", "no_prompt", "role", "empty", "identical", "long_prompt", "long_completion",
    "special_token", "border", "template",
]  # fmt: skip

WORDS: dict[Reason, str] = {
    "malformed": "not a JSON object",
    "field": "a field is missing or is not text",
    "no_prompt": "no prompt",
    "role": "a completion begins with another role than the model's",
    "empty": "an empty completion",
    "identical": "chosen equals rejected",
    "long_prompt": "prompt longer than max_prompt_tokens",
    "long_completion": "completion longer than max_tokens allows",
    "special_token": "a message spells out a special token",  # nosec B105  # no password
    "border": "leading white space joins the template's",
    "template": "refused by the chat template",
}
MAX_EXAMPLES = 5

Made = TypeVar("Made")


class BadPair(DataError):
    """A row that gives no pair; `where` is its file:line or file: row."""

    def __init__(self, where: str, reason: Reason, problem: str) -> None:
        self.where, self.reason, self.problem = where, reason, problem
        super().__init__(f"{where}: {problem}")

    def __reduce__(self) -> tuple[type[BadPair], tuple[str, Reason, str]]:
        return type(self), (self.where, self.reason, self.problem)


def caught(make: Callable[[], Made]) -> Made | BadPair:
    """What `make` makes, or the BadPair that it raises."""
    try:
        return make()
    except BadPair as bad:
        return bad


class PairCounts(StrictModel):
    """What became of the rows of all sources. `read` = train + evaluation + all that was `dropped`.

    Of the pairs that stayed, `cut_prompts` prompts lost their beginning and `cut_completions` completions their end;
    `spelt_special` have a text that spells out a special token (it is encoded like any text); `shared_prompts` are to
    evaluate on although their prompt is trained on. Means are of the training pairs, in tokens. `examples` are the
    first bad rows.
    """

    read: int = Field(ge=0)
    train: int = Field(ge=0)
    evaluation: int = Field(ge=0)
    dropped: dict[Reason, int] = Field(default_factory=dict)
    examples: tuple[str, ...] = ()
    cut_prompts: int = Field(default=0, ge=0)
    cut_completions: int = Field(default=0, ge=0)
    spelt_special: int = Field(default=0, ge=0)
    shared_prompts: int = Field(default=0, ge=0)
    mean_prompt: float = 0.0
    mean_chosen: float = 0.0
    mean_rejected: float = 0.0

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each line of a table; what did not happen has no line."""
        rows = [
            ("pairs read", f"{self.read:,}"),
            ("to train on", f"{self.train:,}"),
            ("to evaluate on", f"{self.evaluation:,}"),
            *((f"dropped: {WORDS[reason]}", f"{count:,}") for reason, count in self.dropped.items()),
            ("prompts without their beginning", f"{self.cut_prompts:,}"),
            ("completions without their end", f"{self.cut_completions:,}"),
            ("pairs that spell out special tokens", f"{self.spelt_special:,}"),
            ("evaluation pairs with a training prompt", f"{self.shared_prompts:,}"),
        ]
        means = f"{self.mean_prompt:.1f} / {self.mean_chosen:.1f} / {self.mean_rejected:.1f}"
        shown = [row for row in rows if row[1] != "0"]
        return [*shown, ("mean tokens of prompt / chosen / rejected", means)]


class Tally:
    """Counts while a source is read; the first bad pair ends it unless they are to be dropped."""

    def __init__(self, on_bad_pair: Literal["drop", "error"]) -> None:
        self._on_bad_pair = on_bad_pair
        self.kept = self.cut_prompts = self.cut_completions = self.spelt_special = 0
        self.dropped: Counter[Reason] = Counter()
        self.examples: list[str] = []

    def keep(self, cut_prompt: bool, cut_completions: int, spells_special: bool) -> None:
        """Count a pair that stays."""
        self.kept += 1
        self.cut_prompts += cut_prompt
        self.cut_completions += cut_completions
        self.spelt_special += spells_special

    def drop(self, bad: BadPair) -> None:
        """Count a bad pair; raises it where the first one is to end the work."""
        if self._on_bad_pair == "error":
            raise bad
        self.dropped[bad.reason] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(str(bad))

    def __add__(self, other: Tally) -> Tally:
        total = Tally(self._on_bad_pair)
        total.kept = self.kept + other.kept
        total.cut_prompts = self.cut_prompts + other.cut_prompts
        total.cut_completions = self.cut_completions + other.cut_completions
        total.spelt_special = self.spelt_special + other.spelt_special
        total.dropped = self.dropped + other.dropped
        total.examples = [*self.examples, *other.examples][:MAX_EXAMPLES]
        return total

    def describe_dropped(self) -> str:
        """Reasons with their counts, and the first example, in one line."""
        reasons = ", ".join(f"{WORDS[reason]} ({count:,})" for reason, count in sorted(self.dropped.items()))
        return f"{reasons}; first: {self.examples[0]}" if reasons else "it is empty"
