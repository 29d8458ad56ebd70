"""Send a workload to an engine and keep the time of every token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .workloads import Request, Workload


@dataclass(slots=True)
class Timing:
    """One request's times, in seconds after the start of the run.

    Attributes:
        tenant: Whose request it was.
        sent: When it arrived, by the workload; in a closed loop, when its place came free.
        tokens: When each of its tokens came out.
    """

    tenant: int | None
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
        return [b - a for a, b in pairwise(self.tokens)]


class StalledError(RuntimeError):
    """The engine takes steps and gets nowhere."""


def drive(
    add: Callable[[int, Request], None],
    step: Callable[[], Sequence[tuple[int, int, bool]]],
    workload: Workload,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    patience: int = 10_000,
) -> list[Timing]:
    """Run a workload to its end; one entry for each request, in the workload's order.

    Requests are taken in between steps. One that arrives during a step waits for its end, and the
    wait is in its time to first token, as it is in a server.

    Args:
        add: Gives the engine a request and its number in the workload.
        step: One forward pass: numbers of requests, how many tokens each got, whether it ended.
        workload: What to send, and how.
        clock: Seconds.
        sleep: Waits so many seconds; only called while nothing runs.
        patience: Steps without a token after which the engine counts as hung.

    Raises:
        StalledError: The engine gives no more tokens.
    """
    requests = workload.requests
    room = workload.concurrency or len(requests)
    timings: list[Timing] = []
    running: set[int] = set()
    idle = 0
    start = clock()
    while running or len(timings) < len(requests):
        now = clock() - start
        while len(timings) < len(requests) and len(running) < room:
            request = requests[len(timings)]
            if request.arrival > now:
                break
            add(len(timings), request)
            running.add(len(timings))
            sent = now if workload.concurrency else request.arrival
            timings.append(Timing(request.tenant, sent))
        if not running:
            sleep(requests[len(timings)].arrival - now)
            continue
        progress = step()
        now = clock() - start
        for index, new_tokens, finished in progress:
            timings[index].tokens += [now] * new_tokens
            if finished:
                running.discard(index)
                got, asked = len(timings[index].tokens), requests[index].output_tokens
                if got != asked:
                    raise StalledError(f"request {index} ended after {got} of {asked} tokens")
        idle = 0 if any(new_tokens for _, new_tokens, _ in progress) else idle + 1
        if idle > patience:
            raise StalledError(f"{patience} steps without a token; {len(running)} requests run")
    return timings
