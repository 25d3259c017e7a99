"""The page as people meet it: in Chromium, by eye, by keyboard, by a screen reader's tree."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np
import pytest

pytest.importorskip("selenium", reason="needs selenium (the extra `dev`)")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from dataflows.page.app import page
from dataflows.serve import Server, serve
from tests.page.conftest import look
from tests.page.feed import BOUNDS, Feed, samples

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

WITHIN_S = 20
SIZES = {"desktop": (1280, 1000), "tablet": (820, 1100), "phone": (360, 760)}


class Page:
    """The page in the browser, by what people call its parts."""

    def __init__(self, browser: Chrome, server: Server, feed: Feed) -> None:
        self.browser, self.server, self.feed = browser, server, feed

    def open(self) -> None:
        self.browser.get(self.server.url)
        self.until(lambda: self.text("rate-in") not in ("", "–"))
        self.until(lambda: self.text("count") != "Not known yet.")

    def until(self, condition: Callable[[], Any]) -> Any:
        def holds(_: Any) -> Any:
            return condition()

        return WebDriverWait(self.browser, WITHIN_S, 0.1).until(holds)

    def by_id(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def text(self, name: str) -> str:
        """Return an element's text in one go: elements may be replaced at any time."""
        return str(self.js("return document.getElementById(arguments[0]).textContent", name))

    def js(self, code: str, *arguments: Any) -> Any:
        return self.browser.execute_script(code, *arguments)

    def column(self, name: str) -> list[str]:
        """Return the texts of a column of the list of flagged transactions, as shown."""
        code = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return cast("list[str]", self.js(code, f"#rows .{name}"))

    @property
    def newest(self) -> str | None:
        return next(iter(self.column("tx")), None)

    def visible(self, name: str) -> bool:
        return self.by_id(name).is_displayed()

    def filter(self, **fields: str) -> None:
        for name, typed in fields.items():
            field = self.browser.find_element(By.NAME, name)
            if field.tag_name == "input":
                field.clear()
            field.send_keys(typed)

    def press(self, *keys: str) -> None:
        ActionChains(self.browser).send_keys(*keys).perform()

    def focused(self) -> str:
        """Return the id of what has the focus, or else its text."""
        return str(self.js("const e = document.activeElement; return e.id || e.textContent"))

    def console(self) -> list[str]:
        """Return what the console has seen since the last look: errors and warnings."""
        entries = self.browser.get_log("browser")  # type: ignore[no-untyped-call]
        return [e["message"] for e in entries if e["level"] in ("SEVERE", "WARNING")]

    def shot(self, path: Path, *, whole: bool = True) -> None:
        taken = self.browser.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole}
        )
        path.write_bytes(base64.b64decode(taken["data"]))


@pytest.fixture
def feed(request: pytest.FixtureRequest) -> Feed:
    """Return a flow that has flagged 137 transactions, or as many as the parameter says."""
    feed = Feed()
    feed.flag(*[{}] * getattr(request, "param", 137))
    return feed


@pytest.fixture
def shown(browser: Chrome, feed: Feed) -> Iterator[Page]:
    """Return the page, open."""
    with serve(page(feed.status, feed.recent), "127.0.0.1", 0) as server:
        shown = Page(browser, server, feed)
        shown.open()
        yield shown
        browser.get("about:blank")


@contextmanager
def no_wait(shown: Page) -> Iterator[None]:
    """Hold the live updates meanwhile."""
    shown.by_id("pause").click()
    yield
    shown.by_id("pause").click()


# --- what is shown --------------------------------------------------------------------------------


def test_it_shows_what_the_metrics_say(shown: Page) -> None:
    """The feed does 500 events/s: 491 scored, 2 to 22 ms evenly, 13.1 µs each in the steps."""
    assert shown.browser.title == "Card-fraud scoring"
    shown.until(lambda: shown.text("rate-in") == "500")
    assert shown.text("rate-out") == "491/s"
    assert float(shown.text("p50").removesuffix(" ms")) == pytest.approx(12, rel=0.02)
    # 34 of the 35 % in the bucket from 15 to 25 ms, taken as even, as Prometheus does
    assert float(shown.text("p99")) == pytest.approx(15 + 10 * 34 / 35, abs=0.1)
    assert shown.text("p99-unit") == "ms"
    assert shown.text("stages-sum") == "13.1"
    assert shown.text("busy") == "37%"
    assert shown.text("level-name") == "0 · normal"
    assert "model 7ea6cf0dcc58 · exactly once" in shown.text("about")
    assert "The brokers answer." in shown.text("health")
    assert ", 0 of them still under way." in shown.text("account")
    outcome = shown.text("mix-outcome")
    for word in ("scored", "reports applied", "duplicates", "dead-lettered", "shed"):
        assert word in outcome
    assert shown.console() == []


