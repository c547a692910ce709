"""Every request to the hub goes through here: silence is bounded, retries are bounded, and each end is one line.

transformers, datasets and huggingface_hub share one HTTP client. `connect` puts ours in its place, which retries what
may pass, and raises a `UserError` where it does not: none of these libraries retries that again. `hub_errors` turns
what the hub refuses, and whatever else they raise, into a `UserError` too. Must not import torch.
"""

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from hafs_jax.base.errors import UserError

LOG = logging.getLogger(__name__)

ATTEMPTS = 4
PASSING = (408, 429, 500, 502, 503, 504)
"""The statuses that another attempt may change."""

AGAIN = "give the same command again later: whole files are kept"
_SIZES = re.compile(r"file should be of size (\d+) but has size (\d+) \((.+?)\)\.")
"""How huggingface_hub says that a file is cut short."""
LOG_IN = "run `hf auth login` or set HF_TOKEN"


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def longest_wait() -> float:
    """Seconds that one request waits for a hub that does not serve it: HAFS_HUB_WAIT [60]. It bounds Retry-After."""
    text = os.environ.get("HAFS_HUB_WAIT") or "60"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UserError(f"HAFS_HUB_WAIT={text!r}: expected a number of seconds above 0")
    return seconds


def silence() -> float:
    """Seconds without a byte after which an attempt fails: HF_HUB_DOWNLOAD_TIMEOUT, or a sixth of `longest_wait`."""
    text = os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT")
    if not text:
        return longest_wait() / 6
    if not text.isdigit() or not int(text):
        raise UserError(f"HF_HUB_DOWNLOAD_TIMEOUT={text!r}: expected a whole number of seconds above 0")
    return float(text)


def connect() -> None:
    """Gives the hub libraries the client of this module. They may be imported already."""
    longest_wait(), silence()  # a wrong setting is said before anything else
    # Xet moves large files in a library of its own, whose retries and silences cannot be bounded from here; plain HTTP
    # carries the same bytes, which are then checked.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    try:
        import huggingface_hub
        from huggingface_hub import constants
        from huggingface_hub.utils import _http
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install huggingface-hub") from error
    if os.environ["HF_HUB_DISABLE_XET"].upper() in constants.ENV_VARS_TRUE_VALUES:
        constants.HF_HUB_DISABLE_XET = True
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its notes of each attempt: ours stand for them
    if not _is_connected():
        huggingface_hub.set_client_factory(partial(_client, _http.default_client_factory))


def _is_connected() -> bool:
    from huggingface_hub.utils import _http

    factory = _http._GLOBAL_CLIENT_FACTORY
    return isinstance(factory, partial) and factory.func is _client


def _client(default: Callable[[], Any]) -> Any:
    """huggingface_hub's own client, whose `send`, through which all its requests go, is ours."""
    client = default()
    client.send = partial(_send, client.send, _Failures())
    return client


class _Failures:
    """How many attempts at each address have failed in a row."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, request: Any, reason: str, wait: float | None = None) -> None:
        """Waits before the next attempt at `request`: `wait`, or longer each time. `UserError` after the last one."""
        where = f"{request.method} {request.url}"
        count = self._counts[where] = self._counts.get(where, 0) + 1
        address = f"{request.url.scheme}://{request.url.netloc.decode()}{request.url.path}"
        longest = longest_wait()
        if wait is not None and wait > longest:
            raise UserError(f"{address}: {reason}, which asks to wait {wait:,.0f} s; {AGAIN}")
        if count >= ATTEMPTS:
            del self._counts[where]
            raise UserError(f"{address}: {reason}, {count} times in a row; {AGAIN}")
        seconds = 2 ** (count - 1) * longest / 60 if wait is None else wait
        LOG.info(f"{address}: {reason}; attempt {count + 1} of {ATTEMPTS} in {seconds:.3g} s")
        time.sleep(seconds)

    def clear(self, request: Any) -> None:
        self._counts.pop(f"{request.method} {request.url}", None)


def _send(send: Callable[..., Any], failures: _Failures, request: Any, *, stream: bool = False, **options: Any) -> Any:
    """`httpx.Client.send`, with bounded silences and retries; the body of a streamed answer is watched as well."""
    most = silence()
    timeouts = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {
        name: most if timeouts.get(name) is None else min(timeouts[name], most)
        for name in ("connect", "read", "write", "pool")
    }
    repeats = _is_whole(request)  # a body that is streamed has gone after one attempt; its sender repeats it
    while True:
        try:
            response = send(request, stream=stream, **options)
        except Exception as error:
            if not _is_of_transport(error):
                raise
            failures.add(request, _words(error, most))
            if not repeats:
                raise
            continue
        if response.status_code in PASSING:
            wait = response.headers.get("Retry-After", "").strip()
            reason = f"the hub answers {response.status_code} {response.reason_phrase}".strip()
            response.close()
            failures.add(request, reason, float(wait) if wait.isdigit() else None)
            if repeats:
                continue
            return response
        break
    if _is_page(request, response):
        response.close()
        raise UserError(
            f"{request.url}: expected the hub's data, found an HTML page; is a proxy or a log-in in between?"
        )
    if stream:
        response.stream = _watched(response.stream, request, failures, most)
    else:
        failures.clear(request)
    return response


def _is_whole(request: Any) -> bool:
    """Whether the request's body is in memory."""
    try:
        request.content  # noqa: B018
    except RuntimeError:  # RequestNotRead
        return False
    return True


