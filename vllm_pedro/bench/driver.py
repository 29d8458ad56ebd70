"""Send a workload to an engine and keep the time of every token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from .workloads import Request, Workload


class Progress(NamedTuple):
    """What a step gave one request; `request` is its number in the workload."""

    request: int
    new_tokens: int
    finished: bool


class Engine(Protocol):
    """What the driver needs of an engine."""

    def add(self, index: int, request: Request) -> None:
        """Take in a request."""

    def step(self) -> Sequence[Progress]:
        """One forward pass, and what came of it."""


@dataclass(slots=True)
class Timing:
    """One request's times, in seconds after the start of the run.

    Attributes:
        tenant: Whose request it was.
        prompt_tokens: Length of its prompt.
        sent: When it arrived, by the workload; in a closed loop, when its place came free.
        tokens: When each of its tokens came out.
    """

    tenant: int | None
    prompt_tokens: int
    sent: float
    tokens: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Time to the first token, waiting included."""
        return self.tokens[0] - self.sent

    @property
    def latency(self) -> float:
        """Time to the last token."""
        return self.tokens[-1] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies."""
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


class StalledError(RuntimeError):
    """The engine takes steps and gets nowhere."""


def drive(
    engine: Engine,
    workload: Workload,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    tell: Callable[[int], None] = lambda tokens: None,
    patience: int = 10_000,
) -> list[Timing]:
    """Run a workload to its end.

    Requests are taken in between steps. One that arrives during a step waits for its end, and the
    wait is in its time to first token, as it is in a server.

    Args:
        engine: The engine.
        workload: What to send, and how.
        clock: Seconds.
        sleep: Waits so many seconds; only called while nothing runs.
        tell: Is told after each step how many tokens have come out.
        patience: Steps without a token after which the engine counts as hung.

    Returns:
        One entry for each request, in the workload's order.

    Raises:
        StalledError: The engine gives no more tokens.
    """
    requests = workload.requests
    room = workload.concurrency or len(requests)
    timings: list[Timing] = []
    running: set[int] = set()
    made = idle = 0
    start = clock()
    while running or len(timings) < len(requests):
        now = clock() - start
        while len(timings) < len(requests) and len(running) < room:
            request = requests[len(timings)]
            if request.arrival > now:
                break
            sent = now if workload.concurrency else request.arrival
            engine.add(len(timings), request)
            running.add(len(timings))
            timings.append(Timing(request.tenant, request.prompt_tokens, sent))
        if not running:
            sleep(requests[len(timings)].arrival - now)
            continue
        progress = engine.step()
        now = clock() - start
        fresh = 0
        for index, new_tokens, finished in progress:
            timings[index].tokens += [now] * new_tokens
            fresh += new_tokens
            if finished:
                running.discard(index)
                got, asked = len(timings[index].tokens), requests[index].output_tokens
                if got != asked:
                    raise StalledError(f"request {index} ended after {got} of {asked} tokens")
        made += fresh
        idle = 0 if fresh else idle + 1
        if idle > patience:
            raise StalledError(f"{patience} steps without a token; {len(running)} requests run")
        tell(made)
    return timings
