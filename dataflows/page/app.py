"""The operator page: a few routes around a status and the latest flagged transactions."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dataflows.page.recent import Recent
from dataflows.page.status import Status
from model.package import DECISIONS

STATIC = Path(__file__).parent / "static"
FLAGGED_DECISIONS = DECISIONS[1:]
MIN_TOKEN_CHARACTERS = 16

_COOKIE = "scoring_page"
_MOST_FORM_BYTES = 4096
#: Browsers signed in at a time; one more signs out the one that has been longest.
_MOST_SESSIONS = 100
#: However many look on, metrics are collected no more often than this.
_STATUS_EVERY_S = 0.5

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class PageError(ValueError):
    """The page must not be served like this; says why, and what to do."""


def page(
    status: Callable[[], Status],
    recent: Recent,
    token: str | None = None,
    *,
    host: str = "127.0.0.1",
    clock: Callable[[], float] = time.monotonic,
) -> Starlette:
    """Return the page as an ASGI application, to be served at `host`.

        /                              the page
        /api/status            a `Status`
        /api/flagged           a `Found`; card= terminal= card_prefix= terminal_prefix= decision=
                               limit= narrow it, after=N answers 204 if `Found.total` is still N
        /api/record?id=        a `Flagged`, by its transaction's id

    Questions to /api/flagged may be a POSTed form, as the page's own are: proxies write URLs into
    their logs, and a card's number does not belong there.

    With a token, all of it asks for ``Authorization: Bearer …`` or for the cookie that the form
    at /login gives, until /logout, or until the process ends. Without one, `host` must be a
    loopback address, and requests must name one: a foreign name that resolves to this machine gets
    nothing (DNS rebinding). Raises PageError for an address that others can reach without a token,
    and for a token that can be guessed.
    """
    loopback = _is_loopback(host)
    if token is None and not loopback:
        raise PageError(
            f"the page would be open to everybody who reaches {host}, and it shows card numbers: "
            "set a token, or serve it at 127.0.0.1"
        )
    if token is not None and len(token) < MIN_TOKEN_CHARACTERS:
        raise PageError(
            f"the token of the page has {len(token)} characters and could be guessed; give it "
            f"{MIN_TOKEN_CHARACTERS} or more, such as `openssl rand -hex 24` prints"
        )
    sessions = _Sessions()
    views = _Views(status, recent, token, sessions, clock)
    routes = [
        Route("/", views.index),
        Route("/login", views.login, methods=["GET", "POST"]),
        Route("/login/page.css", views.login_style),
        Route("/logout", views.logout, methods=["POST"]),
        Route("/api/status", views.status),
        Route("/api/flagged", views.flagged, methods=["GET", "POST"]),
        Route("/api/record", views.record),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    middleware = [Middleware(_Headers)]
    if loopback:
        names = ["localhost", "127.0.0.1", "[::1]", host, f"[{host}]"]
        middleware.append(
            Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)
        )
    if token is not None:
        middleware.append(Middleware(_SignedIn, token=token, sessions=sessions))
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: _http_error, Exception: _failure},
    )


class _Sessions:
    """Who has signed in to this process and not out again; a restart signs everybody out."""

    def __init__(self) -> None:
        self._ids: deque[str] = deque(maxlen=_MOST_SESSIONS)

    def begin(self) -> str:
        """Return what the browser is to show from now on. It says nothing about the token:
        browsers send cookies to every port of a host."""
        self._ids.append(secrets.token_urlsafe(24))
        return self._ids[-1]

    def known(self, given: str) -> bool:
        return any(_same(given, each) for each in self._ids)

    def end(self, given: str) -> None:
        if given in self._ids:
            self._ids.remove(given)


class _Views:
    """The routes."""

    def __init__(
        self,
        status: Callable[[], Status],
        recent: Recent,
        token: str | None,
        sessions: _Sessions,
        clock: Callable[[], float],
    ) -> None:
        self._status, self._recent, self._token, self._clock = status, recent, token, clock
        self._sessions = sessions
        sign_out = '<form method="post" action="/logout"><button>Sign out</button></form>'
        self._index = _html("index.html").replace(
            "<!-- sign out -->", sign_out if token is not None else ""
        )
        self._login = _html("login.html")
        self._encoded, self._encoded_at = b"", -_STATUS_EVERY_S

    async def index(self, request: Request) -> Response:
        return HTMLResponse(self._index)

    async def status(self, request: Request) -> Response:
        now = self._clock()
        if now - self._encoded_at >= _STATUS_EVERY_S:
            self._encoded, self._encoded_at = msgspec.json.encode(self._status()), now
        return Response(self._encoded, media_type="application/json")

    async def flagged(self, request: Request) -> Response:
        query: Mapping[str, str] = request.query_params
        if request.method == "POST":
            query = await _form(request)
        limit = _whole(query.get("limit", "100"), "limit", 1, self._recent.capacity)
        after = query.get("after")
        # Not "at most": a browser may know the number of a process before this one.
        if after is not None and self._recent.total == _whole(after, "after", 0, 2**53):
            return Response(status_code=204)
        decision = query.get("decision", "")
        if decision and decision not in FLAGGED_DECISIONS:
            raise HTTPException(
                400, f"decision={decision}: flagged ones are {' or '.join(FLAGGED_DECISIONS)}"
            )
        found = self._recent.find(
            card=query.get("card", ""),
            terminal=query.get("terminal", ""),
            card_prefix=query.get("card_prefix", ""),
            terminal_prefix=query.get("terminal_prefix", ""),
            decision=decision,
            limit=limit,
        )
        return _json(found)

    async def record(self, request: Request) -> Response:
        wanted = request.query_params.get("id", "")
        found = self._recent.get(wanted)
        if found is None:
            raise HTTPException(
                404,
                f"transaction {wanted!r} is not among the newest {self._recent.capacity} flagged "
                "ones of this process; its prediction is on the predictions topic",
            )
        return _json(found)

    async def login(self, request: Request) -> Response:
        if self._token is None:
            return RedirectResponse("/", 303)
        if request.method != "POST":
            return HTMLResponse(self._login)
        form = await _form(request)
        if not _same(form.get("token", ""), self._token):
            wrong = '<p class="wrong" id="wrong" role="alert">This is not the token.</p>'
            return HTMLResponse(self._login.replace("<!-- wrong -->", wrong), 401)
        response = RedirectResponse("/", 303)
        # TLS ends at a proxy, if anywhere. Who forges this header locks out himself.
        over_tls = request.headers.get("x-forwarded-proto") == "https"
        response.set_cookie(
            _COOKIE, self._sessions.begin(), httponly=True, samesite="strict", secure=over_tls
        )
        return response

    async def login_style(self, request: Request) -> Response:
        return Response((STATIC / "page.css").read_bytes(), media_type="text/css")

    async def logout(self, request: Request) -> Response:
        self._sessions.end(request.cookies.get(_COOKIE, ""))
        response = RedirectResponse("/login", 303)
        response.delete_cookie(_COOKIE, httponly=True, samesite="strict")
        return response


class _Headers:
    """Send the security headers with every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class _SignedIn:
    """Let through who knows the token, and everybody to the login."""

    def __init__(self, app: ASGIApp, token: str, sessions: _Sessions) -> None:
        self._app, self._token, self._sessions = app, token, sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in ("/login", "/login/page.css"):
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if (scheme.lower() == "bearer" and _same(bearer.strip(), self._token)) or (
            self._sessions.known(request.cookies.get(_COOKIE, ""))
        ):
            await self._app(scope, receive, send)
            return
        response: Response = RedirectResponse("/login", 303)
        if scope["path"] != "/":
            response = _error(
                401, "the token is missing or wrong: sign in at /login, or send it as a bearer"
            )
            response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)


