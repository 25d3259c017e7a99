"""The light worker of a cluster keeps its epochs in phase with the heavy one's."""

from collections.abc import Callable

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
    return PhaseKeeper(now=lambda: worker.clock, cpu=lambda: 0.0, sleep=worker.sleep)


def run_cluster(
    light_keeper: Callable[[Worker], PhaseKeeper | None], epochs: int
) -> tuple[list[int], Worker]:
    """Run a light and a heavy worker; return the light one's batches in each epoch."""
    light, heavy = Worker(0.001, light_keeper), Worker(0.03, lambda _: None)
    batches = []
    for _ in range(epochs):
        before = light.batches
        together = max(light.run_epoch(), heavy.run_epoch())
        light.clock = heavy.clock = together  # an epoch is over when it is over everywhere
        batches.append(light.batches - before)
    return batches, light


def test_without_it_the_light_worker_decays() -> None:
    batches, _ = run_cluster(lambda _: None, 40)
    assert batches[-1] < 0.1 * batches[0]


def test_with_it_the_light_worker_holds_its_rate() -> None:
    batches, light = run_cluster(keeper, 200)
    assert min(batches[3:]) > 0.8 * batches[0]
    assert light.slept_s < 0.2 * 200 * INTERVAL


def test_a_worker_that_never_waits_never_sleeps() -> None:
    alone = Worker(0.01, keeper)
    for _ in range(20):
        alone.run_epoch()
    assert alone.slept_s == 0.0


def test_its_own_computing_is_no_wait() -> None:
    cpu = [0.0]
    worker = Worker(
        0.001,
        lambda it: PhaseKeeper(now=lambda: it.clock, cpu=lambda: cpu[0], sleep=it.sleep),
    )
    for _ in range(10):
        worker.run_epoch()
        worker.clock += 0.1  # a large snapshot, pickled by this thread
        cpu[0] += 0.1
    assert worker.slept_s == 0.0
    worker.run_epoch()
    worker.clock += 0.1  # the same time, spent waiting
    worker.run_epoch()
    assert worker.slept_s > 0.09
