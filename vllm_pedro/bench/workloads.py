"""What a benchmark asks: prompts, lengths, arrivals, and which tenant each request belongs to.

Everything is seeded: the same arguments make the same workload, on every machine.
"""

from __future__ import annotations

import csv
import gzip
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final, TextIO

from ..errors import PedroError

MIXES: Final = ("identical", "distinct", "uniform", "skewed", "one-hot")
"""Who asks how often; see `tenant_counts`."""

MIX_RULES: Final = {
    "identical": "all requests belong to one tenant",
    "distinct": "tenants take turns, so that neighbours differ",
    "uniform": "all tenants equally often, in random order",
    "skewed": "each tenant 1.5 times as often as the next, in random order",
    "one-hot": "one tenant has half of the requests, the others share the rest, in random order",
}

SKEW: Final = 1.5
"""Punica's Zipf parameter: how many times as popular each tenant is as the next."""

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
    for what, value in (
        ("count", count),
        ("prompt_tokens", prompt_tokens),
        ("output_tokens", output_tokens),
    ):
        if value < 1:
            raise PedroError(f"{what} must be at least 1, got {value}")
    requests = (Request(prompt_tokens, output_tokens),) * count
    rule = f"{count} requests of {prompt_tokens} + {output_tokens} tokens"
    return Workload(name, requests, rule)


def paper_lengths(count: int, seed: int = 0, beam_width: int = 1) -> Workload:
    """Lengths with the averages of the PEDRO paper's Table 3, to within half a token in all.

    The paper gives averages only. The spread here is an assumption: log-normal, sigma 0.35. With
    beams, answers are of two neighbouring lengths only, because vLLM's beam search takes one length
    for a whole batch.
    """
    draw = random.Random(f"paper/{seed}")
    prompts = _with_mean(draw, count, PAPER_PROMPT_TOKENS)
    if beam_width == 1:
        outputs, spread = _with_mean(draw, count, PAPER_OUTPUT_TOKENS), "log-normal, sigma 0.35"
    else:
        outputs = apportion([1.0] * count, round(count * PAPER_OUTPUT_TOKENS))
        spread = "prompts log-normal, sigma 0.35"
    requests = tuple(Request(p, o) for p, o in zip(prompts, outputs, strict=True))
    rule = (
        f"{count} requests of {PAPER_PROMPT_TOKENS} + {PAPER_OUTPUT_TOKENS} tokens on average "
        f"({spread}), beam {beam_width}, seed {seed}"
    )
    return Workload(f"paper, beam {beam_width}", requests, rule, beam_width=beam_width, seed=seed)


def _with_mean(draw: random.Random, count: int, mean: float) -> list[int]:
    """Log-normal lengths of at least 1 whose sum is `count * mean`, rounded."""
    raw = [draw.lognormvariate(0.0, 0.35) for _ in range(count)]
    return apportion(raw, round(count * mean), least=1)


def apportion(weights: Sequence[float], total: int, least: int = 0) -> list[int]:
    """Whole numbers in proportion to `weights` that sum to `total`: largest remainders.

    Raises:
        PedroError: `total` is too small to give each its `least`.
    """
    spare = total - least * len(weights)
    if spare < 0:
        raise PedroError(f"{total} cannot be shared so that each of {len(weights)} gets {least}")
    scale = spare / sum(weights)
    exact = [w * scale for w in weights]
    shares = [math.floor(x) for x in exact]
    order = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for index in order[: spare - sum(shares)]:
        shares[index] += 1
    return [least + share for share in shares]


# Tenants -----------------------------------------------------------------------------------------


def tenant_counts(mix: str, requests: int, tenants: int) -> list[int]:
    """How many requests each tenant makes, most popular first.

    The mixes are Punica's (arXiv 2310.18547) and one more:

    - `identical`: all requests are the first tenant's;
    - `distinct`, `uniform`: as equal as can be (they differ in order);
    - `skewed`: each tenant `SKEW` times as popular as the next;
    - `one-hot`: the first has half of all, the others share the rest.

    With fewer requests than tenants, some tenants make none.

    Raises:
        PedroError: An unknown mix, or no tenant.
    """
    if mix not in MIXES:
        raise PedroError(f"unknown mix {mix!r}; known: {', '.join(MIXES)}")
    if tenants < 1:
        raise PedroError(f"a mix needs at least 1 tenant, got {tenants}")
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
    counts = tenant_counts(mix, requests, tenants)
    if mix == "distinct":
        return [i % tenants for i in range(requests)]
    assigned = [tenant for tenant, count in enumerate(counts) for _ in range(count)]
    random.Random(f"{mix}/{seed}").shuffle(assigned)
    return assigned


# Arrivals ----------------------------------------------------------------------------------------


