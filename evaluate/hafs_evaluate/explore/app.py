"""The explorer's addresses: its page, the report, and the requests that compute. Imports no torch.

Every path is one of a list that is made when the server starts. What a request says never becomes a path of a file.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from hafs_evaluate.explore import requests
from hafs_evaluate.explore.guard import REPORT_POLICY, Guard
from hafs_evaluate.explore.worker import Busy, Job, Worker
from hafs_evaluate.report.page import TEMPLATES
from hafs_jax.base.errors import UserError

LOG = logging.getLogger(__name__)
OWN = Path(__file__).parent / "template"
SCRIPTS = ("api.js", "strip.js", "text.js", "latent.js", "search.js", "compare.js", "steer.js", "start.js")
FILES = {
    "/": OWN / "page.html",
    "/explore.css": OWN / "explore.css",
    "/style.css": TEMPLATES / "style.css",  # the report's
    "/base.js": TEMPLATES / "base.js",
    **{f"/{name}": OWN / name for name in SCRIPTS},
}
STATUS = {UserError: 400, Busy: 503}


class Answers(Protocol):
    """What the server needs of `explorer.Explorer`."""

    def state(self) -> dict[str, Any]: ...
    def read(self, request: requests.ReadRequest, /) -> dict[str, Any]: ...
    def latent(self, request: requests.LatentRequest, /) -> dict[str, Any]: ...
    def search(self, request: requests.SearchRequest, /) -> dict[str, Any]: ...
    def compare(self, request: requests.CompareRequest, /) -> dict[str, Any]: ...
    def steer(self, request: requests.SteerRequest, is_stopped: Callable[[], bool], /) -> Iterator[dict[str, Any]]: ...


def make_app(explorer: Answers, report: Path, port: int, command: str) -> Starlette:
    """The server's ASGI application. `report` is the report's folder; `command` starts the server again."""
    worker = Worker()
    shown = _report_files(report)

    async def state(request: Request) -> Response:
        limits = {"characters": requests.MAX_CHARACTERS, "tokens": requests.MAX_TOKENS}
        limits |= {"new_tokens": requests.MAX_NEW_TOKENS, "runs": requests.MAX_RUNS}
        known = {"has_report": bool(shown), "command": command, "limits": limits}
        return JSONResponse({**explorer.state(), **known, "at_work": worker.at_work})

    async def at_work(request: Request) -> Response:
        return JSONResponse({"at_work": worker.at_work})

    def answering(kind: Any, method: Callable[[Any], dict[str, Any]]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            asked = requests.parsed(kind, await _body(request))
            job = worker.submit(lambda job: method(asked))
            try:
                return JSONResponse(await _unless_gone(request, job))
            except (UserError, Busy, HTTPException):
                raise
            except Exception as error:
                return JSONResponse({"error": _words(error)}, 500)

        return endpoint

    async def steer(request: Request) -> Response:
        asked = requests.parsed(requests.SteerRequest, await _body(request))
        lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        def work(job: Job) -> None:
            for entry in explorer.steer(asked, job.is_cancelled):
                job.tell(lines.put_nowait, entry)

        job = worker.submit(work)
        job.result.add_done_callback(lambda _: lines.put_nowait(None))
        return StreamingResponse(_streamed(job, lines), media_type="application/x-ndjson")

    routes: list[BaseRoute] = [Route(path, _file(place)) for path, place in FILES.items()]
    routes += [Route(path, _file(place, REPORT_POLICY)) for path, place in shown.items()]
    routes += [
        Route("/api/state", state),
        Route("/api/at-work", at_work),
        Route("/api/read", answering(requests.ReadRequest, explorer.read), methods=["POST"]),
        Route("/api/latent", answering(requests.LatentRequest, explorer.latent), methods=["POST"]),
        Route("/api/search", answering(requests.SearchRequest, explorer.search), methods=["POST"]),
        Route("/api/compare", answering(requests.CompareRequest, explorer.compare), methods=["POST"]),
        Route("/api/steer", steer, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {UserError: _refused, Busy: _refused, HTTPException: _http_error}
    return Starlette(routes=routes, middleware=[Middleware(Guard, port=port)], exception_handlers=handlers)


def _report_files(report: Path) -> dict[str, Path]:
    """The address of each file of the report that its page reads; none where there is no report."""
    index = report / "index.html"
    if not index.is_file():
        return {}
    beside = {f"/report/{path.relative_to(report).as_posix()}": path for path in sorted(report.glob("*/*.js"))}
    return {"/report/": index, "/report/index.html": index, **beside}


def _file(place: Path, policy: str | None = None) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        if not place.is_file():
            raise HTTPException(404, f"{place.name} is gone; start the explorer again")
        return FileResponse(place, headers={"Content-Security-Policy": policy} if policy else None)

    return endpoint


async def _body(request: Request) -> bytes:
    """The request's body; 413 once it is longer than any request may be."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > requests.MAX_BODY:
            raise HTTPException(413, f"expected a request of at most {requests.MAX_BODY:,} bytes; shorten the text")
        parts.append(part)
    return b"".join(parts)


async def _unless_gone(request: Request, job: Job) -> Any:
    """The job's result. Where the page goes away meanwhile, the job is dropped."""
    gone = asyncio.ensure_future(_disconnected(request))
    await asyncio.wait([job.result, gone], return_when=asyncio.FIRST_COMPLETED)
    if not job.result.done():
        job.cancel()
        raise HTTPException(499, "the page has gone")
    gone.cancel()
    return job.result.result()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _streamed(job: Job, lines: asyncio.Queue[dict[str, Any] | None]) -> AsyncIterator[str]:
    """One line of JSON for each entry, and one for an error. The job is asked to end when the page goes away."""
    try:
        while (entry := await lines.get()) is not None:
            yield json.dumps(entry) + "\n"
        if (error := job.result.exception()) is not None:
            yield json.dumps({"error": _words(error)}) + "\n"
    finally:
        job.cancel()


def _words(error: BaseException) -> str:
    """The error for the page. One that is no user's mistake is written to the terminal in full."""
    if isinstance(error, tuple(STATUS)):
        return str(error)
    LOG.warning("the explorer failed; its pages go on", exc_info=error)
    return f"the explorer failed ({type(error).__name__}); the terminal says where"


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, STATUS[type(error)])


async def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code)
