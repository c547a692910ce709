"""What the server lets in, and the headers of all that it sends: it answers only this machine's own pages.

A page of another site could send requests to a port of this machine, by its address or, with DNS rebinding, by a name
of its own. So requests must carry the server's own Host and, where they have one, its own Origin; what computes is
posted as JSON, which a page of another site cannot do without asking first, and is never allowed to.
"""

from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = CONTENT_SECURITY_POLICY.replace("'self'", "'self' 'unsafe-inline'")
"""Of the report's page, whose scripts and styles are in it. Its texts are escaped by the report."""

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses what does not come from the server's own pages, and adds the headers above."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self.app = app
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        if port == 80:
            self.hosts |= {"127.0.0.1", "localhost"}
        self.origins = {f"http://{host}" for host in self.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # there are no web sockets

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Content-Security-Policy", CONTENT_SECURITY_POLICY)
            await send(message)

        refusal = self._refusal(scope["method"], Headers(scope=scope))
        app: Any = self.app if refusal is None else JSONResponse({"error": refusal[1]}, refusal[0])
        return await app(scope, receive, send_with_headers)

    def _refusal(self, method: str, headers: Headers) -> tuple[int, str] | None:
        """The status and the reason of a refusal; None where the request is let in."""
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            return 403, "expected the Host header of this server: open the address that it printed"
        if any(origin not in self.origins for origin in origins):
            return 403, "expected a request of this server's own page, found one of another site"
        if headers.get("sec-fetch-site", "none") in ("cross-site", "same-site") and method == "POST":
            return 403, "expected a request of this server's own page, found one of another site"
        if method not in ("GET", "HEAD", "POST"):
            return 405, "expected GET or POST"
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return 415, "expected Content-Type: application/json"
        return None
