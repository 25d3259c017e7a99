"""The light worker of a cluster keeps its epochs in phase with the heavy one's."""

from collections.abc import Callable

import pytest

from dataflows.kafka.phase import PhaseKeeper

INTERVAL = 0.3


class Worker:
    """A Bytewax worker as `src/inputs.rs` runs its source, on a clock of its own."""

    def __init__(self, turn_s: float, keeper: Callable[["Worker"], PhaseKeeper | None]) -> None:
        self.turn_s = turn_s
        self.clock = 0.0
        self.epoch_started = 0.0
        self.batches = 0
        self.slept_s = 0.0
        self.keeper = keeper(self)

    def sleep(self, seconds: float) -> None:
        self.clock += seconds
        self.slept_s += seconds

    def run_epoch(self) -> float:
        """Call the source until the epoch is over; return when that was."""
        while True:
            now = self.clock  # the engine looks at the clock once, before it calls
            if self.keeper is not None:
                self.keeper.turn()
            self.clock += self.turn_s
            self.batches += 1
            if now - self.epoch_started >= INTERVAL:
                if self.keeper is not None:
                    self.keeper.snapshot()
                self.epoch_started = now
                return self.clock


def keeper(worker: Worker) -> PhaseKeeper:
    return PhaseKeeper(now=lambda: worker.clock, sleep=worker.sleep)


Keeper = Callable[[Worker], PhaseKeeper | None]


def run_cluster(
    light_keeper: Keeper, heavy_keeper: Keeper, epochs: int, *, stall_at: int | None = None
) -> tuple[list[int], Worker, Worker]:
    """Run a light and a heavy worker; return the light one's batches in each epoch.

    At epoch `stall_at` the heavy one stands still for five epochs.
    """
    light, heavy = Worker(0.001, light_keeper), Worker(0.04, heavy_keeper)
    batches = []
    for epoch in range(epochs):
        before = light.batches
        if epoch == stall_at:
            heavy.clock += 5 * INTERVAL
        together = max(light.run_epoch(), heavy.run_epoch()) + 0.002
        light.clock = heavy.clock = together  # an epoch is over when it is over everywhere
        batches.append(light.batches - before)
    return batches, light, heavy


def nobody(worker: Worker) -> None:
    return None


def test_without_it_the_light_worker_decays() -> None:
    batches, _, _ = run_cluster(nobody, nobody, 40)
    assert batches[-1] < 0.1 * batches[0]


@pytest.mark.parametrize("heavy_keeper", [keeper, nobody])
def test_with_it_the_light_worker_holds_its_rate(heavy_keeper: Keeper) -> None:
    batches, light, heavy = run_cluster(keeper, heavy_keeper, 300)
    assert sum(batches[5:]) > 0.8 * batches[0] * len(batches[5:])
    assert min(batches[5:]) > 0.6 * batches[0]
    assert light.slept_s < 0.2 * light.clock
    assert heavy.slept_s < 0.03 * heavy.clock


@pytest.mark.parametrize("heavy_keeper", [keeper, nobody])
def test_a_stall_of_the_other_worker_is_made_up_for(heavy_keeper: Keeper) -> None:
    batches, _, _ = run_cluster(keeper, heavy_keeper, 120, stall_at=20)
    stuck = sum(count < 0.2 * batches[0] for count in batches[20:])
    assert stuck < 12
    assert sum(batches[60:]) > 0.8 * batches[0] * len(batches[60:])
    without, _, _ = run_cluster(nobody, nobody, 120, stall_at=20)
    assert sum(without[60:]) < 0.05 * without[0] * len(without[60:])


def test_a_worker_that_never_waits_never_sleeps() -> None:
    alone = Worker(0.01, keeper)
    for _ in range(20):
        alone.run_epoch()
    assert alone.slept_s == 0.0


def test_what_every_epoch_costs_is_slept_off_only_by_the_probes() -> None:
    worker = Worker(0.001, keeper)
    for _ in range(320):
        worker.run_epoch()
        worker.clock += 0.1  # writing the snapshots
    assert worker.slept_s < 15 * 0.12