def test_it_lives(shown: Page) -> None:
    code = "return document.querySelector('#mix-outcome tbody td:last-child').textContent"
    before = shown.js(code)
    shown.until(lambda: shown.js(code) != before)
    line = "return document.querySelector('#spark-rate .line').getAttribute('d')"
    before = shown.js(line)
    shown.until(lambda: shown.js(line) != before)
    assert shown.console() == []


def test_it_fetches_from_its_own_server_only(shown: Page) -> None:
    code = "return performance.getEntriesByType('resource').map((r) => r.name)"
    fetched = shown.js(code)
    assert any(name.endswith("/static/series.js") for name in fetched)
    assert [name for name in fetched if not name.startswith(f"{shown.server.url}/")] == []


def test_what_is_not_known_is_said(browser: Chrome) -> None:
    feed = Feed()
    feed.other = {name.removeprefix("scoring_"): [] for name in samples(1) if "scoring" in name}
    feed.checks = []
    with serve(page(feed.status, feed.recent), "127.0.0.1", 0) as server:
        shown = Page(browser, server, feed)
        browser.get(server.url)
        shown.until(lambda: "Nothing has been flagged" in shown.text("none"))
        shown.until(lambda: "No events in the last 10 seconds" in shown.text("stages"))
        assert shown.text("p99") == shown.text("lag") == shown.text("busy") == "–"
        assert shown.text("level-name") == "not known"
        assert shown.text("health") == "Nothing is known yet."
        assert not shown.visible("list")
        assert shown.console() == []
        browser.get("about:blank")


@pytest.mark.parametrize(
    ("policy", "mode", "words"),
    [
        ("block", "shed", "0 · catching up"),
        ("degrade", "rule", "0 · catching up, or past the deadline"),
    ],
)
def test_short_answers_at_level_0_are_not_normal(
    shown: Page, policy: str, mode: str, words: str
) -> None:
    shown.until(lambda: shown.text("level-name") == "0 · normal")

    class Growing(list[Any]):
        """As many events as seconds, of each mode."""

        def __iter__(self) -> Iterator[Any]:
            n = shown.feed.seconds
            return iter([({"score_mode": "full"}, n), ({"score_mode": mode}, n)])

    flow = [({"delivery": "at_least_once", "overload_policy": policy}, 1)]
    shown.feed.other = {"predictions_total": Growing(), "flow_info": flow}
    shown.until(lambda: shown.text("level-name") == words)
    assert shown.by_id("level").get_attribute("data-state") == "warn"
    # At another level it is that one's doing.
    shown.feed.other |= {"overload_level": [({}, 1)]}
    shown.until(lambda: shown.text("level-name") == "1 · 1 in 2 scored in full")
    # Afterwards, what was answered before the level fell is not held against it.
    shown.feed.other = {"predictions_total": [({"score_mode": mode}, 10_000)]}
    shown.js(
        "window.seen = []; new MutationObserver(() => window.seen.push("
        "document.getElementById('level-name').textContent))"
        ".observe(document.getElementById('level'), {subtree: true, childList: true,"
        " characterData: true})"
    )
    shown.until(lambda: shown.text("level-name") == "0 · normal")
    assert set(shown.js("return window.seen")) == {"0 · normal"}


def test_trouble_is_shown_and_spoken(shown: Page) -> None:
    shown.until(lambda: shown.text("level-name") == "0 · normal")
    shown.feed.other = {
        "overload_level": [({}, 2)],
        "brokers_reachable": [({}, 0)],
    }
    shown.until(lambda: shown.text("level-name") == "2 · 1 in 4 scored in full")
    assert shown.text("health").startswith("!Brokersnot well. No broker answers")
    assert shown.by_id("level").get_attribute("data-state") == "warn"
    shown.until(lambda: "Brokers" in shown.text("announce") or "Overload" in shown.text("announce"))


