"""What the code never does, by its syntax: load pickles, run a shell, evaluate text, trust remote code.

What is allowed all the same is in a table with its reason; an entry that nothing needs any more is an error, too.
"""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mixwright.data_mixing.errors import MixingError
from tests.test_layout import ROOMS, ROOT, python_files

ALLOWED = {
    ("pretrain/engine.py", "import pickle"): "names UnpicklingError, the error of a refused checkpoint; loads nothing",
}
PICKLES = ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle")
ARCHIVES = ("tarfile", "zipfile")
EVALUATORS = ("eval", "exec", "compile", "__import__")


def findings(tree: ast.AST) -> Iterator[str]:
    """What a file does that nobody here does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in PICKLES + ARCHIVES
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES + ARCHIVES:
            yield f"import {node.module}"
        elif isinstance(node, ast.Call):
            yield from _call(ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}, node)


def _call(name: str, keywords: dict[str | None, str], node: ast.Call) -> Iterator[str]:
    if name == "torch.load" and keywords.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
        yield "np.load with pickles"
    if name.startswith("yaml.") and name.endswith("load") and name != "yaml.safe_load":
        yield name
    if name in EVALUATORS:
        yield f"{name}()"
    if keywords.get("shell", "False") != "False" or name in ("os.system", "os.popen", "subprocess.getoutput"):
        yield "a shell"
    if name.startswith("subprocess.") and node.args and isinstance(node.args[0], (ast.Constant, ast.JoinedStr)):
        yield "a command line that is one text"
    if keywords.get("trust_remote_code", "False") != "False":
        yield "trust_remote_code"
    if name in ("shutil.unpack_archive", "urllib.request.urlopen", "tempfile.mktemp"):
        yield name


def found_in_rooms() -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for path in (path for room in ROOMS for path in python_files(room)):
        for finding in findings(ast.parse(path.read_text())):
            key = (str(path.relative_to(ROOT)), finding)
            found[key] = found.get(key, 0) + 1
    return found


def test_nothing_is_unpickled_evaluated_or_run_by_a_shell() -> None:
    assert set(found_in_rooms()) == set(ALLOWED)


@pytest.mark.parametrize(
    ("code", "finding"),
    [
        ("import pickle", "import pickle"),
        ("from cloudpickle import loads", "import cloudpickle"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("np.load(path, allow_pickle=True)", "np.load with pickles"),
        ("yaml.load(text, Loader=L)", "yaml.load"),
        ("yaml.unsafe_load(text)", "yaml.unsafe_load"),
        ("eval(text)", "eval()"),
        ("subprocess.run(command, shell=True)", "a shell"),
        ("subprocess.run(f'ls {path}')", "a command line that is one text"),
        ("os.system(command)", "a shell"),
        ("AutoModel.from_pretrained(p, trust_remote_code=flag)", "trust_remote_code"),
        ("shutil.unpack_archive(path)", "shutil.unpack_archive"),
        ("urllib.request.urlopen(url)", "urllib.request.urlopen"),
    ],
)
def test_the_walk_sees_it(code: str, finding: str) -> None:
    assert finding in list(findings(ast.parse(code)))


class Evil:
    """What a replaced checkpoint could hold: code that runs when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_deepspeed_itself_loads_no_code_through_our_door(tmp_path: Path) -> None:
    """DeepSpeed says weights_only=False; what the engine puts around its call must win."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    from mixwright.pretrain.engine import _plain_tensors_only

    path, target = tmp_path / "state.pt", tmp_path / "was-executed"
    torch.save({"module": Evil(target)}, path)
    with _plain_tensors_only(), pytest.raises(pickle.UnpicklingError):
        TorchCheckpointEngine().load(str(path))
    assert not target.exists()
    TorchCheckpointEngine().load(str(path))
    assert target.exists(), "without the guard it runs: the test would see it"


def test_code_of_users_is_imported_only_when_the_host_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixwright.data_mixing.acceptance import accept
    from tests.data_mixing.run_cases import genesis

    monkeypatch.delenv("MIXWRIGHT_USER_POLICIES", raising=False)
    with pytest.raises(MixingError, match="not on this host's allow-list"):
        accept({"kind": "user", "path": "os:system"}, genesis())
