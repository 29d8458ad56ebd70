"""The driver against an engine with a clock of its own: known steps in, known times out."""

from __future__ import annotations

import pytest

from vllm_pedro.bench.driver import StalledError, drive
from vllm_pedro.bench.workloads import Request, Workload, closed_loop, fixed_lengths


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


class FakeEngine:
    """A prompt takes a step of 1 s, a decode step of any number of rows 0.1 s."""

    def __init__(self, clock: Clock, tokens_a_step: int = 1) -> None:
        self.clock = clock
        self.tokens_a_step = tokens_a_step
        self.waiting: list[tuple[int, int]] = []
        self.running: dict[int, int] = {}
        self.most = 0

    def add(self, index: int, request: Request) -> None:
        self.waiting.append((index, request.output_tokens))

    def step(self) -> list[tuple[int, int, bool]]:
        if self.waiting:
            index, tokens = self.waiting.pop(0)
            self.clock.now += 1.0
            self.running[index] = tokens
            self.most = max(self.most, len(self.running))
            chosen = [index]
        else:
            self.clock.now += 0.1
            chosen = list(self.running)
        progress = []
        for index in chosen:
            made = min(self.tokens_a_step, self.running[index])
            self.running[index] -= made
            progress.append((index, made, not self.running[index]))
            if not self.running[index]:
                del self.running[index]
        return progress


def run(workload: Workload, **keywords: int):
    clock = Clock()
    engine = FakeEngine(clock, **keywords)
    return drive(engine.add, engine.step, workload, clock, clock.sleep), engine


def test_all_at_once() -> None:
    timings, engine = run(fixed_lengths(2, 5, 3))
    assert engine.most == 2
    assert [t.sent for t in timings] == [0, 0]
    assert timings[0].tokens == pytest.approx([1.0, 2.1, 2.2])
    assert timings[1].tokens == pytest.approx([2.0, 2.1, 2.2])
    assert timings[0].ttft == pytest.approx(1.0)
    assert timings[0].gaps == pytest.approx([1.1, 0.1])
    assert timings[1].latency == pytest.approx(2.2)


def test_a_closed_loop_counts_from_when_a_place_comes_free() -> None:
    timings, engine = run(closed_loop(fixed_lengths(3, 5, 2), 1))
    assert engine.most == 1
    assert [t.sent for t in timings] == pytest.approx([0, 1.1, 2.2])
    assert [t.ttft for t in timings] == pytest.approx([1, 1, 1])


def test_arrivals_are_waited_for_and_waiting_counts() -> None:
    requests = (Request(5, 2), Request(5, 1, arrival=0.5), Request(5, 1, arrival=50.0))
    timings, _ = run(Workload("w", requests, ""))
    assert [t.sent for t in timings] == [0, 0.5, 50]
    # The second came during the first one's prompt, and was taken in at 1.0.
    assert timings[1].tokens == pytest.approx([2.0])
    assert timings[1].ttft == pytest.approx(1.5)
    assert timings[2].tokens == pytest.approx([51.0])


def test_several_tokens_a_step() -> None:
    timings, _ = run(fixed_lengths(1, 5, 5), tokens_a_step=3)
    assert timings[0].tokens == pytest.approx([1.0, 1.0, 1.0, 1.1, 1.1])


def test_an_engine_that_gets_nowhere_is_given_up() -> None:
    clock = Clock()
    with pytest.raises(StalledError, match="50 steps without a token; 2 requests"):
        drive(FakeEngine(clock).add, list, fixed_lengths(2, 5, 2), clock, patience=50)


def test_an_answer_that_is_too_short_is_an_error_not_a_fast_run() -> None:
    clock = Clock()
    with pytest.raises(StalledError, match="request 0 ended after 1 of 4 tokens"):
        drive(FakeEngine(clock).add, lambda: [(0, 1, True)], fixed_lengths(1, 5, 4), clock)
