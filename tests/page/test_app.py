"""The page as a program sees it: routes, answers, headers, and who may look."""

from __future__ import annotations

import http.client
import logging
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

from dataflows.page.app import FLAGGED_DECISIONS, PageError, page
from dataflows.page.status import Status
from dataflows.serve import Server, serve
from features.fraud import FRAUD
from tests.page.feed import BEGAN_S, Feed, recent

TOKEN = "a token of some length"
FILES = {
    "/": "text/html",
    "/static/main.js": "javascript",
    "/static/page.css": "text/css",
    "/static/icon.svg": "image/svg+xml",
}


@dataclass
class Answer:
    code: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def error(self) -> str:
        assert list(self.json) == ["error"]
        sentence: str = self.json["error"]
        return sentence


def ask(
    server: Server, path: str, method: str = "GET", body: str | None = None, **headers: str
) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        connection.request(
            method, path, body, {name.replace("_", "-"): value for name, value in headers.items()}
        )
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()


@pytest.fixture(scope="module")
def feed() -> Feed:
    feed = Feed()
    feed.flag(
        {"card_id": "C1", "terminal_id": "T1", "transaction_id": "first", "score": 0.9},
        {"card_id": "C12", "terminal_id": "T2", "transaction_id": "a/b?c d", "score": 0.3},
        {"card_id": "C1", "terminal_id": "T2", "transaction_id": "last", "score": 0.4},
        {"card_id": "D*", "terminal_id": "*", "transaction_id": "..", "score": 0.4},
        {"card_id": "D1", "terminal_id": "X", "transaction_id": "é&=", "score": 0.4},
    )
    return feed


@pytest.fixture(scope="module")
def open_page(feed: Feed) -> Iterator[Server]:
    with serve(page(feed.status, feed.recent), "127.0.0.1", 0) as server:
        yield server


@pytest.fixture(scope="module")
def locked_page(feed: Feed) -> Iterator[Server]:
    with serve(page(feed.status, feed.recent, TOKEN), "127.0.0.1", 0) as server:
        yield server


@pytest.mark.parametrize(("path", "kind"), FILES.items())
def test_files_are_there(open_page: Server, path: str, kind: str) -> None:
    answer = ask(open_page, path)
    assert answer.code == 200
    assert kind in answer.headers["content-type"]


@pytest.mark.parametrize(
    "path", [*FILES, "/api/status", "/api/flagged", "/api/record?id=none", "/nothing", "/static/no"]
)
@pytest.mark.parametrize("host", ["127.0.0.1", "evil.example"])
def test_every_answer_has_the_security_headers(open_page: Server, path: str, host: str) -> None:
    headers = ask(open_page, path, Host=host).headers
    policy = headers["content-security-policy"]
    assert "default-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers.get_all("x-content-type-options") == ["nosniff"]
    assert headers.get_all("referrer-policy") == ["no-referrer"]
    assert headers.get_all("cache-control") == ["no-store"]
    assert headers["access-control-allow-origin"] is None


def test_the_page_has_no_inline_script_or_style_and_names_nobody_else(open_page: Server) -> None:
    for path in (*FILES, "/static/flagged.js", "/static/draw.js", "/static/series.js"):
        text = ask(open_page, path).body.decode()
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", ""), path
        assert "https://" not in text, path
        assert "innerHTML" not in text, path
    html = ask(open_page, "/").body.decode()
    assert html.count("<script") == html.count('<script type="module" src=')
    assert "style=" not in html
    assert not re.search(r"\son\w+=", html)


def test_the_status_is_a_status(open_page: Server) -> None:
    status = msgspec.json.decode(ask(open_page, "/api/status").body, type=Status)
    assert status.started == BEGAN_S
    assert status.health


def test_many_onlookers_cost_one_collection(feed: Feed) -> None:
    now = [0.0]
    app = page(feed.status, feed.recent, clock=lambda: now[0])
    with serve(app, "127.0.0.1", 0) as server:
        before = feed.seconds
        answers = {ask(server, "/api/status").body for _ in range(5)}
        assert (len(answers), feed.seconds) == (1, before + 1)
        now[0] = 0.5
        assert ask(server, "/api/status").body not in answers


