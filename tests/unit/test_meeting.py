"""Processes that share no directory meet: all hear what all have found, of these lives."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from dataflows.kafka import meeting as module
from dataflows.kafka.meeting import Meeting
from dataflows.kafka.meeting import _Outcome as Outcome
from dataflows.kafka.peers import Peers, PeersError
from dataflows.serve import ServeError
from tests.kafka.client import await_that

#: Starts process n of so many, with what it has found.
Come = Callable[..., Meeting]


@pytest.fixture
def come(monkeypatch: pytest.MonkeyPatch) -> Iterator[Come]:
    monkeypatch.setattr(module, "_ASK_EVERY_S", 0.01)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    came: list[Meeting] = []

    def come(
        process: int,
        found: bytes,
        processes: int = 3,
        orphaned: Callable[[str], None] = pytest.fail,
    ) -> Meeting:
        addresses = [(f"127.0.0.{n + 1}", port) for n in range(processes)]
        came.append(Meeting(addresses, process, found, orphaned))
        return came[-1]

    yield come
    for each in came:
        each.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_all_hear_what_all_have_found(
    come: Come, pool: ThreadPoolExecutor, order: tuple[int, ...]
) -> None:
    """In whichever order they come; nobody goes on before the last one is there."""
    waiting: list[Future[list[bytes]]] = []
    for number in order:
        assert not any(each.done() for each in waiting)
        waiting.append(pool.submit(come(number, b'"%d"' % number).meet))
        time.sleep(0.05)
    for each in waiting:
        assert each.result(10) == [b'"0"', b'"1"', b'"2"']


def test_the_own_name_may_be_published_late(come: Come, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a pod is, a while after its start."""
    monkeypatch.setattr(module, "_NAME_EVERY_S", 0.01)
    look_up, unknown = socket.getaddrinfo, 3

    def later(host: str, *more: object, **named: object) -> object:
        nonlocal unknown
        if host == "127.0.0.1" and unknown:
            unknown -= 1
            raise socket.gaierror(-2, "Name or service not known")
        return look_up(host, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", later)
    one = come(0, b"0", 1)
    assert one.meet() == [b"0"]
    monkeypatch.setattr(module, "_NAME_WITHIN_S", 0.05)
    unknown = 1_000_000
    with pytest.raises(ServeError, match="Name or service not known"):
        come(0, b"0", 1)


def test_what_a_process_found_that_has_died_since_is_not_gone_by(
    come: Come, pool: ThreadPoolExecutor
) -> None:
    first = come(0, b'"old"')
    others = [come(n, b'"%d"' % n) for n in (1, 2)]
    # Process 1 has heard of the first life of process 0, which dies before process 2 has.
    assert others[0]._ask(0) is Outcome.HEARD
    first.close()
    again = come(0, b'"new"')
    results = [pool.submit(each.meet) for each in (again, *others)]
    assert [each.result(10) for each in results] == [[b'"new"', b'"1"', b'"2"']] * 3


def test_who_has_agreed_hears_that_its_cluster_is_no_more(
    come: Come, pool: ThreadPoolExecutor
) -> None:
    ended: list[str] = []
    pair = [come(n, b"1", 2, ended.append) for n in range(2)]
    for each in [pool.submit(each.meet) for each in pair]:
        each.result(10)
    assert ended == []
    pair[1].close()
    restarted = come(1, b"2", 2)
    assert (
        restarted._ask(0) is Outcome.GONE
    )  # of the cluster before: it does not answer for the new one
    assert len(ended) == 1 and "process 1 of the cluster has been started again" in ended[0]


def test_clusters_of_other_sizes_are_not_mixed(
    come: Come, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    small, large = come(0, b"1", 2), come(1, b"1", 3)
    assert large._ask(0) is small._ask(1) is Outcome.GONE
    assert "give all the same addresses" in caplog.text


def test_a_statement_is_read_by_all_when_it_is_posted(come: Come, pool: ThreadPoolExecutor) -> None:
    boards = [come(n, b"1") for n in range(3)]
    for each in [pool.submit(each.meet) for each in boards]:
        each.result(10)
    assert [board.read(0) for board in boards[1:]] == [None, None]
    for turn in range(200):
        boards[0].post(b"%d" % turn)
        assert [board.read(0) for board in boards[1:]] == [b"%d" % turn] * 2


def test_statements_stay_in_order_while_others_ask(come: Come, pool: ThreadPoolExecutor) -> None:
    """An answer given before a statement was posted may come after it."""
    one, other = come(0, b"1", 2), come(1, b"1", 2)
    for each in [pool.submit(each.meet) for each in (one, other)]:
        each.result(10)
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            other._ask(0)

    asking = [pool.submit(ask) for _ in range(4)]
    try:
        for turn in range(300):
            one.post(b"%d" % turn)
            assert other.read(0) == b"%d" % turn
    finally:
        ended.set()
    for each in asking:
        each.result(10)


def test_who_has_ended_is_missed_but_for_a_farewell(come: Come, pool: ThreadPoolExecutor) -> None:
    one, other = come(0, b"1", 2), come(1, b"1", 2)
    for each in [pool.submit(each.meet) for each in (one, other)]:
        each.result(10)
    other.post(b"last words")
    other.close()
    assert one.read(1) == b"last words"
    one.post(b"and mine", farewell=True)
    with pytest.raises(PeersError, match=r"process 1 .* does not answer at 127\.0\.0\.2"):
        one.post(b"anybody?")


def test_peers_drain_together_over_the_network(come: Come, pool: ThreadPoolExecutor) -> None:
    boards = [come(n, b"1") for n in range(3)]
    for each in [pool.submit(each.meet) for each in boards]:
        each.result(10)
    one, two, idle = (Peers(board, n, 3) for n, board in enumerate(boards))
    assert one.shared()
    one.reads("a")
    two.reads("b")
    assert one.last_epoch() is None
    drained = threading.Event()
    left = threading.Event()
    two.watch(drained.set, lambda: False, left.set)
    idle.watch(lambda: None, lambda: False, left.set)
    one.drains("a", 7)
    await_that(drained.is_set, "process 1 hears that process 0 drains", 10)
    two.drains("b", 8)
    assert one.last_epoch() == two.last_epoch() == 8
    one.stops("a")
    boards[0].close()
    assert not left.is_set()
    two.stops("b")
    boards[1].close()
    await_that(left.is_set, "the process without partitions leaves", 10)
