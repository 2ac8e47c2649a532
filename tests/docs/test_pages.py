"""Every command of the pages that speak of a run, a store or a model that is there: typed as it stands, in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs import tables
from tests.docs.commands import all_commands
from tests.docs.session import await_run, follow, named, terminal, workplace

PREPARE = f"mixwright data prepare configs/quickstart_corpora.yaml {tables.SMALL_STORE}"
FINISHED = f"python launch/pretrain.py --config configs/quickstart.yaml {tables.SMALL_RUN} training.num_steps=20"
LIVE = (
    f"nice -n 10 python launch/pretrain.py --config configs/quickstart.yaml {tables.SMALL_RUN} run.name=exp "
    "training.num_steps=100000 checkpoint.every=1000 evaluation.every=0 metrics.row_log=true "
    "mixing.policy={kind: temperature, temperature: 2.0, loss_weighting: {strategy: linupper, r: 0.4}}"
).replace("mixing.policy=", "'mixing.policy=") + "'"
COMMANDS = [command for command in all_commands() if command.page not in tables.ALONE]
PAGES = sorted({command.page for command in COMMANDS})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A folder with what the pages take for granted, and a home: a store, finished runs, and one that trains."""
    base = tmp_path_factory.mktemp("docs")
    folder, home = workplace(base / "checkout"), base / "home"
    with terminal(folder, home) as shell:
        for command in (PREPARE, f"{FINISHED} mixing.service=none", "cp -r runs/quickstart runs/baseline"):
            code, output = shell.run(command)
            assert code == 0, f"{command}\n{output[-3000:]}"
        training = shell.start(LIVE)
        await_run(folder, tables.Until("runs/exp", 20), training)
        yield folder, home
        assert not training.code.exists(), training.printed()
        assert shell.interrupt(training) == 75


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_works(page: str, shared: tuple[Path, Path]) -> None:
    folder, home = shared
    to_type = [command for command in COMMANDS if command.page == page and named(tables.NOT_HERE, command) is None]
    with terminal(folder, home / page.replace("/", "-")) as shell:
        assert follow(page, shell) == to_type