def test_a_restart_shows_no_negative_rates(shown: Page) -> None:
    shown.until(lambda: shown.text("rate-in") == "500")
    shown.feed.restart()
    shown.js(
        "window.seen = []; new MutationObserver(() => window.seen.push("
        "document.getElementById('rate-in').textContent))"
        ".observe(document.getElementById('main'), {subtree: true, childList: true,"
        " characterData: true})"
    )
    until = shown.feed.seconds + 4
    shown.until(lambda: shown.feed.seconds >= until)
    assert "up for 3 s" in shown.text("about") or "up for 4 s" in shown.text("about")
    assert set(shown.js("return window.seen")) == {"500"}


@pytest.mark.parametrize("held", [False, True])
def test_after_a_restart_the_list_is_the_new_process_s(
    browser: Chrome, feed: Feed, held: bool
) -> None:
    """Which may have flagged fewer, or by chance as many: numbers of two lives do not compare."""
    with serve(page(feed.status, feed.recent), "127.0.0.1", 0) as server:
        shown = Page(browser, server, feed)
        shown.open()
        if held:
            shown.js("document.querySelector('#rows button').focus()")
    shown.until(lambda: shown.visible("stale"))
    feed.restart()
    feed.flag(*[{}] * 136, {"transaction_id": "fresh fraud"})
    with serve(page(feed.status, feed.recent), "127.0.0.1", server.port):
        if held:
            shown.until(lambda: shown.visible("newer"))
            assert shown.newest == "T000136"
            shown.by_id("newer").click()
        shown.until(lambda: shown.newest == "fresh fraud")
        feed.flag({"transaction_id": "and on it goes"})
        shown.js("document.activeElement.blur()")
        shown.until(lambda: shown.newest == "and on it goes")
        browser.get("about:blank")


@pytest.mark.parametrize("seed", range(4))
def test_percentiles_are_those_of_prometheus(shown: Page, seed: int) -> None:
    """Against a plain reading of its documentation: linear within the bucket of the rank."""
    rng = np.random.default_rng(seed)
    then = np.cumsum(rng.integers(0, 50, len(BOUNDS) + 1) * rng.integers(0, 2, len(BOUNDS) + 1))
    counts = rng.integers(0, 50, len(BOUNDS) + 1) * rng.integers(0, 2, len(BOUNDS) + 1)
    now = then + np.cumsum(counts)
    lows, highs = (0, *BOUNDS), (*BOUNDS, np.inf)
    expected: dict[float, float | None] = {}
    for q in (0.01, 0.5, 0.95, 0.99, 0.999, 1.0):
        rank = q * counts.sum()
        seen = 0
        for low, high, n in zip(lows, highs, counts.tolist(), strict=True):
            if n and seen + n >= rank:
                share = (rank - seen) / n
                expected[q] = np.inf if np.isinf(high) else low + (high - low) * share
                break
            seen += n
    code = """
      const [now, then, qs, done] = arguments;
      import("/static/series.js").then(({percentile}) =>
        done(qs.map((q) => percentile(now, then, q)).map((x) => x === Infinity ? "inf" : x)));
    """
    readings = [{"bounds_s": BOUNDS, "cumulative": c.tolist()} for c in (now, then)]
    got = shown.browser.execute_async_script(code, *readings, list(expected))
    assert [float(x) for x in got] == pytest.approx(list(expected.values()))


def test_when_the_flow_goes_the_page_says_since_when(browser: Chrome, feed: Feed) -> None:
    app = page(feed.status, feed.recent)
    with serve(app, "127.0.0.1", 0) as server:
        shown = Page(browser, server, feed)
        shown.open()
        assert not shown.visible("stale")
    shown.until(lambda: shown.visible("stale"))
    assert shown.text("stale-what") == "The flow does not answer."
    assert shown.by_id("stale-what").get_attribute("role") == "alert"
    shown.until(lambda: "It has been silent for" in shown.text("stale-since"))
    assert "what you see is from" in shown.text("stale-since")
    assert shown.text("pulse-text") == "no answer"
    with serve(app, "127.0.0.1", server.port):
        shown.until(lambda: not shown.visible("stale"))
        assert shown.text("announce") == "The flow answers again."
        browser.get("about:blank")


def test_pause_freezes_the_page(shown: Page) -> None:
    pause = shown.by_id("pause")
    pause.click()
    assert pause.get_attribute("aria-pressed") == "true"
    assert "paused at" in shown.text("pulse-text")
    before = shown.feed.seconds, shown.text("main")
    shown.until(_passes(3.0))
    assert (shown.feed.seconds, shown.text("main")) == before
    pause.click()
    assert pause.get_attribute("aria-pressed") == "false"
    shown.until(lambda: shown.feed.seconds > before[0])
    assert shown.text("pulse-text") == "live"