def _same(given: str, expected: str) -> bool:
    """Compare in a time that does not tell how much was right."""
    return hmac.compare_digest(given.encode(), expected.encode())


async def _form(request: Request) -> dict[str, str]:
    """Return the fields of a form, each the first one of its name."""
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > _MOST_FORM_BYTES:
                raise HTTPException(413, f"a form has {_MOST_FORM_BYTES:,} bytes at most")
    except ClientDisconnect:
        raise HTTPException(400, "the form came in part only") from None
    fields = parse_qs(body.decode("utf-8", "replace"))
    return {name: values[0] for name, values in fields.items()}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _html(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _whole(text: str, name: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise HTTPException(
            400, f"{name}={text}: a whole number from {low:,} to {high:,} is wanted"
        )
    return value


def _json(content: Any, code: int = 200) -> Response:
    return Response(msgspec.json.encode(content), code, media_type="application/json")


def _error(code: int, sentence: str) -> Response:
    return _json({"error": sentence}, code)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    ours = {
        "Not Found": f"there is nothing at {path}; the page is at /",
        "Method Not Allowed": f"{path} does not answer to {request.method}",
    }
    response = _error(error.status_code, ours.get(error.detail, error.detail))
    response.headers.update(error.headers or {})
    return response


async def _failure(request: Request, error: Exception) -> Response:
    """Answer for a defect of ours. Starlette sends this from outside the other middleware."""
    response = _error(500, "the page could not answer; the log of the flow says why")
    response.headers.update(_HEADERS)
    return response
