"""SIGKILL at a random moment of a command, up to three times in a row: the result is the undisturbed one."""

import os
import random
import signal
import time

from tests.torture.jobs import Torture


def case(torture: Torture, number: int, seed: int) -> str | None:
    rng = random.Random(f"times {seed} {number}")
    job, moment = torture.job(number), 0.0
    out = torture.fresh(job)
    for _ in range(rng.choice((1, 1, 2, 3))):
        moment = rng.uniform(0, torture.seconds[job])

        def kill(pid: int, moment: float = moment) -> None:
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)  # of a process that has ended already, but was not waited for, it is nothing

        if torture.run(job, out, meanwhile=kill)[0] == 0:
            break
    problem = torture.problem(job, out)
    return problem and f"{job}, killed after {moment:.2f} s: {problem}"
