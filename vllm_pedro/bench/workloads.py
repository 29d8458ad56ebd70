"""What a benchmark asks: prompts, lengths, arrivals, and which tenant each request belongs to.

Everything is seeded: the same arguments make the same workload, on every machine.
"""

from __future__ import annotations

import csv
import gzip
import math
import random
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

import numpy as np

from ..errors import PedroError

MIXES: Final = {
    "identical": "all requests belong to one tenant",
    "distinct": "tenants take turns, so that neighbours differ",
    "uniform": "all tenants equally often, in random order",
    "skewed": "each tenant 1.5 times as often as the next, in random order",
    "one-hot": "one tenant has half of the requests, the others share the rest, in random order",
}
"""Who asks how often: Punica's mixes (arXiv 2310.18547) and one more."""

SKEW: Final = 1.5

PAPER_PROMPT_TOKENS: Final = 278.6
PAPER_OUTPUT_TOKENS: Final = 32.5
"""Averages of the PEDRO paper's Table 3 (arXiv 2409.17834)."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        prompt_tokens: Length of its prompt.
        output_tokens: Exactly so many tokens are generated.
        tenant: Number of its adapter, from 0; None asks the plain backbone.
        arrival: Seconds after the start at which it comes in.
    """

    prompt_tokens: int
    output_tokens: int
    tenant: int | None = None
    arrival: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests, and how they are sent.

    Attributes:
        name: Short name, which identifies it within a run.
        requests: In order of arrival.
        rule: In words: lengths, arrivals, and who asks.
        concurrency: Closed loop: so many requests at once, the next one when one has ended. None:
            each is sent when it arrives.
        beam_width: Beams per request; 1 is greedy decoding.
        seed: Of the prompts' tokens.
    """

    name: str
    requests: tuple[Request, ...]
    rule: str
    concurrency: int | None = None
    beam_width: int = 1
    seed: int = 0

    @property
    def num_tenants(self) -> int:
        """How many different tenants ask."""
        return len({r.tenant for r in self.requests if r.tenant is not None})

    @property
    def longest(self) -> int:
        """Most tokens a sequence grows to."""
        return max(r.prompt_tokens + r.output_tokens for r in self.requests)

    def with_tenants(self, tenants: Sequence[int | None]) -> Workload:
        """The same requests, asked by others."""
        pairs = zip(self.requests, tenants, strict=True)
        return replace(self, requests=tuple(replace(r, tenant=t) for r, t in pairs))

    def prompt(self, index: int, vocabulary: int) -> list[int]:
        """Token ids of a request's prompt, below `vocabulary`, drawn at random."""
        key = f"{self.seed}/request/{index}"
        return random.Random(key).choices(range(vocabulary), k=self.requests[index].prompt_tokens)


# Lengths -----------------------------------------------------------------------------------------


def fixed_lengths(
    count: int, prompt_tokens: int, output_tokens: int, name: str = "fixed"
) -> Workload:
    """`count` requests of the same lengths, all there from the start."""
    rule = f"{count} requests of {prompt_tokens} + {output_tokens} tokens"
    return Workload(name, (Request(prompt_tokens, output_tokens),) * count, rule)


def paper_lengths(count: int, beam_width: int = 1) -> Workload:
    """Lengths with the averages of the PEDRO paper's Table 3, to within half a token in all.

    The paper gives averages only. The spread here is an assumption: log-normal, sigma 0.35. With
    beams, answers are of two neighbouring lengths only, because vLLM's beam search takes one length
    for a whole batch.
    """
    draw = random.Random("paper/0")

    def lengths(mean: float, sigma: float = 0.35) -> list[int]:
        weights = [draw.lognormvariate(0.0, sigma) for _ in range(count)]
        return apportion(weights, round(count * mean) - count, least=1)

    prompts = lengths(PAPER_PROMPT_TOKENS)
    outputs = lengths(PAPER_OUTPUT_TOKENS, 0.35 if beam_width == 1 else 0.0)
    spread = "log-normal, sigma 0.35"
    rule = (
        f"{count} requests of {PAPER_PROMPT_TOKENS} + {PAPER_OUTPUT_TOKENS} tokens on average "
        f"({spread if beam_width == 1 else f'prompts {spread}'}), beam {beam_width}, seed 0"
    )
    requests = tuple(map(Request, prompts, outputs))
    return Workload(f"paper, beam {beam_width}", requests, rule, beam_width=beam_width)


def apportion(weights: Sequence[float], spare: int, least: int = 0) -> list[int]:
    """`least` for each, and `spare` shared in proportion to `weights`: largest remainders."""
    exact = np.asarray(weights) * (spare / sum(weights))
    shares = np.floor(exact).astype(int)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: spare - shares.sum()]] += 1
    return [least + int(share) for share in shares]


# Tenants -----------------------------------------------------------------------------------------