def _passes(seconds: float) -> Callable[[], bool]:
    """Return a condition that holds after some seconds; what must not happen has no event."""
    import time

    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


# --- the flagged transactions ---------------------------------------------------------------------


def test_the_newest_come_first_and_by_themselves(shown: Page) -> None:
    assert shown.newest == "T000136"
    assert len(shown.column("tx")) == 50
    assert shown.text("count") == "50 shown, of 137 flagged since the start."
    shown.feed.flag({"transaction_id": "brand new"})
    shown.until(lambda: shown.newest == "brand new")


def test_more_are_shown_on_demand(shown: Page) -> None:
    shown.by_id("more").click()
    shown.until(lambda: len(shown.column("tx")) == 100)
    assert shown.focused() == shown.column("tx")[50]
    shown.by_id("more").click()
    shown.until(lambda: len(shown.column("tx")) == 137)
    assert not shown.visible("more")


def test_the_list_is_held_while_somebody_is_in_it(shown: Page) -> None:
    shown.js("document.querySelector('#rows button').focus()")
    shown.feed.flag({"transaction_id": "newer one"}, {"transaction_id": "newer two"})
    shown.until(lambda: shown.visible("newer"))
    assert shown.text("newer") == "Show 2 newer"
    assert shown.newest == "T000136"
    shown.by_id("newer").click()
    assert shown.newest == shown.focused() == "newer two"


def test_filters_narrow_the_list(shown: Page) -> None:
    shown.feed.flag(
        {"card_id": "C77", "terminal_id": "Q1", "decision": 2},
        {"card_id": "C777", "terminal_id": "Q2", "decision": 1},
    )
    shown.filter(card="C77")
    shown.until(lambda: shown.column("card") == ["C777", "C77"])
    assert shown.text("count") == "2 of 139 match."
    assert shown.text("announce") == "2 flagged transactions match."
    shown.filter(card='"C77"')
    shown.until(lambda: shown.column("card") == ["C77"])
    shown.browser.find_element(By.CSS_SELECTOR, "#filter button[type=reset]").click()
    shown.until(lambda: len(shown.column("card")) == 50)
    shown.filter(terminal="Q")
    shown.until(lambda: shown.column("terminal") == ["Q2", "Q1"])
    shown.filter(decision="block")
    shown.until(lambda: shown.column("terminal") == ["Q1"])
    shown.filter(card="nobody")
    shown.until(lambda: not shown.visible("list"))
    assert "None of the transactions that are kept here matches" in shown.text("none")


IN_RECORD = """
  const focused = document.activeElement;
  return focused === document.body || focused.closest("#record") !== null;
"""


def test_with_the_keyboard_alone(shown: Page) -> None:
    """Tab to a flagged row, Enter opens the record, Escape closes it, the focus is back."""
    seen = []
    for _ in range(30):
        shown.press(Keys.TAB)
        seen.append(shown.focused())
        if seen[-1] in shown.column("tx"):
            break
    assert seen[0] == "Skip to the flagged transactions"
    assert "pause" in seen
    chosen = seen[-1]
    assert chosen == shown.newest
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert shown.js(outline) == "solid"
    shown.press(Keys.ENTER)
    shown.until(lambda: shown.visible("record"))
    assert shown.js("return document.getElementById('record').contains(document.activeElement)")
    assert shown.text("record-title") == f"Transaction {chosen}"
    for _ in range(8):  # the focus does not leave the record for the page behind it
        shown.press(Keys.TAB)
        assert shown.js(IN_RECORD), shown.focused()
    shown.press(Keys.ESCAPE)
    shown.until(lambda: not shown.visible("record"))
    assert shown.focused() == chosen


def test_the_skip_link_leads_to_the_list(shown: Page) -> None:
    shown.press(Keys.TAB, Keys.ENTER)
    shown.until(lambda: shown.focused() == "flagged")
    for _ in range(5):
        shown.press(Keys.TAB)
    assert shown.newest == shown.focused()


