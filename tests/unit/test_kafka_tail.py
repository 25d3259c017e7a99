"""Nothing is published twice, wherever lives end, and nothing is kept for ever."""

from collections import Counter
from itertools import chain
from typing import TypeAlias

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflows.kafka.tail import Published

#: An event id, a key and an origin.
Record: TypeAlias = tuple[bytes, bytes | None, bytes]

#: Few, so that they meet again.
RECORDS = st.tuples(
    st.sampled_from([b"tx1", b"tx2"]),
    st.sampled_from([b"C1", None]),
    st.sampled_from([b"", b"in/0/0", b"in/0/1", b"in/1/0", b"in/1/1"]),
)
#: Events of two input partitions, in order: their ids, some of which repeat.
INPUTS = st.tuples(*(st.lists(st.integers(0, 12), max_size=25) for _ in range(2)))


class Flow:
    """The recovery store and one output partition of a flow that may be killed at any time."""

    def __init__(self, inputs: tuple[list[int], ...]) -> None:
        self.inputs = inputs
        self.output: list[tuple[bytes, bytes]] = []  # event id, origin
        self.stored = ([0] * len(inputs), 0, b"")  # offsets, end of the output, pending

    def live(self, data: st.DataObject, epochs: int, *, killed: bool) -> None:
        """Live for some epochs; if killed, in the middle or at the end of one more."""
        offsets, start, pending = list(self.stored[0]), *self.stored[1:]
        published = Published()
        published.unpack(pending)
        for event_id, origin in self.output[start:]:
            published.add(event_id, None, origin)
        for epoch in range(epochs + killed):
            for _ in range(data.draw(st.integers(0 if killed else 8, 12))):
                lanes = [n for n, lane in enumerate(self.inputs) if offsets[n] < len(lane)]
                if not lanes:
                    break
                lane = data.draw(st.sampled_from(lanes))
                event_id = b"%d" % self.inputs[lane][offsets[lane]]
                origin = b"in/%d/%d" % (lane, offsets[lane])
                offsets[lane] += 1
                if not published.take(event_id, None, origin):
                    self.output.append((event_id, origin))
            if epoch < epochs:
                published.forget_passed()
                self.stored = (list(offsets), len(self.output), published.pack())


@settings(deadline=None)
@given(INPUTS, st.lists(st.integers(0, 3), max_size=6), st.data())
def test_every_event_is_published_once_whatever_is_killed(
    inputs: tuple[list[int], ...], lives: list[int], data: st.DataObject
) -> None:
    flow = Flow(inputs)
    for epochs in lives:
        flow.live(data, epochs, killed=True)
    flow.live(data, 7, killed=False)
    assert flow.stored[0] == [len(lane) for lane in inputs]
    assert Counter(flow.output) == Counter(
        (b"%d" % event, b"in/%d/%d" % (lane, offset))
        for lane, events in enumerate(inputs)
        for offset, event in enumerate(events)
    )
    assert flow.stored[2] == b""


def test_what_was_published_for_inputs_that_are_gone_is_forgotten() -> None:
    published = Published()
    for n in range(1000):
        published.add(b"old%d" % n, None, b"in/%d/%d" % (n % 2, n))
    # The new life begins behind them, for instance at the end of the topic.
    assert not published.take(b"new", None, b"in/0/5000")
    published.forget_passed()
    assert len(published) == 500  # of the other partition nothing has come yet
    assert not published.take(b"new too", None, b"in/1/5001")
    published.forget_passed()
    assert published.pack() == b""


def test_ids_without_an_origin_are_kept() -> None:
    published = Published()
    published.add(b"tx1", b"C1", b"")
    published.take(b"tx2", None, b"in/0/9")
    published.forget_passed()
    again = Published()
    again.unpack(published.pack())
    assert again.take(b"tx1", b"C1", b"in/0/10")
    assert len(again) == 0


def test_either_copy_may_come_again_but_no_other_cards_event() -> None:
    published = Published(either_copy=True)
    published.add(b"tx1", b"C1", b"in/0/7")
    assert not published.take(b"tx1", b"C2", b"in/1/2")
    assert published.take(b"tx1", b"C1", b"in/0/9")


class Naive:
    """`Published` as its docstring has it: a list of records, searched from its beginning."""

    def __init__(self, either_copy: bool) -> None:
        self.either_copy = either_copy
        self.records: list[Record] = []
        self.passed: dict[bytes, int] = {}

    def add(self, event_id: bytes, key: bytes | None, origin: bytes) -> None:
        # Equal ones stand together: the order is that of their origins.
        equal = [n for n, each in enumerate(self.records, 1) if each == (event_id, key, origin)]
        self.records.insert(max(equal, default=len(self.records)), (event_id, key, origin))

    def take(self, event_id: bytes, key: bytes | None, origin: bytes) -> bool:
        if origin:
            partition, offset = origin.rsplit(b"/", 1)
            self.passed[partition] = max(self.passed.get(partition, -1), int(offset))
        named = [each for each in self.records if each[:2] == (event_id, key)]
        equal = [each for each in named if each[2] == origin]
        other = [each for each in named if self.either_copy or not origin or not each[2]]
        for found in (equal + other)[:1]:
            self.records.remove(found)
        return bool(equal or other)

    def forget_passed(self) -> None:
        self.records = [each for each in self.records if not self.has_passed(each[2])]

    def has_passed(self, origin: bytes) -> bool:
        partition, _, offset = origin.rpartition(b"/")
        return bool(origin) and int(offset) <= self.passed.get(partition, -1)


def origins_in(packed: bytes) -> Counter[bytes]:
    """Read a store's format: the origins of each name."""
    return Counter(chain.from_iterable(msgspec.msgpack.decode(packed or b"\x80").values()))


@settings(deadline=None)
@given(
    st.booleans(),
    st.lists(RECORDS, min_size=8, max_size=30),
    st.lists(RECORDS | st.sampled_from(["epoch", "restart"]), min_size=8, max_size=30),
)
def test_what_is_known_and_taken_is_what_a_list_would_tell(
    either_copy: bool,
    records: list[Record],
    events: list[Record | str],
) -> None:
    published, naive = Published(either_copy=either_copy), Naive(either_copy)
    for record in records:
        published.add(*record)
        naive.add(*record)
    for event in events:
        if isinstance(event, tuple):
            assert published.take(*event) == naive.take(*event)
        elif event == "epoch":
            published.forget_passed()
            naive.forget_passed()
        else:
            packed = published.pack()
            published, naive.passed = Published(either_copy=either_copy), {}
            published.unpack(packed)
        assert origins_in(published.pack()) == Counter(origin for *_, origin in naive.records)
        assert len(published) == len(naive.records)
        assert published.moved(0, 2) + published.moved(1, 2) == len(naive.records)
