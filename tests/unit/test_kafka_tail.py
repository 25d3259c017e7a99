"""Nothing is published twice, wherever lives end, and nothing is kept for ever."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from dataflows.kafka.tail import Published

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
