"""SIGINT, SIGTERM and SIGHUP before a random event of a command: one line, 128 + the signal, the same result after."""

import random
import signal

from tests.torture.jobs import Torture

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def case(torture: Torture, number: int, seed: int) -> str | None:
    rng = random.Random(f"signals {seed} {number}")
    job, sent = torture.job(number), rng.choice(NUMBERS)
    at = rng.randint(1, torture.events[job])
    out = torture.fresh(job)
    code, said = torture.run(job, out, at, -sent)
    what = f"{job}, {sent.name} before event {at}"
    if code not in (0, 128 + sent) or "Traceback" in said:
        return f"{what}: exit code {code}: {said.strip()[-400:]}"
    problem = torture.problem(job, out)
    return problem and f"{what}: {problem}"
