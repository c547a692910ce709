"""The port of 127.0.0.1 that the explorer listens on. Standard library only."""

import socket

from hafs_jax.base.errors import UserError

HOST = "127.0.0.1"  # the explorer has no password: nobody else's machine may reach it
PORT = 8471


def listening_socket(port: int | None) -> socket.socket:
    """A socket that listens on `port`; `UserError` where that is taken. None: PORT, or if taken another."""
    for wanted in [PORT, 0] if port is None else [port]:
        found = socket.socket()
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((HOST, wanted))
            found.listen()  # from here on nobody else gets it, and a page that is opened early waits
        except OSError as error:
            found.close()
            reason = error.strerror
        else:
            return found
    raise UserError(f"port {port} of {HOST} cannot be had ({reason}); give another --port, or leave it out")
