"""Configurations that are almost right: taken, or refused with an error of ours, in little time, and never obeyed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.config_file import load_config, set_override
from mixwright.data_mixing.corpora import find_files, load_corpora_config
from mixwright.data_mixing.errors import ConfigError, DataError, MixingError, PolicyRejected
from mixwright.data_mixing.plain_data import MAX_FILE_BYTES, parse_yaml
from mixwright.data_mixing.policy import recordable
from mixwright.data_mixing.worlds import World
from mixwright.launch.ensemble_study import EnsembleStudyConfig
from mixwright.launch.fit import FitConfig
from mixwright.launch.mixing_study import load_study
from mixwright.launch.overoptimisation_study import OveroptimisationConfig
from mixwright.launch.weighting_study import WeightingStudyConfig
from mixwright.pretrain.config import load_pretrain_config
from mixwright.pretrain.distill.config import load_distill_config
from mixwright.pretrain.ensemble.config import load_ensemble_config
from mixwright.pretrain.rpo.config import load_rpo_config
from tests.data_mixing.run_cases import genesis
from tests.properties.effort import effort
from tests.properties.files import contents
from tests.properties.mutations import DEEP, SENTINEL, alias_bomb, merge_bomb, mutated_texts

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FIT = {
    "store": "store", "records": "records", "domains": ["a", "b"], "target": {"a": 1.0}, "seed": 3,
    "proxy": {"model": {"n_embd": 8}, "num_steps": 5}, "options": {"x": [1, 2]},
}  # fmt: skip

Load = Callable[[Path], Any]
LOADERS: dict[str, tuple[str, Load]] = {
    "pretrain": ("quickstart.yaml", load_pretrain_config),
    "member": ("ensemble/run.yaml", load_pretrain_config),
    "distill": ("ensemble/distill.yaml", load_distill_config),
    "ensemble": ("ensemble/ensemble.yaml", load_ensemble_config),
    "rpo": ("rpo/example.yaml", load_rpo_config),
    "rpo_recipe": ("rpo/liu2024_zephyr.yaml", load_rpo_config),
    "mixing_study": ("studies/mixing.yaml", load_study),
    "ensemble_study": ("studies/ensemble.yaml", lambda path: load_config(EnsembleStudyConfig, path)),
    "overoptimisation": ("studies/overoptimisation.yaml", lambda path: load_config(OveroptimisationConfig, path)),
    "weighting_study": ("studies/weighting.yaml", lambda path: load_config(WeightingStudyConfig, path)),
    "world": ("worlds/drifting.yaml", lambda path: load_config(World, path)),
}


def refusal_of(act: Callable[[], object]) -> MixingError | None:
    """The error of ours with which it was refused; None when it was taken. Any other error is a failure."""
    try:
        act()
    except MixingError as error:
        return error
    return None


def tree_of(name: str) -> Any:
    return yaml.safe_load((CONFIGS / name).read_text())


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the configurations, whose files name each other."""
    folder = tmp_path_factory.mktemp("fuzz") / "configs"
    shutil.copytree(CONFIGS, folder)
    return folder


def check_loader(load: Load, path: Path, content: bytes) -> None:
    """Load `content` as the file at `path`: whatever comes of it, nothing else is there afterwards."""
    path.write_bytes(content)
    refusal = refusal_of(lambda: load(path))
    path.unlink()
    assert refusal is None or str(refusal)
    assert not Path(SENTINEL).exists()


@pytest.mark.parametrize("name", LOADERS)
def test_a_run_configuration_is_taken_or_refused(name: str, configs: Path) -> None:
    origin, load = LOADERS[name]
    path = (configs / origin).with_name("fuzzed.yaml")
    load(configs / origin)
    before = contents(configs.parent)

    @given(mutated_texts([tree_of(origin)]))
    @effort(30)
    def check(content: bytes) -> None:
        check_loader(load, path, content)

    check()
    assert contents(configs.parent) == before


def test_a_fit_is_taken_or_refused(tmp_path: Path) -> None:
    @given(mutated_texts([FIT]))
    @effort(30)
    def check(content: bytes) -> None:
        check_loader(lambda path: load_config(FitConfig, path), tmp_path / "fuzzed.yaml", content)

    check()


