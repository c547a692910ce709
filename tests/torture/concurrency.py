"""Two commands at once on one thing: one goes on, the other waits or says who holds it; the result is the usual one."""

import random
import time

from tests.torture.jobs import Torture, one_line


def case(torture: Torture, number: int, seed: int) -> str | None:
    rng = random.Random(f"concurrency {seed} {number}")
    job = torture.job(number)
    delay = rng.uniform(0, torture.seconds[job])
    out, ended = torture.fresh(job), []

    def second(_: int) -> None:
        time.sleep(delay)
        ended.append(torture.run(job, out))

    ended.append(torture.run(job, out, meanwhile=second))
    what = f"{job} twice, {delay:.2f} s apart"
    for code, said in ended:
        if code not in (0, 2) or (
            code == 2 and not (one_line(said) and ("is at work on it" in said or "another process holds it" in said))
        ):
            return f"{what}: exit code {code}: {said.strip()[-400:]}"
    if all(code for code, _ in ended):
        return f"{what}: neither went on"
    problem = torture.problem(job, out)
    return problem and f"{what}: {problem}"
