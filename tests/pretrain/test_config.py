from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mixwright.data_mixing.config_file import load_config, shown_differences, validate
from mixwright.data_mixing.errors import ConfigError
from mixwright.pretrain.config import PretrainConfig, load_pretrain_config
from tests.pretrain.tiny import tiny_tree

ROOT = Path(__file__).resolve().parents[2]


def error_of(tree: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(PretrainConfig, tree, "run.yaml")
    return str(caught.value)


def test_an_unknown_key_is_refused_with_the_nearest_valid_name() -> None:
    tree = tiny_tree(Path("runs"), Path("store"))
    tree["training"]["zloss"] = 1e-4
    assert error_of(tree) == "run.yaml: training.zloss: unknown key; did you mean 'z_loss'?"


def test_every_mistake_is_named_at_once() -> None:
    tree = tiny_tree(Path("runs"), Path("store"), training__num_steps=0, optimizer__lr="fast")
    del tree["run"]["name"]
    lines = error_of(tree).splitlines()
    assert lines == [
        "run.yaml: run.name: required key is missing",
        "run.yaml: optimizer.lr: input should be a valid number, unable to parse string as a number (found 'fast')",
        "run.yaml: training.num_steps: input should be greater than 0 (found 0)",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-3])
def test_a_learning_rate_must_be_a_positive_number(value: float) -> None:
    assert "optimizer.lr" in error_of(tiny_tree(Path("runs"), Path("store"), optimizer__lr=value))


def test_lead_must_cover_what_the_feeder_has_prepared() -> None:
    message = error_of(tiny_tree(Path("runs"), Path("store"), mixing__prefetch_steps=8, mixing__lead_steps=8))
    assert "lead_steps must be at least prefetch_steps + 3 = 11" in message


def test_a_deepspeed_setting_with_a_place_of_its_own_is_refused() -> None:
    tree = tiny_tree(Path("runs"), Path("store"))
    tree["deepspeed"] = {"gradient_clipping": 3.0}
    assert "'gradient_clipping' is set by training.clip_norm, not here" in error_of(tree)


def test_a_model_is_new_or_loaded_but_not_both() -> None:
    assert "exactly one of" in error_of(tiny_tree(Path("runs"), Path("store"), model__path="somewhere"))


def test_overrides_change_single_values(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path, tmp_path / "store")))
    config = load_config(PretrainConfig, path, ["optimizer.lr=0.5", "training.num_steps=7"])
    assert (config.optimizer.lr, config.training.num_steps) == (0.5, 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("run: [", "not valid YAML"), ("- a\n", "expected a mapping"), ("\xff\xfe", "cannot be read")],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_pretrain_config(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").touch()
    with pytest.raises(ConfigError, match=r"quickstrat\.yaml: no such file; did you mean 'quickstart\.yaml'\?"):
        load_pretrain_config(tmp_path / "quickstrat.yaml")


@pytest.mark.parametrize("key", ["data.prepare", "mixing.policy"])
def test_a_name_that_no_file_can_have_is_one_line(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: x+\.\.\.: File name too long$"):
        load_pretrain_config(ROOT / "configs" / "quickstart.yaml", [f"{key}={'x' * 300}"])


def test_the_quickstart_configuration_is_valid_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_pretrain_config(ROOT / "configs" / "quickstart.yaml")
    assert config.data.prepare == ROOT / "configs" / "quickstart_corpora.yaml"


def test_a_policy_file_is_read_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("kind: static\nmixture: {a: 1}\n")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path, tmp_path / "store", mixing__policy="policy.yaml")))
    assert load_pretrain_config(path).mixing.policy == {"kind": "static", "mixture": {"a": 1}}


def test_the_first_differing_keys_of_two_configurations_are_told_with_both_values() -> None:
    there = tiny_tree(Path("runs"), Path("store"), run__init_seed=None)
    here = tiny_tree(Path("runs"), Path("store"), optimizer__lr=3e-3, run__seed=5, run__init_seed=None)
    assert shown_differences(there, here) == "run.seed: 3 there, 5 here; optimizer.lr: 0.01 there, 0.003 here"
    here["training"] = {"num_steps": 12}
    assert shown_differences(there, here).endswith(
        "optimizer.lr: 0.01 there, 0.003 here; training.rows_per_step: 8 there, None here; 2 more"
    )
    here["data"] = None
    assert shown_differences({"data": there["data"]}, {"data": None}) == "data: {'store': 'store'} there, None here"
    assert shown_differences(there, there) == ""
