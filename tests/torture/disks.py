"""A disk that refuses an event (full, failing, read-only, over quota), once or from then on: one line, exit code 2."""

import errno
import random

from tests.torture.jobs import Torture, one_line

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EFBIG)


def case(torture: Torture, number: int, seed: int) -> str | None:
    rng = random.Random(f"disks {seed} {number}")
    job, error = torture.job(number), rng.choice(ERRORS)
    at = rng.randint(1, torture.events[job]) * rng.choice((1, -1))
    out = torture.fresh(job)
    code, said = torture.run(job, out, at, error)
    what = f"{job}, {errno.errorcode[error]} at event {at}"
    if code not in (0, 2) or (code == 2 and not one_line(said)):
        return f"{what}: exit code {code}: {said.strip()[:700]} ... {said.strip()[-300:]}"
    problem = torture.problem(job, out)
    return problem and f"{what}: {problem}"
