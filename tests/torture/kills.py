"""SIGKILL before a random event of a command, again and again, until it ends: the result is the undisturbed one."""

import random
import signal

from tests.torture.jobs import Torture


def case(torture: Torture, number: int, seed: int) -> str | None:
    rng = random.Random(f"kills {seed} {number}")
    job = torture.job(number)
    out, at = torture.fresh(job), 0
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randint(1, torture.events[job])
        if torture.run(job, out, at, -signal.SIGKILL)[0] == 0:
            break
    problem = torture.problem(job, out)
    return problem and f"{job}, killed before event {at}: {problem}"
