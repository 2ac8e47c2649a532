"""One request to a run's controller, in a process of its own: JSON on standard input, the answer on standard output.

Started by `mixwright.data_mixing.client`, which kills it when it takes too long.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from mixwright.data_mixing.answers import Answer, failure
from mixwright.data_mixing.errors import MixingError, ServiceUnavailable
from mixwright.launch import ray_environment

END_ANSWER_TIMEOUT_S = 5.0


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
        _ask_whether_it_may_end(controller, actor, request)
        controller.end_controller(actor)
        return {}
    return controller.call(actor, request["verb"], request["arguments"], request["timeout_s"])


def _ask_whether_it_may_end(controller: ModuleType, actor: Any, request: dict[str, Any]) -> None:
    """Raise AccessRefused when the actor says no. One that cannot answer is the one that most needs to be ended."""
    try:
        controller.call(actor, "end", request["arguments"], min(request["timeout_s"] / 2, END_ANSWER_TIMEOUT_S))
    except ServiceUnavailable as error:
        print(error, file=sys.stderr)


if __name__ == "__main__":
    main()
