"""Serves an application on a port of 127.0.0.1 until Ctrl-C."""

import os
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn


def serve(app: Any, listening: socket.socket, started: Callable[[], None]) -> None:
    """Serves until the process is told to end, and ends it at once: it leaves nothing half done.

    `started` is called when the server answers.
    """
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", log_level="warning", access_log=False, server_header=False
    )
    _Server(config, started).run([listening])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._when_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._when_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A pass of the model in the other thread cannot be interrupted, and a clean exit would wait for it."""
        print("\nexplorer stopped", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(128 + sig)