def test_flagged_ones_come_newest_first_and_whole(open_page: Server) -> None:
    found = ask(open_page, "/api/flagged").json
    names = [row["transaction_id"] for row in found["flagged"]]
    assert names == ["é&=", "..", "last", "a/b?c d", "first"]
    assert (found["matching"], found["kept"], found["total"]) == (5, 5, 5)
    assert list(found["flagged"][0]["features"]) == list(FRAUD.names)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("card=C1", ["last", "first"]),
        ("card_prefix=C1", ["last", "a/b?c d", "first"]),
        ("card=C1&card_prefix=C1", ["last", "first"]),
        ("card=D*", [".."]),  # an asterisk is a letter of an id
        ("card_prefix=D*", [".."]),
        ("terminal_prefix=*", [".."]),
        ("terminal_prefix=T", ["last", "a/b?c d", "first"]),
        ("terminal=T2", ["last", "a/b?c d"]),
        ("card=C1&terminal=T2", ["last"]),
        ("decision=block", ["first"]),
        ("card=C2", []),
        ("limit=1", ["é&="]),
        ("card=C12&after=4", ["a/b?c d"]),
        ("card=C12&after=480", ["a/b?c d"]),  # of the process before this one
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_filters(open_page: Server, query: str, expected: list[str], method: str) -> None:
    """A form by POST is the same question; its cards are in no log of a proxy."""
    asked = ("/api/flagged", method, query) if method == "POST" else (f"/api/flagged?{query}",)
    found = ask(open_page, *asked).json
    assert [row["transaction_id"] for row in found["flagged"]] == expected


def test_nothing_new_is_no_content(open_page: Server) -> None:
    answer = ask(open_page, "/api/flagged?after=5")
    assert (answer.code, answer.body) == (204, b"")


@pytest.mark.parametrize("name", ["first", "a/b?c d", "..", "é&="])
def test_a_record_by_its_id(open_page: Server, name: str) -> None:
    record = ask(open_page, f"/api/record?id={quote(name, safe='')}").json
    assert record["transaction_id"] == name
    assert record["schema_hash"] == FRAUD.schema_hash


@pytest.mark.parametrize(
    ("path", "method", "code", "words"),
    [
        ("/api/record?id=nobody", "GET", 404, "'nobody' is not among the newest 500 flagged"),
        ("/api/flagged?limit=0", "GET", 400, "limit=0: a whole number from 1 to 500 is wanted"),
        ("/api/flagged?limit=many", "GET", 400, "limit=many"),
        ("/api/flagged?after=-1", "GET", 400, "after=-1"),
        ("/api/flagged?decision=approve", "GET", 400, " or ".join(FLAGGED_DECISIONS)),
        ("/nothing", "GET", 404, "nothing at /nothing; the page is at /"),
        ("/api/status", "POST", 405, "/api/status does not answer to POST"),
        ("/static/../app.py", "GET", 404, "nothing"),
        ("/static/%2e%2e/app.py", "GET", 404, "nothing"),
    ],
)
def test_errors_are_sentences(
    open_page: Server, path: str, method: str, code: int, words: str
) -> None:
    answer = ask(open_page, path, method)
    assert answer.code == code
    assert words in answer.error


def test_a_failure_of_ours_tells_nothing_but_that(feed: Feed) -> None:
    def broken() -> Status:
        raise RuntimeError("a secret")

    with serve(page(broken, feed.recent), "127.0.0.1", 0) as server:
        answer = ask(server, "/api/status")
        assert (answer.code, answer.error) == (
            500,
            "the page could not answer; the log of the flow says why",
        )
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert ask(server, "/api/flagged").code == 200


# --- who may look ---------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "localhost:81", "127.0.0.1", "[::1]:8080"])
def test_names_of_this_machine_are_let_in(open_page: Server, host: str) -> None:
    assert ask(open_page, "/", Host=host).code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil", ""])
def test_a_foreign_name_for_this_machine_is_refused(open_page: Server, host: str) -> None:
    for path in ("/", "/api/flagged"):
        answer = ask(open_page, path, Host=host)
        assert answer.code == 400
        assert b"C1" not in answer.body


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.10", "scoring.example"])
def test_what_others_can_reach_needs_a_token(host: str) -> None:
    with pytest.raises(PageError, match=r"it shows card numbers: set a token, or serve it at 127"):
        page(Feed().status, recent(), host=host)
    page(Feed().status, recent(), TOKEN, host=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    page(Feed().status, recent(), host=host)


@pytest.mark.parametrize("token", ["", "x", "fifteen letters"])
def test_a_token_that_can_be_guessed_is_refused(token: str) -> None:
    with pytest.raises(PageError, match=f"has {len(token)} characters .* give it 16 or more"):
        page(Feed().status, recent(), token)


@pytest.mark.parametrize(
    "path", ["/api/status", "/api/flagged", "/api/record?id=first", "/static/main.js", "/nothing"]
)
def test_without_the_token_nothing_is_told(locked_page: Server, path: str) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer"},
        {"Cookie": f"scoring_page={TOKEN}"},
        {"Cookie": "scoring_page="},
    ):
        answer = ask(locked_page, path, **headers)
        assert answer.code == 401, headers
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "sign in at /login" in answer.error
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert ask(locked_page, "/").headers["location"] == "/login"