def tenant_counts(mix: str, requests: int, tenants: int) -> list[int]:
    """How many requests each tenant makes in one of `MIXES`, most popular first.

    With fewer requests than tenants, some tenants make none.
    """
    if mix == "identical" or tenants == 1:
        return [requests] + [0] * (tenants - 1)
    if mix == "skewed":
        # Later tenants get nothing anyway, and higher powers would leave the range of floats.
        return apportion([SKEW ** -min(i, 1500) for i in range(tenants)], requests)
    if mix == "one-hot":
        hot = math.ceil(requests / 2)
        return [hot, *apportion([1.0] * (tenants - 1), requests - hot)]
    return apportion([1.0] * tenants, requests)


def assign_tenants(mix: str, requests: int, tenants: int, seed: int = 0) -> list[int]:
    """The tenant of each request, in order of arrival. Exact counts, seeded order."""
    if mix == "distinct":
        return [i % tenants for i in range(requests)]
    counts = tenant_counts(mix, requests, tenants)
    assigned = [tenant for tenant, count in enumerate(counts) for _ in range(count)]
    random.Random(f"{mix}/{seed}").shuffle(assigned)
    return assigned


# Arrivals ----------------------------------------------------------------------------------------


def arrive_by_rate(workload: Workload, rate: float, seed: int = 0) -> Workload:
    """Let the requests come at `rate` a second on average, as a Poisson process."""
    draw, now, requests = random.Random(f"arrivals/{seed}"), 0.0, []
    for request in workload.requests:
        now += draw.expovariate(rate)
        requests.append(replace(request, arrival=now))
    rule = f"{workload.rule}; {rate:g} requests/s (Poisson, seed {seed})"
    return replace(workload, requests=tuple(requests), rule=rule, concurrency=None)


def closed_loop(workload: Workload, concurrency: int) -> Workload:
    """Keep `concurrency` requests running: the next one comes when one has ended."""
    requests = tuple(replace(r, arrival=0.0) for r in workload.requests)
    rule = f"{workload.rule}; closed loop of {concurrency}"
    return replace(workload, requests=requests, rule=rule, concurrency=concurrency)


# Traces ------------------------------------------------------------------------------------------


def read_trace(path: str | Path) -> list[Request]:
    """All requests of an Azure LLM inference trace 2023, a CSV, plain or gzipped.

    Raises:
        PedroError: The file cannot be read, or is of another format; names the line.
    """
    path, rows = Path(path), []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="") as file:
            for row in csv.DictReader(file):
                moment = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
                lengths = int(row["ContextTokens"]), int(row["GeneratedTokens"])
                if min(lengths) < 0:
                    raise ValueError("lengths must not be negative")
                # A few requests have no answer; a request generates at least one token.
                rows.append(Request(max(1, lengths[0]), max(1, lengths[1]), None, moment))
    except (KeyError, TypeError, ValueError, OSError, EOFError) as error:
        raise PedroError(
            f"{path}, line {len(rows) + 2}: expected an Azure trace with TIMESTAMP, ContextTokens "
            f"and GeneratedTokens: {error}"
        ) from error
    if not rows:
        raise PedroError(f"{path}: the trace has no requests")
    return sorted(rows, key=lambda r: r.arrival)


def replay(
    args: Namespace, name: str, count: int, tenants: int, mix: str = "skewed", seed: int = 0
) -> Workload:
    """A workload of the first `count` requests of a trace.

    Traces name no tenants, so they are assigned by `assign_tenants`, whatever the request asks. The
    rule, and how many requests were left out, is in the workload's `rule`.

    Args:
        args: `trace`, its file; `trace_speed`, how many times as fast it is played; `trace_shrink`,
            which divides all lengths; requests that are longer than `max_model_len` are left out.
        name: Of the workload, to which the trace's is added.

    Raises:
        PedroError: The trace cannot be read, or nothing is left.
    """
    shrink, speed, longest = args.trace_shrink, args.trace_speed, args.max_model_len
    shrunk = (
        Request(
            max(1, round(row.prompt_tokens / shrink)),
            max(1, round(row.output_tokens / shrink)),
            arrival=row.arrival / speed,
        )
        for row in read_trace(args.trace)
    )
    chosen: list[Request] = []
    too_long = 0
    for request in shrunk:
        if len(chosen) == count:
            break
        fits = request.prompt_tokens + request.output_tokens <= longest
        too_long += not fits
        chosen += [request] * fits
    if not chosen:
        raise PedroError(
            f"no request of the trace is left ({too_long} are longer than {longest} tokens): allow "
            "longer ones or shrink them"
        )
    requests = tuple(replace(r, arrival=r.arrival - chosen[0].arrival) for r in chosen)
    rule = (
        f"first {len(chosen)} requests of the trace (left out as too long: {too_long}; lengths "
        f"divided by {shrink:g}; {speed:g} times as fast); {tenants} tenants assigned whatever the "
        f"request asks: {MIXES[mix]} (seed {seed})"
    )
    file = Path(args.trace).name.partition(".")[0]
    workload = Workload(f"{name} {file}", requests, rule, seed=seed)
    return workload.with_tenants(assign_tenants(mix, len(requests), tenants, seed))
