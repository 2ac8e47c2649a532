"""Where the dashboard of a Ray cluster is: `python -m mixwright.launch.dashboard_address HOST:PORT|auto`.

A process of its own, which prints the URL: only Ray can tell, and its client can abort a process or keep it waiting.
"""

from __future__ import annotations

import os
import sys

from mixwright.data_mixing.answers import one_line
from mixwright.data_mixing.errors import MixingError
from mixwright.launch import ray_environment

TIMEOUT_S = 10.0


def main() -> None:
    """Print the URL, or why there is none, and end without the interpreter's exit handlers."""
    # Ray and its C++ libraries may print to standard output, which is for the answer alone.
    answer_to = os.dup(1)
    os.dup2(2, 1)
    address = sys.argv[1]
    code = 0
    try:
        ray_environment.apply(ray_environment.attached_ray(os.environ))
        # Where it was found is settled: Ray would prefer these to the argument.
        ray_environment.apply({"RAY_ADDRESS": None, "RAY_API_SERVER_ADDRESS": None})
        answer = find(address)
    except MixingError as error:
        answer, code = str(error), error.exit_code
    except (Exception, SystemExit) as error:  # Ray documents none of what a failing search raises
        answer, code = f"no Ray dashboard is known at {address}: {one_line(error)}", 3
    with os.fdopen(answer_to, "w") as output:
        output.write(answer)
    os._exit(code)


def find(address: str) -> str:
    """The URL of the dashboard. Raises ServiceUnavailable, and what Ray raises."""
    # Imported late: Ray reads the environment when it is imported.
    from ray.dashboard.utils import get_address_for_submission_client

    from mixwright.data_mixing.controller import check_reachable

    if address != "auto":
        check_reachable(address, TIMEOUT_S)
    return str(get_address_for_submission_client(address))


if __name__ == "__main__":
    main()
