"""A function over many items as Ray tasks: bounded parallelism, results in order of completion, lost workers retried.

The one file for tasks that imports Ray, and it does so when it is asked to. Ray is started as for the mixing service:
private to this user and machine, with a token, or the cluster at an address.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mixwright.data_mixing.answers import one_line
from mixwright.data_mixing.errors import MixingError, ServiceUnavailable
from mixwright.launch import ray_environment
from mixwright.launch.mixing_host import make_ray_folder, remove_ray_folder, write_token

Item = TypeVar("Item")
Result = TypeVar("Result")

OBJECT_STORE_BYTES = 80 << 20


class OutOfTime(MixingError):
    """The time budget is spent; what is finished is kept, the same command goes on."""

    exit_code = 3


@dataclass(frozen=True)
class TaskOptions:
    """What one task takes, how often a task whose worker died is begun again, and what it is called in errors."""

    name: str
    num_cpus: int = 1
    num_gpus: float = 0
    retries: int = 2


class TaskMap(Generic[Item, Result]):
    """Calls `function` for every item, `num_workers` at a time; (item, result) in order of completion.

    `start` begins one call as a Ray task; None: one call after the other, here.
    """

    def __init__(
        self,
        function: Callable[[Item], Result],
        options: TaskOptions,
        num_workers: int,
        start: Callable[[Item], Any] | None,
    ) -> None:
        self._function, self._options, self._num_workers, self._start = function, options, num_workers, start

    def __call__(self, items: Sequence[Item], deadline: float | None = None) -> Iterator[tuple[Item, Result]]:
        """After `deadline` (time.monotonic) no item is begun, and OutOfTime is raised once the last one ended.

        Raises what the function raises, and ServiceUnavailable when a task is lost for good.
        """
        if self._start is None:
            for item in items:
                _check_time(deadline)
                yield item, self._function(item)
            return
        yield from self._in_parallel(self._start, list(reversed(items)), deadline)

    def _in_parallel(
        self, start: Callable[[Item], Any], waiting: list[Item], deadline: float | None
    ) -> Iterator[tuple[Item, Result]]:
        import ray

        running: dict[Any, Item] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._num_workers and not _is_over(deadline):
                    item = waiting.pop()
                    running[start(item)] = item
                if not running:
                    _check_time(deadline)
                done, _ = ray.wait(list(running), num_returns=1)
                yield running.pop(done[0]), self._result(done[0])
        finally:
            for task in running:
                ray.cancel(task, force=True)

    def _result(self, task: Any) -> Result:
        import ray

        try:
            outcome = ray.get(task)
        except ray.exceptions.RayError as error:
            reason = f"{self._options.name} was lost: {one_line(error)}; run the same command again"
            raise ServiceUnavailable(reason) from None
        if isinstance(outcome, MixingError):
            raise outcome
        result: Result = outcome
        return result


def quietly(function: Callable[[Item], Result], item: Item) -> Result | MixingError:
    """`function` in a Ray worker; an expected failure is a value, so that Ray does not wrap it in a traceback."""
    try:
        return function(item)
    except MixingError as error:
        return error


@contextlib.contextmanager
def task_map(
    function: Callable[[Item], Result], num_workers: int, options: TaskOptions, address: str | None = None
) -> Iterator[TaskMap[Item, Result]]:
    """A map over items: 0 workers here, one after the other; else as Ray tasks while the context lasts.

    Raises ServiceUnavailable when Ray cannot be had.
    """
    if num_workers == 0:
        yield TaskMap(function, options, 0, None)
        return
    with _ray(num_workers, options, address) as remote:
        yield TaskMap(function, options, num_workers, lambda item: remote.remote(function, item))


@contextlib.contextmanager
def _ray(num_workers: int, options: TaskOptions, address: str | None) -> Iterator[Any]:
    """A Ray remote function that calls a function with an item."""
    address = address or os.environ.get("RAY_ADDRESS")
    private = address in (None, "", "local")
    folder = make_ray_folder() if private else None
    before = dict(os.environ)
    try:
        if folder is not None:
            write_token(folder / "auth_token")
            ray_environment.apply(ray_environment.private_ray(folder / "auth_token"))
        else:
            ray_environment.apply(ray_environment.attached_ray(os.environ))
        temporary = str(folder / "ray") if folder else ""
        yield _start(num_workers, options, None if private else address, temporary)
    finally:
        with contextlib.suppress(Exception):
            import ray

            ray.shutdown()
        remove_ray_folder(folder)
        ray_environment.apply({name: before.get(name) for name in {**os.environ, **before}})


def _start(num_workers: int, options: TaskOptions, address: str | None, temporary: str) -> Any:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is not None:
            ray.init(address=address, **quiet)
        else:
            ray.init(
                address="local", num_cpus=num_workers * options.num_cpus, object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False, _temp_dir=temporary, **quiet,
            )  # fmt: skip
    except Exception as error:  # Ray documents none of what a failing start raises
        raise ServiceUnavailable(f"Ray cannot be used for {options.name}: {one_line(error)}") from None
    needs = {"num_cpus": options.num_cpus, "num_gpus": options.num_gpus, "max_retries": options.retries}
    return ray.remote(quietly).options(**needs)


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _check_time(deadline: float | None) -> None:
    if _is_over(deadline):
        raise OutOfTime("the time budget is spent; finished runs are kept, the same command goes on")