def arrive_by_rate(workload: Workload, rate: float, seed: int = 0) -> Workload:
    """Let the requests come at `rate` a second on average, as a Poisson process.

    Args:
        workload: Its arrivals and concurrency are replaced.
        rate: Requests per second.
        seed: Of the intervals.
    """
    if not rate > 0:
        raise PedroError(f"rate must be above 0, got {rate}")
    draw, now, requests = random.Random(f"arrivals/{seed}"), 0.0, []
    for request in workload.requests:
        now += draw.expovariate(rate)
        requests.append(replace(request, arrival=now))
    rule = f"{workload.rule}; {rate:g} requests/s (Poisson, seed {seed})"
    return replace(workload, requests=tuple(requests), rule=rule, concurrency=None)


def closed_loop(workload: Workload, concurrency: int) -> Workload:
    """Keep `concurrency` requests running: the next one comes when one has ended."""
    if concurrency < 1:
        raise PedroError(f"concurrency must be at least 1, got {concurrency}")
    requests = tuple(replace(r, arrival=0.0) for r in workload.requests)
    rule = f"{workload.rule}; closed loop of {concurrency}"
    return replace(workload, requests=requests, rule=rule, concurrency=concurrency)


# Traces ------------------------------------------------------------------------------------------


def read_trace(path: str | Path) -> list[Request]:
    """All requests of a trace file, without tenants: none of the traces names any.

    The format is the CSV of the Azure LLM inference traces 2023, plain or gzipped:
    `TIMESTAMP,ContextTokens,GeneratedTokens`.

    Raises:
        PedroError: The file is missing or of another format; names the line.
    """
    path = Path(path)
    try:
        with _open(path) as file:
            rows = list(_rows(file, path))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise PedroError(f"{path}: cannot read the trace: {error}") from error
    if not rows:
        raise PedroError(f"{path}: the trace has no requests")
    rows.sort(key=lambda r: r.arrival)
    start = rows[0].arrival
    return [replace(r, arrival=r.arrival - start) for r in rows]


def _open(path: Path) -> TextIO:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _rows(file: TextIO, path: Path) -> Iterator[Request]:
    reader = csv.DictReader(file)
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    if not set(columns) <= set(reader.fieldnames or ()):
        raise PedroError(
            f"{path}: expected an Azure trace with the columns {', '.join(columns)}, found the "
            f"columns {reader.fieldnames}"
        )
    for row in reader:
        try:
            moment = datetime.fromisoformat(row["TIMESTAMP"])
            prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (TypeError, ValueError) as error:
            raise PedroError(f"{path}, line {reader.line_num}: {error}") from None
        if prompt < 0 or output < 0:
            raise PedroError(f"{path}, line {reader.line_num}: lengths must not be negative")
        # A few requests have no answer; a request generates at least one token.
        yield Request(max(1, prompt), max(1, output), None, moment.timestamp())


def replay(
    rows: Sequence[Request],
    name: str,
    *,
    count: int | None = None,
    longest: int | None = None,
    speed: float = 1.0,
    shrink: float = 1.0,
    tenants: int = 1,
    mix: str = "skewed",
    seed: int = 0,
) -> Workload:
    """A workload of a trace's first requests.

    Traces name no tenants, so they are assigned by `assign_tenants`, whatever the request
    asks. The rule, and how many requests were left out, is in the workload's `rule`.

    Args:
        rows: From `read_trace`.
        name: Name of the workload.
        count: Take so many; default all.
        longest: Leave out requests of more tokens, prompt and answer together.
        speed: Play so many times as fast.
        shrink: Divide all lengths by this, so that long traces fit small models.
        tenants: Number of tenants.
        mix: One of `MIXES`.
        seed: Of tenants and prompts.

    Raises:
        PedroError: Nothing is left.
    """
    if not speed > 0 or not shrink >= 1:
        raise PedroError(f"speed must be above 0 and shrink at least 1, got {speed} and {shrink}")
    chosen: list[Request] = []
    too_long = 0
    for row in rows:
        if count is not None and len(chosen) == count:
            break
        prompt = max(1, round(row.prompt_tokens / shrink))
        output = max(1, round(row.output_tokens / shrink))
        if longest is not None and prompt + output > longest:
            too_long += 1
            continue
        chosen.append(Request(prompt, output, None, row.arrival))
    if not chosen:
        raise PedroError(
            f"no request of the trace is left ({too_long} are longer than {longest} tokens): allow "
            "longer ones or shrink them"
        )
    start = chosen[0].arrival
    assigned = assign_tenants(mix, len(chosen), tenants, seed)
    requests = tuple(
        replace(r, arrival=(r.arrival - start) / speed, tenant=t)
        for r, t in zip(chosen, assigned, strict=True)
    )
    rule = (
        f"first {len(chosen)} requests of the trace (left out as too long: {too_long}; lengths "
        f"divided by {shrink:g}; {speed:g} times as fast); {tenants} tenants assigned whatever the "
        f"request asks: {MIX_RULES[mix]} (seed {seed})"
    )
    return Workload(name, requests, rule, seed=seed)
