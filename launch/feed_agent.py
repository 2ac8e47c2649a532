"""The process through which the ranks of a node read rows that are on other nodes (`mixing.feed: actor`).

Started by `mixwright.data_mixing.feed` with a pipe as standard input; it ends when that is closed. It is the only Ray
driver of the node: if Ray ends it, the ranks notice and say so. Exit code 3: the cluster or the store cannot be used.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import sys
import threading
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np

from mixwright.data_mixing.answers import failure
from mixwright.data_mixing.errors import MixingError
from mixwright.data_mixing.plain_data import parse_json
from mixwright.launch import ray_environment

logger = logging.getLogger("feed_agent")

ATTACH_TIMEOUT_S = 10.0


class Server:
    """Answers the ranks of this node, each on connections of its own, in order."""

    def __init__(self, feed: Any) -> None:
        self._feed = feed

    def serve(self, socket_path: Path) -> None:
        """Take connections for ever."""
        with Listener(str(socket_path), family="AF_UNIX") as listener:
            while True:
                connection = listener.accept()
                # What is asked is passed on at once, so that a second call is under way while the first is answered.
                calls: queue.Queue[Any] = queue.Queue()
                threading.Thread(target=self._ask, args=(connection, calls), daemon=True).start()
                threading.Thread(target=self._answer, args=(connection, calls), daemon=True).start()

    def _ask(self, connection: Connection, calls: queue.Queue[Any]) -> None:
        try:
            while True:
                head = parse_json(connection.recv_bytes())
                if head["verb"] == "describe":
                    calls.put(None)
                    continue
                refs_2n = np.frombuffer(connection.recv_bytes(), np.int64).reshape(2, -1)
                calls.put(self._feed.ask(head["split"], refs_2n))
        except (EOFError, OSError):
            return  # the rank is gone
        except (ValueError, KeyError, TypeError) as error:
            logger.error("what was asked is no question of ours: %r", error)
            connection.close()

    def _answer(self, connection: Connection, calls: queue.Queue[Any]) -> None:
        try:
            while True:
                self._answer_one(connection, calls.get())
        except OSError:
            return

    def _answer_one(self, connection: Connection, call: Any) -> None:
        try:
            if call is None:
                connection.send_bytes(json.dumps({"ok": self._feed.describe()}).encode())
                return
            rows_nS = self._feed.take(call)
        except MixingError as error:
            logger.error("%s", error)
            connection.send_bytes(json.dumps(failure(error)).encode())
            return
        head = {"ok": {"shape": list(rows_nS.shape), "dtype": rows_nS.dtype.str}}
        connection.send_bytes(json.dumps(head).encode())
        connection.send_bytes(rows_nS.reshape(-1).view(np.uint8).data)


def end_with_the_trainer() -> None:
    """Thread: wait until the trainer closes the pipe, by ending however it ends."""
    sys.stdin.buffer.read()
    # Not through the interpreter's exit handlers: Ray's would wait for a broken cluster.
    os._exit(0)


def main() -> None:
    """Attach, make the actor, serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True, help="the store's folder on the nodes that have it")
    parser.add_argument("--address", required=True, help="Ray cluster, HOST:PORT or auto")
    parser.add_argument("--timeout", type=float, required=True, help="seconds that the actor may take to answer")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    threading.Thread(target=end_with_the_trainer, daemon=True).start()
    try:
        ray_environment.apply(ray_environment.attached_ray(os.environ))
        # Imported late: Ray reads the environment when it is imported.
        from mixwright.data_mixing import controller, feed_actor

        controller.attach_ray(arguments.address, ATTACH_TIMEOUT_S)
        feed = feed_actor.Feed(arguments.store, arguments.timeout)
        logger.info("serves rows of actor process %s", feed.describe()["pid"])
        Server(feed).serve(arguments.socket)
    except MixingError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(3)


if __name__ == "__main__":
    main()