def test_a_bearer_is_let_in(locked_page: Server) -> None:
    for scheme in ("Bearer", "bearer"):
        answer = ask(locked_page, "/api/status", Authorization=f"{scheme} {TOKEN}")
        assert answer.code == 200


def test_signing_in_and_out(locked_page: Server) -> None:
    form = {"Content_Type": "application/x-www-form-urlencoded"}
    assert b'type="password"' in ask(locked_page, "/login").body
    assert ask(locked_page, "/login/page.css").code == 200

    wrong = ask(locked_page, "/login", "POST", "token=wrong", **form)
    assert wrong.code == 401
    assert b"This is not the token." in wrong.body
    assert wrong.headers["set-cookie"] is None

    right = ask(locked_page, "/login", "POST", f"token={quote(TOKEN)}", **form)
    assert (right.code, right.headers["location"]) == (303, "/")
    cookie = right.headers["set-cookie"]
    assert TOKEN not in cookie
    assert {"httponly", "samesite=strict"} <= {part.strip().lower() for part in cookie.split(";")}
    value = cookie.split(";")[0]
    assert b"Sign out" in ask(locked_page, "/", Cookie=value).body
    assert ask(locked_page, "/api/status", Cookie=value).code == 200
    assert ask(locked_page, "/api/status", Cookie=f"{value}0").code == 401

    other = ask(locked_page, "/login", "POST", f"token={quote(TOKEN)}", **form)
    elsewhere = other.headers["set-cookie"].split(";")[0]
    assert elsewhere != value

    out = ask(locked_page, "/logout", "POST", Cookie=value)
    assert (out.code, out.headers["location"]) == (303, "/login")
    assert "max-age=0" in out.headers["set-cookie"].lower()
    # Whoever kept the cookie has nothing; another browser stays signed in.
    assert ask(locked_page, "/api/status", Cookie=value).code == 401
    assert ask(locked_page, "/api/status", Cookie=elsewhere).code == 200


def test_a_restart_signs_everybody_out(feed: Feed) -> None:
    form = {"Content_Type": "application/x-www-form-urlencoded"}
    with serve(page(feed.status, feed.recent, TOKEN), "127.0.0.1", 0) as server:
        right = ask(server, "/login", "POST", f"token={quote(TOKEN)}", **form)
    value = right.headers["set-cookie"].split(";")[0]
    with serve(page(feed.status, feed.recent, TOKEN), "127.0.0.1", 0) as server:
        assert ask(server, "/api/status", Cookie=value).code == 401


def test_sessions_are_bounded(locked_page: Server) -> None:
    form = {"Content_Type": "application/x-www-form-urlencoded"}
    cookies = [
        ask(locked_page, "/login", "POST", f"token={quote(TOKEN)}", **form)
        .headers["set-cookie"]
        .split(";")[0]
        for _ in range(101)
    ]
    assert ask(locked_page, "/api/status", Cookie=cookies[0]).code == 401
    assert ask(locked_page, "/api/status", Cookie=cookies[1]).code == 200


def test_over_tls_the_cookie_stays_there(locked_page: Server) -> None:
    form = {"Content_Type": "application/x-www-form-urlencoded", "X_Forwarded_Proto": "https"}
    right = ask(locked_page, "/login", "POST", f"token={quote(TOKEN)}", **form)
    assert "; secure" in right.headers["set-cookie"].lower()


def test_a_flood_at_the_login_is_cut_off(locked_page: Server) -> None:
    answer = ask(locked_page, "/login", "POST", "token=" + "x" * 10_000)
    assert answer.code == 413
    assert "4,096 bytes at most" in answer.error


def test_without_a_token_there_is_no_login(open_page: Server) -> None:
    assert ask(open_page, "/login").headers["location"] == "/"
    assert b"Sign out" not in ask(open_page, "/").body


@pytest.mark.parametrize("path", ["/login", "/api/flagged"])
def test_who_hangs_up_in_the_middle_of_a_form_is_nobody_s_error(
    locked_page: Server, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
    with socket.create_connection(("127.0.0.1", locked_page.port)) as connection:
        connection.sendall(f"{head}Content-Length: 500\r\n\r\ntoken={TOKEN}".encode())
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(5)
        while connection.recv(4096):
            pass
    assert ask(locked_page, "/login").code == 200
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
