"""Rows leave in stream-time order, each exactly once, whatever the reads look like."""

from dataclasses import dataclass

import numpy as np
from confluent_kafka import Message
from hypothesis import given
from hypothesis import strategies as st

from dataflows.kafka.interleave import NO_TIME, Interleaver

Interleaver([(0, 0)], [0])  # compiles: no example is to wait for it

Row = tuple[int, int, int]  # (stream time or NO_TIME, lane, offset)


@dataclass
class Plan:
    """What the lanes hold, and how it is read: per step a read of some lanes, then takes."""

    lanes: list[list[int]]
    reads: list[list[int]]
    limits: list[int]


@st.composite
def plans(draw: st.DrawFn, *, with_gaps: bool) -> Plan:
    time = st.integers(0, 12)
    if with_gaps:
        time = st.one_of(time, st.just(NO_TIME))
    lanes = draw(st.lists(st.lists(time, max_size=25), min_size=1, max_size=5))
    if not with_gaps:
        lanes = [sorted(lane) for lane in lanes]
    reads = draw(
        st.lists(
            st.lists(st.integers(0, len(lanes) - 1), min_size=1, max_size=12),
            max_size=12,
        )
    )
    limits = draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    return Plan(lanes, reads, limits)


def run(plan: Plan, *, holding: bool) -> tuple[list[Row], Interleaver]:
    """Read and take as planned, then read the rest; return the rows in the order they left."""
    merge = Interleaver([(0, lane) for lane in range(len(plan.lanes))], [0] * len(plan.lanes))
    read = [0] * len(plan.lanes)
    out: list[Row] = []
    every_row = [lane for lane, times in enumerate(plan.lanes) for _ in times]
    steps = [*plan.reads, every_row]
    for step, wanted in enumerate(steps):
        rows: list[Row] = []
        for lane in wanted:
            if read[lane] < len(plan.lanes[lane]):
                rows.append((plan.lanes[lane][read[lane]], lane, read[lane]))
                read[lane] += 1
        merge.push(
            [Message(offset=offset) for _, _, offset in rows],
            np.array([lane for _, lane, _ in rows], dtype=np.intp),
            np.array([offset for _, _, offset in rows], dtype=np.int64),
            np.zeros(len(rows), dtype=np.int64),
            np.array([time for time, _, _ in rows], dtype=np.int64),
        )
        assert merge.received.tolist() == read
        held = [
            lane for lane, times in enumerate(plan.lanes) if holding and read[lane] < len(times)
        ]
        last = step == len(steps) - 1
        while True:
            limit = plan.limits[len(out) % len(plan.limits)]
            merge.release(limit, merge.bound(held))
            records = merge.take(limit)
            if records is None:
                break
            assert 1 <= len(records) <= limit
            assert [message.offset() for message in records.messages] == records.offset.tolist()
            out += zip(
                records.stream_time.tolist(),
                records.partition.tolist(),
                records.offset.tolist(),
                strict=True,
            )
            for lane in range(len(plan.lanes)):
                after = [offset + 1 for _, other, offset in out if other == lane]
                assert merge.emitted[lane] == max(after, default=0)
            if not last and step % 2:
                break  # leave some ready for the next step
    return out, merge


@given(plans(with_gaps=False))
def test_rows_leave_sorted_by_time_then_lane_then_offset(plan: Plan) -> None:
    out, merge = run(plan, holding=True)
    rows = [
        (time, lane, offset)
        for lane, times in enumerate(plan.lanes)
        for offset, time in enumerate(times)
    ]
    assert out == sorted(rows)
    assert merge.buffered == 0


@given(plans(with_gaps=True), st.booleans())
def test_each_lane_leaves_whole_and_in_its_own_order(plan: Plan, holding: bool) -> None:
    out, merge = run(plan, holding=holding)
    for lane, times in enumerate(plan.lanes):
        mine = [(time, offset) for time, other, offset in out if other == lane]
        latest, expected = NO_TIME, []
        for offset, time in enumerate(times):
            latest = max(latest, time)
            expected.append((latest, offset))
        assert mine == expected
    assert merge.buffered == 0


def push(merge: Interleaver, lane: int, offsets: list[int], times: list[int]) -> None:
    merge.push(
        [Message(offset=offset) for offset in offsets],
        np.full(len(offsets), lane, dtype=np.intp),
        np.array(offsets, dtype=np.int64),
        np.zeros(len(offsets), dtype=np.int64),
        np.array(times, dtype=np.int64),
    )


def test_nothing_passes_a_lane_that_may_have_earlier_rows() -> None:
    merge = Interleaver([(0, 0), (1, 0)], [0, 0])
    push(merge, 1, [0, 1, 2], [10, 20, 30])
    assert not merge.release(10, merge.bound([0]))
    assert merge.take(10) is None
    push(merge, 0, [0], [20])
    merge.release(10, merge.bound([0]))
    first = merge.take(10)
    assert first is not None
    # At 20, lane 0 goes before lane 1, and may have another row at 20.
    assert first.stream_time.tolist() == [10, 20]
    assert first.source.tolist() == [1, 0]
    merge.release(10, None)
    rest = merge.take(10)
    assert rest is not None
    assert rest.stream_time.tolist() == [20, 30]


def test_a_row_delivered_twice_is_pushed_once() -> None:
    merge = Interleaver([(0, 0)], [5])
    push(merge, 0, [5, 6, 7], [1, 2, 3])
    push(merge, 0, [6, 7, 8], [2, 3, 4])
    push(merge, 0, [7], [3])
    merge.release(10, None)
    records = merge.take(10)
    assert records is not None
    assert records.offset.tolist() == [5, 6, 7, 8]
    assert merge.emitted.tolist() == [9]