def test_a_record_is_shown_whole(shown: Page) -> None:
    shown.feed.flag(
        {
            "transaction_id": "T-whole",
            "card_id": "C5",
            "score": 0.8765,
            "decision": 2,
            "score_mode": 0,
            "amount": 12_345,
            "contributions": [0.61, 0.2, -0.05],
        }
    )
    shown.until(lambda: shown.newest == "T-whole")
    shown.by_id("rows").find_element(By.TAG_NAME, "button").click()
    body = shown.text("record-body")
    (record,) = shown.feed.recent.find(limit=1).flagged
    assert "Score 0.877." in body
    assert "Answered by the model." in body
    assert "terminal risk, 7 days is" in body
    assert "raises the score by 0.61" in body
    assert "lowers the score by 0.05" in body
    assert "123.45" in body
    assert f"{record.topic}, partition {record.partition}, offset {record.offset}" in body
    for name in (*record.features, record.model_version, record.schema_hash, "C5"):
        assert name in body
    utc = "return document.querySelector('#record-body time').title"
    assert shown.js(utc).endswith(" UTC")
    link = shown.by_id("record-body").find_element(By.LINK_TEXT, "This record as JSON")
    assert str(link.get_attribute("href")).endswith("/api/record?id=T-whole")


def test_from_a_record_to_all_of_its_card(shown: Page) -> None:
    shown.feed.flag({"card_id": "C1x"}, {"card_id": "C1xx"}, {"card_id": "C1x"})
    shown.until(lambda: shown.newest == "T000139")
    shown.by_id("rows").find_element(By.TAG_NAME, "button").click()
    shown.by_id("record-body").find_element(By.CSS_SELECTOR, "dd button").click()
    shown.until(lambda: shown.column("card") == ["C1x", "C1x"])
    assert not shown.visible("record")


def test_the_mouse_opens_a_row_and_closes_beside_it(shown: Page) -> None:
    shown.by_id("rows").find_element(By.CSS_SELECTOR, "tr:nth-child(2) .why").click()
    shown.until(lambda: shown.visible("record"))
    assert shown.text("record-title") == "Transaction T000135"
    ActionChains(shown.browser).move_by_offset(5, 5).click().perform()
    shown.until(lambda: not shown.visible("record"))


HOSTILE = "<script>window.hit=1</script>"
IMAGE = '<img src=x onerror="window.hit=2">'


def test_what_comes_from_outside_stays_text(shown: Page) -> None:
    shown.feed.flag(
        {"transaction_id": IMAGE, "card_id": HOSTILE, "terminal_id": "'\"><b>&amp;", "decision": 2}
    )
    shown.feed.other = {"dead_letters_total": [({"topic": "t", "reason": HOSTILE}, 1)]}
    shown.until(lambda: shown.newest == IMAGE)
    assert shown.column("card")[0] == HOSTILE
    shown.by_id("rows").find_element(By.TAG_NAME, "button").click()
    assert HOSTILE in shown.text("record-body")
    shown.until(lambda: HOSTILE in shown.text("account"))
    assert shown.js("return window.hit ?? null") is None
    assert (
        shown.js("return document.querySelectorAll('main script, main img, dialog img').length")
        == 0
    )
    shown.browser.find_element(By.CSS_SELECTOR, "#record-body dd button").click()
    shown.until(lambda: shown.column("card") == [HOSTILE])
    assert shown.console() == []


# --- signing in -----------------------------------------------------------------------------------


def test_signing_in_and_out(browser: Chrome, feed: Feed) -> None:
    token = "a token of some length"
    with serve(page(feed.status, feed.recent, token), "127.0.0.1", 0) as server:
        shown = Page(browser, server, feed)
        browser.get(server.url)
        assert browser.current_url.endswith("/login")
        assert shown.focused() == "token"
        violations(browser)
        shown.press("wrong", Keys.ENTER)
        shown.until(lambda: "This is not the token." in browser.page_source)
        assert violations(browser) == []
        shown.press(token, Keys.ENTER)
        shown.until(lambda: browser.current_url == f"{server.url}/")
        shown.until(lambda: shown.text("rate-in") not in ("", "–"))
        browser.find_element(By.CSS_SELECTOR, "form[action='/logout'] button").click()
        shown.until(lambda: browser.current_url.endswith("/login"))
        browser.get(server.url)
        assert browser.current_url.endswith("/login")
        browser.get("about:blank")


def test_a_session_that_ends_leads_to_the_login(browser: Chrome, feed: Feed) -> None:
    token = "a token of some length"
    with serve(page(feed.status, feed.recent, token), "127.0.0.1", 0) as server:
        shown = Page(browser, server, feed)
        browser.get(server.url)
        shown.press(token, Keys.ENTER)
        shown.until(lambda: browser.current_url == f"{server.url}/")
        browser.delete_all_cookies()
        shown.until(lambda: browser.current_url.endswith("/login"))
        browser.get("about:blank")


# --- for everybody --------------------------------------------------------------------------------


