"""One of several processes of a training, in test conditions: `python -m tests.support.one_host OPTIONS train ...`.

OPTIONS are JSON. The last line of its output says in JSON what it has read and written.
"""

import contextlib
import io
import json
import os
import sys
import time
from typing import Any

from hafs_jax import cli
from hafs_jax.base.checksums import checked
from hafs_jax.base.process import meetings
from hafs_jax.base.process.meetings import Address
from hafs_jax.ops import hosts
from hafs_jax.training import data

SILENT_SECONDS = 4.0


def train(options: dict[str, Any], arguments: list[str]) -> int:
    """Runs the command; `code` is what the process says of its code, `dispatch_seconds` how long a dispatch waits."""
    seen: dict[str, Any] = {"written": [], "taken": 0, "hashed": []}
    take, agreed, sha256_of = data._take, hosts.agreed, checked.sha256_of

    def opened(event: str, details: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(details[0], str) and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen["written"].append(details[0])

    def taken(shard: Any, numbers: Any, out: Any, pool: Any) -> None:
        seen["taken"] += out.nbytes
        take(shard, numbers, out, pool)

    def slow(received: Any) -> int | None:
        time.sleep(options.get("dispatch_seconds", 0))
        return agreed(received)

    def hashed(path: Any) -> str:
        seen["hashed"].append(f"{path.parent.name}/{path.name}")
        return sha256_of(path)

    sys.addaudithook(opened)
    data._take, hosts.agreed, checked.sha256_of = taken, slow, hashed
    if "code" in options:
        hosts._code = lambda: options["code"]
    sys.argv = ["hafs", *arguments]
    try:
        return cli.main()
    finally:
        print("\n" + json.dumps(seen), flush=True)


def refused(port: int, index: int, cases: list[list[str]]) -> int:
    """Runs several commands one after another, each as one of two processes, and prints how each ended."""
    hosts._meeting = meetings.join(Address("127.0.0.1", port, index, 2), 60)
    found = []
    for arguments in cases:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = cli.main(arguments)
            except SystemExit as end:
                code = end.code
        found.append([code, said.getvalue()])
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    meetings.SILENT_SECONDS, meetings.GRACE_SECONDS, hosts._SHARED_SECONDS = SILENT_SECONDS, 0.3, 0.3
    given = json.loads(sys.argv[1])
    sys.exit(refused(**given) if "cases" in given else train(given, sys.argv[2:]))
