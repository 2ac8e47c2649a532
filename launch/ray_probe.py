"""Whether a Ray cluster can be reached with our token: `python -m mixwright.launch.ray_probe HOST:PORT SECONDS`.

In a process of its own, because Ray may abort it. Exit code 3, and why, when it cannot.
"""

from __future__ import annotations

import os
import sys

from mixwright.data_mixing.errors import MixingError
from mixwright.launch import ray_environment


def main() -> int:
    """Try once."""
    address, seconds = sys.argv[1], float(sys.argv[2])
    try:
        ray_environment.apply(ray_environment.attached_ray(os.environ))
        # Imported late: Ray reads the environment when it is imported.
        from mixwright.data_mixing import controller

        controller.check_reachable(address, seconds)
    except MixingError as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # not through Ray's exit handlers: they can hang on a broken cluster