def violations(browser: Chrome) -> list[str]:
    """Return what axe-core finds wrong: WCAG 2.1 A and AA, and its best practices."""
    from axe_core_python.selenium import Axe  # type: ignore[import-untyped]

    found = Axe().run(browser)
    assert len(found["passes"]) > 10  # it did look
    return [
        f"{violation['id']}: {node['html']} ({node.get('failureSummary')})"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]


@pytest.mark.parametrize("feed", [9], indirect=True)  # axe takes its time
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing_and_nothing_is_cut_off(
    shown: Page, tmp_path: Path, size: str, scheme: str
) -> None:
    width, height = SIZES[size]
    look(shown.browser, width, height, scheme)
    background = "return getComputedStyle(document.body).backgroundColor"
    shade = max(msgspec.json.decode(f"[{shown.js(background)[4:-1]}]"))
    assert (shade < 60) == (scheme == "dark")
    shown.until(lambda: shown.text("rate-in") == "500")
    shown.js("document.getElementById('partitions').open = true")
    with no_wait(shown):
        shown.shot(tmp_path / f"{size}-{scheme}.png")
        assert violations(shown.browser) == []
        assert shown.js("return document.documentElement.scrollWidth") <= width
        shown.by_id("rows").find_element(By.TAG_NAME, "button").click()
        shown.shot(tmp_path / f"{size}-{scheme}-record.png", whole=False)
        assert violations(shown.browser) == []
        box = "return document.getElementById('record').getBoundingClientRect()"
        left, right = (shown.js(box)[side] for side in ("left", "right"))
        assert left >= 0
        assert right <= width
        shown.press(Keys.ESCAPE)
    shown.feed.other = {"overload_level": [({}, 3)], "brokers_reachable": [({}, 0)]}
    shown.until(lambda: shown.by_id("level").get_attribute("data-state") == "bad")
    shown.server.close()
    shown.until(lambda: shown.visible("stale"))
    shown.shot(tmp_path / f"{size}-{scheme}-trouble.png")
    assert violations(shown.browser) == []


SMALL = """
  const targets = document.querySelectorAll("button, input, select, summary, .list a");
  return [...targets]
    .filter((e) => e.checkVisibility())
    .map((e) => [e.id || e.textContent, e.getBoundingClientRect()])
    .filter(([, box]) => box.width < 24 || box.height < 24)
    .map(([name]) => name);
"""


@pytest.mark.parametrize("size", SIZES)
def test_what_is_pressed_is_large_enough(shown: Page, size: str) -> None:
    """24 by 24 pixels: WCAG 2.2, 2.5.8."""
    look(shown.browser, *SIZES[size])
    shown.by_id("rows").find_element(By.TAG_NAME, "button").click()
    assert shown.js(SMALL) == []


def test_a_screen_reader_finds_tables_headings_and_names(shown: Page) -> None:
    """In the browser's own accessibility tree; on a phone rows look like cards but are rows."""
    for width in (1280, 360):
        look(shown.browser, width)
        shown.until(_passes(0.3))
        tree = shown.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        found: dict[str, list[str]] = {}
        for node in tree:
            if not node.get("ignored"):
                role = node["role"]["value"]
                found.setdefault(role, []).append(node.get("name", {}).get("value", ""))
        assert "Card-fraud scoring" in found["heading"]
        assert any(name.startswith("Latest flagged transactions") for name in found["table"])
        assert len(found["row"]) >= 51
        assert found["columnheader"].count("because of") == 1
        assert "Card" in found["searchbox"]
        assert "Pause" in found["button"]
        assert {"main", "banner", "contentinfo", "search", "status"} <= found.keys()
        assert not [name for name in found["button"] if not name]


@pytest.mark.parametrize("feed", [3], indirect=True)
@pytest.mark.parametrize("width", [1280, 400])
def test_ids_are_not_broken(shown: Page, width: int) -> None:
    ids = ("transaction", "card12345678", "terminal1234")
    names = ("transaction_id", "card_id", "terminal_id")
    shown.feed.flag(dict(zip(names, ids, strict=True)))
    look(shown.browser, width)
    shown.open()
    lines = shown.browser.execute_script(
        "return [...document.querySelectorAll('.list code, .list .link')]"
        ".map((id) => [id.textContent, id.getClientRects().length, id.offsetHeight,"
        " parseFloat(getComputedStyle(id).lineHeight)])"
    )
    found = {text: height < 2 * line for text, rects, height, line in lines if rects == 1}
    assert [found.get(each) for each in ids] == [True] * 3, lines
