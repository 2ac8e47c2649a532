"""One request to a run's controller, in a process of its own: JSON on standard input, the answer on standard output.

Started by `mixwright.data_mixing.client`, which kills it when it takes too long.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from mixwright.data_mixing.answers import Answer, failure
from mixwright.data_mixing.errors import MixingError
from mixwright.launch import ray_environment


def main() -> None:
    """Answer one request. Never returns to the interpreter's exit handlers: Ray's can hang on a broken cluster."""
    # Ray and its C++ libraries may print to standard output, which is for the answer alone.
    answer_to = os.dup(1)
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    try:
        answer: Answer = {"ok": ask(request)}
    except MixingError as error:
        answer = failure(error)
    with os.fdopen(answer_to, "w") as output:
        json.dump(answer, output)
    os._exit(0)


def ask(request: dict[str, Any]) -> Answer:
    """Attach to the cluster and make the call; raises what the verb raises."""
    token_path = Path(request["token_path"]) if request["token_path"] else None
    if request["private"] and token_path is not None:
        ray_environment.apply(ray_environment.private_ray(token_path))
    else:
        ray_environment.apply(ray_environment.attached_ray(os.environ, token_path))
    # Imported late: Ray reads the environment when it is imported.
    from mixwright.data_mixing import controller

    controller.attach_ray(request["address"], request["timeout_s"])
    actor = controller.find_controller(request["actor"])
    if request["verb"] == "end":
        controller.end_controller(actor)
        return {}
    return controller.call(actor, request["verb"], request["arguments"], request["timeout_s"])


if __name__ == "__main__":
    main()
