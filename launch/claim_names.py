"""One of two processes that claim the same names: `python -m mixwright.launch.claim_names FOLDER ME COUNT`.

Waits for FOLDER/go, then claims names in turn, by exclusive create and by hard link as the journal does, and prints
those that it got. Used by `mixwright doctor`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

GO, READY = "go", "ready"
START_TIMEOUT_S = 20.0


def main() -> None:
    """Claim all names, as fast as possible."""
    folder, me, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    own = folder / f"own-{me}"
    own.write_text(me)
    (folder / f"{READY}-{me}").touch()
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (folder / GO).exists() and time.monotonic() < deadline:
        pass  # both begin at the same moment
    created = [number for number in range(count) if _creates(folder / f"created-{number}")]
    linked = [number for number in range(count) if _links(own, folder / f"linked-{number}")]
    print(json.dumps({"created": created, "linked": linked}))


def _creates(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _links(own: Path, path: Path) -> bool:
    try:
        os.link(own, path)
    except OSError:  # taken, or there are no hard links: then nobody gets one
        return False
    return True


if __name__ == "__main__":
    main()
