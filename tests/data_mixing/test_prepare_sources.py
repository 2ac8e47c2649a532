"""The configuration of a store and the files it names: placeholders, globs, and what is refused."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixwright.data_mixing.corpora import DomainSource, find_files, load_corpora_config
from mixwright.data_mixing.errors import ConfigError, DataError
from mixwright.data_mixing.prepare import prepare
from mixwright.data_mixing.sources import find_inputs, plan_tasks, source_signature
from tests.data_mixing.corpora_for_tests import corpora_config, corpora_tree, sentences, two_domains, write_jsonl


def found(base: Path, *paths: str, exclude: tuple[str, ...] = ()) -> list[str]:
    files = find_files("d", DomainSource(paths=paths, exclude=exclude), base)
    return [file.relative_to(base).as_posix() for file in files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.txt", "sub/e.md", "odd [1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_files_are_sorted_and_listed_once(tree: Path) -> None:
    assert found(tree, "*.txt", "sub/*", "a.txt") == ["a.txt", "b.txt", "odd [1].txt", "sub/c.txt", "sub/e.md"]


def test_two_stars_match_any_depth_and_excludes_are_taken_out(tree: Path) -> None:
    assert found(tree, "**/*.txt", exclude=("sub/deep/*", "b.txt", "odd*")) == ["a.txt", "sub/c.txt"]


def test_brackets_in_a_folder_of_the_configuration_are_no_pattern(tmp_path: Path) -> None:
    base = tmp_path / "run [2]"
    base.mkdir()
    (base / "a.txt").write_text("x")
    assert found(base, "*.txt") == ["a.txt"]


def test_stdlib_and_site_packages_stand_for_folders_of_the_running_python(tmp_path: Path) -> None:
    stdlib = find_files("d", DomainSource(paths=("{stdlib}/json/*.py",)), tmp_path)
    assert Path(sysconfig.get_path("stdlib")) / "json" / "decoder.py" in stdlib
    assert find_files("d", DomainSource(paths=("{site_packages}/numpy/__init__.py",)), tmp_path)


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("*.csv", DataError, r"domain 'd': no file matches '\*.csv' \(looked for .*/\*.csv\)"),
        ("c.txt", DataError, r"domain 'd': .*/c.txt: no such file; did you mean '[ab].txt'\?"),
        ("nowhere/c.txt", DataError, r"nowhere/c.txt: no such file$"),
        ("{stdlb}/x.py", ConfigError, r"\{stdlb\}/x.py: unknown placeholder \{stdlb\}; did you mean 'stdlib'\?"),
        ("sub", DataError, r"/sub: no such file"),
    ],
)
def test_what_matches_nothing_is_named(tree: Path, pattern: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        found(tree, pattern)


def test_excluding_everything_is_named(tree: Path) -> None:
    with pytest.raises(DataError, match=r"no file matches '\*.txt'"):
        found(tree, "*.txt", exclude=("*",))


def test_a_missing_domain_file_is_found_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="domain 'b'"):
        find_inputs(corpora_config(tmp_path / "s", {**two_domains(tmp_path), "b": {"paths": ["none.txt"]}}), tmp_path)
    assert not (tmp_path / "s.building").exists()


# --- configuration ---------------------------------------------------------------------------------------------


def load(folder: Path, **changes: Any) -> Any:
    tree = corpora_tree(Path("out"), {"a": {"paths": ["a.txt"]}})
    tree.update(changes)
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    return load_corpora_config(folder / "c.yaml")


def test_output_and_tokenizer_paths_start_at_the_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    config = load(tmp_path, tokenizer={"path": "tok"})
    assert config.output == tmp_path / "out"
    assert config.tokenizer.path == str(tmp_path / "tok")
    assert load(tmp_path, tokenizer={"path": "someone/on-the-hub"}).tokenizer.path == "someone/on-the-hub"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_path_starts_at_the_configuration_file_and_a_hub_name_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    write_jsonl(tmp_path / "text" / "train.jsonl", sentences(1, 60))
    (tmp_path / "else" / "where").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path / "else" / "where")
    domains = {"a": {"dataset": {"path": "../text", "streaming": streaming}}}
    config = load(tmp_path / "configs", domains=domains)
    assert prepare(config, tmp_path / "configs").manifest.domains[0].splits["train"].num_rows > 0
    assert not prepare(config, tmp_path / "configs").made
    write_jsonl(tmp_path / "text" / "train.jsonl", sentences(2, 60))
    with pytest.raises(DataError, match="holds a store made of other documents"):
        prepare(config, tmp_path / "configs")
    hub = load(tmp_path / "configs", domains={"a": {"dataset": {"path": "someone/text"}}})
    (item,) = find_inputs(hub, tmp_path / "configs")
    assert item.source.dataset is not None
    assert item.source.dataset.path == "someone/text"


def test_sizes_may_carry_units(tmp_path: Path) -> None:
    assert load(tmp_path, domains={"a": {"paths": ["x"], "max_bytes": "1.5MB"}}).domains["a"].max_bytes == 1_500_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain": {}}, r"c.yaml: domain: unknown key; did you mean 'domains'\?"),
        ({"domains": {"a": {"path": ["x"]}}}, r"domains.a.path: unknown key; did you mean 'paths'\?"),
        ({"domains": {"a": {}}}, "domains.a: give either paths or dataset"),
        ({"domains": {"a": {"paths": ["x"], "dataset": {"path": "y"}}}}, "domains.a: give either paths or dataset"),
        ({"domains": {}}, "domains: "),
        ({"domains": {"../up": {"paths": ["x"]}}}, "domain name '../up' must be 1-64 letters"),
        ({"domains": {"tokenizer": {"paths": ["x"]}}}, "domain name 'tokenizer' is taken by the store's own"),
        ({"domains": {"a": {"paths": ["x"], "format": "csv"}}}, r"domains.a.format: .*'docstrings'"),
        ({"domains": {"a": {"paths": ["x"], "max_bytes": 0}}}, "domains.a.max_bytes: "),
        ({"sequence_length": 0}, r"sequence_length: .*greater than 0 \(found 0\)"),
        ({"tokenizer": {}}, "tokenizer: give either path or train"),
        ({"tokenizer": {"train": {"vocab_size": 256}}}, r"tokenizer.train.vocab_size: .*257 \(found 256\)"),
        ({"split": {"validation": 0.5, "test": 0.5}}, r"split: validation \+ test must be below 1, found 1"),
        ({"split": {"validation": float("nan")}}, "split.validation: "),
        ({"split": {"validation": -0.1}}, r"split.validation: .*\(found -0.1\)"),
        ({"on_bad_document": "ignore"}, r"on_bad_document: .*'stop' or 'skip'"),
        ({"num_workers": 0}, r"num_workers: .*\(found 0\)"),
        ({"seed": -1}, r"seed: .*\(found -1\)"),
    ],
)
def test_a_wrong_configuration_names_the_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **change)


# --- signature and tasks ---------------------------------------------------------------------------------------


def test_the_signature_follows_files_and_configuration_but_not_processes_or_place(tmp_path: Path) -> None:
    domains = two_domains(tmp_path)

    def signature(output: str = "s", **changes: Any) -> str:
        config = corpora_config(tmp_path / output, domains, **changes)
        return source_signature(config, find_inputs(config, tmp_path))

    first = signature()
    assert signature(output="elsewhere", num_workers=7) == first
    assert signature(sequence_length=17) != first
    write_jsonl(tmp_path / "b.jsonl", sentences(3, 30))
    assert signature() != first


def test_tasks_hold_every_unit_once_in_order_and_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    for i in range(40):
        write_jsonl(tmp_path / f"{i:02d}.jsonl", sentences(i, 100))
    domains = {"a": {"paths": [str(tmp_path / "*.jsonl")]}}
    plans = []
    for num_workers in (1, 5):
        config = corpora_config(tmp_path / "s", domains, num_workers=num_workers)
        plans.append(plan_tasks(config, find_inputs(config, tmp_path), tmp_path / "spool"))
    assert plans[0] == plans[1]
    (tasks,) = plans[0]
    assert len(tasks) > 2
    assert [unit.path.name for task in tasks for unit in task.units] == [f"{i:02d}.jsonl" for i in range(40)]