def _is_page(request: Any, response: Any) -> bool:
    """Whether a page for people came in the place of data. No file that we ask for is one."""
    asked = request.url.path.startswith("/api/") or "/resolve/" in request.url.path
    return asked and response.is_success and "text/html" in response.headers.get("Content-Type", "")


def _watched(stream: Any, request: Any, failures: _Failures, most: float) -> Any:
    """A body that counts where it breaks off; huggingface_hub goes on from there with another request."""
    base = next(kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream")

    class Watched(base):  # type: ignore[valid-type, misc]
        def __iter__(self) -> Iterator[bytes]:
            try:
                yield from stream
            except Exception as error:
                if _is_of_transport(error):
                    failures.add(request, _words(error, most))
                raise
            failures.clear(request)

        def close(self) -> None:
            stream.close()

    return Watched()


def _is_of_transport(error: Exception) -> bool:
    """Whether httpx, of either of its names, says that the connection failed."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _words(error: Exception, seconds: float) -> str:
    if any(kind.__name__ == "TimeoutException" for kind in type(error).__mro__):
        return f"the hub said nothing for {seconds:.3g} s"
    return f"the connection failed ({' '.join(str(error).split()) or type(error).__name__})"


@contextlib.contextmanager
def hub_errors(kind: str, name: str, doing: str = "cannot be had") -> Iterator[None]:
    """Turns any error of the hub libraries into a `UserError` about the `kind` ("model", "dataset") called `name`.

    Only calls of libraries stand inside. What they raise is open-ended: errors of HTTP, of JSON of another form, of
    their own, and of what they find in the place of a file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        ours = next((cause for cause in _chain(error) if isinstance(cause, UserError)), None)
        raise UserError(f"{kind} {name} {doing}: {ours or explained(kind, name, error)}") from error


def explained(kind: str, name: str, error: BaseException) -> str:
    """Why the hub or its library refused, and what to do, as the rest of a line."""
    response = next((found for cause in _chain(error) if (found := getattr(cause, "response", None)) is not None), None)
    page = f"{endpoint()}/{'datasets/' if kind == 'dataset' else ''}{name}"
    if response is None:
        reason = " ".join(str(error).split())[:300]
        if sizes := _SIZES.search(reason):
            return f"expected {int(sizes[1]):,} bytes of {sizes[3]}, found {int(sizes[2]):,}; {AGAIN}"
        return (
            f"{type(error).__name__}: {reason}" if not isinstance(error, OSError | ValueError) or not reason else reason
        )
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    if code == "GatedRepo":
        return f"the hub answers {status}: it is gated; accept its terms at {page}, then {LOG_IN}"
    if code == "RevisionNotFound":
        return f"the hub answers {status}: it has no such revision; check --revision at {page}"
    if code == "EntryNotFound":
        return f"the hub answers {status}: it has no such file ({response.url.path})"
    if status == 401:
        known = bool(response.request.headers.get("authorization"))
        mend = f"the token is not accepted, or {name} does not exist; {LOG_IN}" if known else ""
        return f"the hub answers 401: {mend or f'{name} does not exist, or is private; check the name, or {LOG_IN}'}"
    if status == 403:
        return f"the hub answers 403: no right to it; ask for access at {page}, and {LOG_IN} with a token that has it"
    if status == 404:
        return (
            f"the hub answers 404: there is none of that name at {page}; check the name, or {LOG_IN} if it is private"
        )
    said = getattr(error, "server_message", None) or response.reason_phrase
    return f"the hub answers {status}: {' '.join(str(said).split())[:200]}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, without going in circles."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