def test_corpora_are_taken_or_refused_and_their_patterns_are_searched_or_refused(configs: Path) -> None:
    small = {
        "output": "store", "sequence_length": 16, "tokenizer": {"train": {"vocab_size": 300}}, "num_workers": 1,
        "split": {"validation": 0.1}, "domains": {"a": {"paths": ["a.txt", "b/*.txt"], "exclude": ["c*"]}},
    }  # fmt: skip

    def load(path: Path) -> None:
        config = load_corpora_config(path)
        for name, source in config.domains.items():
            if "**" not in str(source):  # all of the disk is a valid answer to that
                find_files(name, source, path.parent)

    @given(mutated_texts([small, small, tree_of("quickstart_corpora.yaml"), tree_of("shared_corpora.yaml")]))
    @effort(60)
    def check(content: bytes) -> None:
        check_loader(load, configs / "fuzzed_corpora.yaml", content)

    check()


@given(
    st.lists(
        st.one_of(
            st.tuples(
                st.sampled_from(["run.name", "optimizer.lr", "training", "a..b", ".", "model.config.x", "", "run"]),
                st.sampled_from(["3", "[", "&a [*a]", "!!python/name:os.system", "\x1b", "2001-99-99", "9" * 5000,
                                 "[" * DEEP, '"\\ud800"', '"\\0"', merge_bomb(), "{a: 1, a: 2}", "nan", ".inf"]),
            ).map("=".join),
            st.text(max_size=30),
        ),
        max_size=3,
    )
)  # fmt: skip
@effort(50)
def test_overrides_are_taken_or_refused(overrides: list[str]) -> None:
    refusal_of(lambda: load_config(World, CONFIGS / "worlds" / "linear.yaml", overrides))
    tree: dict[str, Any] = {"run": {"name": "x"}, "optimizer": {"lr": 1}}
    for override in overrides:
        refusal = refusal_of(lambda override=override: set_override(tree, override))
        assert len(str(refusal)) < 20_000


POLICIES = [tree_of(f"policies/{path.name}") for path in sorted((CONFIGS / "policies").glob("*.yaml"))]
NAMED = {"mixture": {"code": 2.0, "web*": 1.0, "wiki": 0.5}, "at_step": 20, "why": "try", "author": "ann"}
POLICIES += [
    {"kind": "static", **NAMED, "caps": {"web*": {"max_epochs": 2.5, "on_exhaust": "stop"}}},
    {"kind": "schedule", "points": [{"step": 0, "mixture": {"code": 1}},
                                    {"step": 50, "mixture": {"*": 1}, "ramp": "cosine"}]},
    {"kind": "keep", "loss_weighting": {"strategy": "linupper", "r": [{"step": 0, "r": 1.0}, {"step": 9, "r": 0.1}]}},
    {"kind": "user", "path": "os:system", "options": {"command": f"touch {SENTINEL}"}},
    {"kind": "odm", "round_steps": 15, "shadow": True},
]  # fmt: skip


@given(mutated_texts(POLICIES))
@effort(250)
def test_a_policy_is_taken_or_refused_and_what_is_kept_of_it_is_small(content: bytes) -> None:
    text = content.decode("utf-8", "surrogatepass") if _is_utf8(content) else content.decode("latin-1")
    refusal = refusal_of(lambda: accept(text, genesis()).model_dump_json())
    assert refusal is None or (isinstance(refusal, PolicyRejected) and "\n" not in str(refusal))
    assert len(str(refusal)) < 30_000
    assert len(json.dumps(recordable(text))) < 1 << 20
    assert not Path(SENTINEL).exists()


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("text", [alias_bomb(40), merge_bomb(40), "[" * 100_000, "&a [*a]", '"\\ud800"', '"\\0"'])
def test_texts_that_would_cost_the_reader_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expand|nested|surrogate"):
        parse_yaml(text)


def test_aliases_that_are_no_bomb_are_what_they_stand_for() -> None:
    assert parse_yaml("base: &b {x: 1}\nother: {<<: *b, y: 2}\nsame: *b") == {
        "base": {"x": 1}, "other": {"x": 1, "y": 2}, "same": {"x": 1},
    }  # fmt: skip


def test_a_key_that_occurs_twice_is_named_with_both_lines() -> None:
    with pytest.raises(ValueError, match=r"line 3: key 'lr' occurs twice \(first in line 1\)"):
        parse_yaml("lr: 1\nother: 2\nlr: 3")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: path.write_bytes(b"a: \xff"), "cannot be read"),
        (lambda path: path.write_bytes(b" " * (MAX_FILE_BYTES + 1)), "larger than 8 MiB"),
        (lambda path: path.write_bytes("\ufeffkind: static".encode("utf-16")), "cannot be read"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: path.symlink_to("/dev/zero"), "larger than 8 MiB"),
    ],
)
def test_what_is_no_text_file_is_refused(make: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    make(path)
    with pytest.raises((ConfigError, DataError), match=says):
        load_config(World, path)
