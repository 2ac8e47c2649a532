"""The walls of the design: package mapping, import directions, one door per library."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "data_mixing", "pretrain", "launch")
MAY_IMPORT = {
    "kernels": set(),
    "data_mixing": set(),
    "pretrain": {"kernels", "data_mixing"},
    "launch": {"kernels", "data_mixing", "pretrain"},
}
DOORS = {
    "triton": {"kernels"},
    "deepspeed": {"pretrain/engine.py"},
    "ray": {
        "data_mixing/controller.py",
        "data_mixing/feed_actor.py",
        "launch/cluster_job.py",
        "launch/dashboard_address.py",
        "launch/rank_shell.py",
        "launch/ray_tasks.py",
    },
    "wandb": {"pretrain/metric_sinks.py"},
}
TOP_LEVEL = {"pyproject.toml", "configs", "data_mixing", "kernels", "launch", "pretrain", "tests"}
NEITHER_RAY_NOR_TORCH = ("plan", "journal", "history", "store", "leader", "feeder", "feed", "loader", "policy")


def python_files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_fixed_top_level_exists() -> None:
    assert {path.name for path in ROOT.iterdir()} >= TOP_LEVEL


def test_kernels_has_no_init_so_that_the_hugging_face_package_of_that_name_wins_on_the_path() -> None:
    assert not list((ROOT / "kernels").rglob("__init__.py"))
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_listed_packages_are_the_folders_with_python_files() -> None:
    listed = pyproject()["tool"]["setuptools"]["packages"]
    folders = {file.parent.relative_to(ROOT) for room in ROOMS for file in python_files(room)}
    assert sorted(listed) == sorted(".".join(("mixwright", *folder.parts)) for folder in folders)


def test_package_dir_maps_each_room_to_its_folder() -> None:
    assert pyproject()["tool"]["setuptools"]["package-dir"] == {f"mixwright.{room}": room for room in ROOMS}


def test_files_that_are_no_python_travel_with_their_package() -> None:
    data = pyproject()["tool"]["setuptools"]["package-data"]
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("static/*")}
    assert folders == {ROOT / "launch" / "dashboard" / "static"}
    for folder in folders:
        package = ".".join(("mixwright", *folder.parent.relative_to(ROOT).parts))
        assert f"{folder.name}/*" in data[package]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in python_files(room)
        for module in sorted(imported_modules(path))
        if module.startswith("mixwright.")
        and module.split(".")[1] != room
        and module.split(".")[1] not in MAY_IMPORT[room]
    ]
    assert wrong == []


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_one_door(library: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in python_files(room)
        for module in imported_modules(path)
        if module.split(".")[0] == library
    }
    outside = {user for user in users if user not in DOORS[library] and user.split("/")[0] not in DOORS[library]}
    assert outside == set()


def test_torch_stays_out_of_data_mixing_except_weighting() -> None:
    users = {
        path.name
        for path in python_files("data_mixing")
        for module in imported_modules(path)
        if module.split(".")[0] == "torch"
    }
    assert users <= {"weighting.py"}


@pytest.mark.parametrize("module", NEITHER_RAY_NOR_TORCH)
def test_the_plan_side_runs_without_ray_and_torch(module: str) -> None:
    code = f"import sys, mixwright.data_mixing.{module}; print([m for m in ('ray', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_launch_files_shadow_no_module_when_started_by_path() -> None:
    dependencies = {name.split(">")[0].split("=")[0].strip() for name in pyproject()["project"]["dependencies"]}
    taken = set(sys.stdlib_module_names) | {d.replace("-", "_") for d in dependencies} | {"evaluate", "yaml", "kernels"}
    assert {path.stem for path in (ROOT / "launch").glob("*.py")} & taken == set()


@pytest.mark.parametrize("room", ROOMS)
def test_the_installed_package_is_this_checkout(room: str) -> None:
    package = importlib.import_module(f"mixwright.{room}")
    # An editable install adds a placeholder entry to the path of a folder without __init__.
    assert [Path(p).resolve() for p in package.__path__ if Path(p).is_dir()] == [ROOT / room]


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_that_it_is_typed(room: str) -> None:
    assert (ROOT / room / "py.typed").exists()


def test_transformers_imports_with_the_checkout_on_the_path() -> None:
    code = "import transformers, mixwright.kernels.linear_nll; print(transformers.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "transformers", done.stderr[-2000:]


def test_pytest_imports_test_modules_by_path_and_workers_can_unpickle_them() -> None:
    options = pyproject()["tool"]["pytest"]["ini_options"]
    assert "--import-mode=importlib" in options["addopts"]
    assert options["pythonpath"] == ["."]


def test_missing_imports_are_excused_by_name_only() -> None:
    mypy = pyproject()["tool"]["mypy"]
    assert not mypy.get("ignore_missing_imports", False)
    assert all(module != "*" for override in mypy["overrides"] for module in override["module"])
