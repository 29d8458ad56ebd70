"""Workloads: the same from the same seed, with the right averages, mixes and arrivals."""

from __future__ import annotations

import gzip
import itertools
import statistics
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pedro.bench.workloads import (
    MIXES,
    PAPER_OUTPUT_TOKENS,
    PAPER_PROMPT_TOKENS,
    SKEW,
    Request,
    Workload,
    apportion,
    arrive_by_rate,
    assign_tenants,
    closed_loop,
    fixed_lengths,
    paper_lengths,
    read_trace,
    replay,
    tenant_counts,
)
from vllm_pedro.errors import PedroError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:00.0000000,3000,0
"""
# Lengths


def test_fixed_lengths() -> None:
    workload = fixed_lengths(3, 10, 4)
    assert workload.requests == (Request(10, 4),) * 3
    assert sum(r.output_tokens for r in workload.requests) == 12
    assert workload.longest == 14
    assert workload.num_tenants == 0


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("count", [2, 10, 200])
def test_the_papers_averages(count: int, beams: int) -> None:
    workload = paper_lengths(count, beam_width=beams)
    prompts = [r.prompt_tokens for r in workload.requests]
    outputs = [r.output_tokens for r in workload.requests]
    assert sum(prompts) == round(count * PAPER_PROMPT_TOKENS)
    assert sum(outputs) == round(count * PAPER_OUTPUT_TOKENS)
    assert min(outputs) >= 1
    assert workload.beam_width == beams
    if beams > 1:
        assert set(outputs) <= {32, 33}
    elif count == 200:
        assert statistics.stdev(prompts) / statistics.fmean(prompts) == pytest.approx(0.36, abs=0.1)


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.integers(0, 500), st.integers(0, 3)
)
def test_apportioning_loses_nothing(weights: list[float], extra: int, least: int) -> None:
    shares = apportion(weights, extra, least)
    assert sum(shares) == extra + least * len(weights)
    assert min(shares) >= least
    exact = [least + w * extra / sum(weights) for w in weights]
    assert all(abs(s - e) <= 1 + 1e-6 for s, e in zip(shares, exact, strict=True))


# Prompts


def test_prompts_have_their_length_and_differ_from_the_first_token_on() -> None:
    workload = fixed_lengths(8, 50, 1)
    prompts = [workload.prompt(i, 1000) for i in range(8)]
    assert {len(p) for p in prompts} == {50}
    assert all(0 <= token < 1000 for p in prompts for token in p)
    assert len({tuple(p[:5]) for p in prompts}) == 8
    assert prompts[3] == workload.prompt(3, 1000)


# Tenants


@pytest.mark.parametrize("mix", MIXES)
@given(requests=st.integers(1, 300), tenants=st.integers(1, 40))
def test_every_request_has_a_tenant(mix: str, requests: int, tenants: int) -> None:
    counts = tenant_counts(mix, requests, tenants)
    assert len(counts) == tenants
    assert sum(counts) == requests
    assigned = assign_tenants(mix, requests, tenants, seed=1)
    assert [assigned.count(t) for t in range(tenants)] == counts
    assert assigned == assign_tenants(mix, requests, tenants, seed=1)


def test_the_five_mixes() -> None:
    assert tenant_counts("identical", 12, 4) == [12, 0, 0, 0]
    assert tenant_counts("distinct", 10, 4) == [3, 3, 2, 2]
    assert tenant_counts("uniform", 12, 4) == [3, 3, 3, 3]
    assert tenant_counts("one-hot", 12, 4) == [6, 2, 2, 2]
    skewed = tenant_counts("skewed", 10_000, 6)
    for more, less in itertools.pairwise(skewed):
        assert more / less == pytest.approx(SKEW, rel=0.01)


def test_distinct_neighbours_differ() -> None:
    assigned = assign_tenants("distinct", 100, 16)
    assert all(len(set(assigned[i : i + 16])) == 16 for i in range(80))


def test_ten_thousand_tenants() -> None:
    assert Counter(assign_tenants("uniform", 10_000, 10_000)).most_common(1)[0][1] == 1
    assert sum(tenant_counts("skewed", 10_000, 10_000)) == 10_000


# Arrivals


def test_poisson_arrivals() -> None:
    workload = arrive_by_rate(fixed_lengths(4000, 1, 1), rate=20, seed=5)
    times = [r.arrival for r in workload.requests]
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert workload.concurrency is None
    assert times == sorted(times)
    assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.08)  # exponential: as the mean


def test_a_closed_loop_has_no_arrivals() -> None:
    workload = closed_loop(arrive_by_rate(fixed_lengths(5, 1, 1), 1), 2)
    assert workload.concurrency == 2
    assert {r.arrival for r in workload.requests} == {0.0}


# Traces


@pytest.fixture(params=["plain", "gz"])
def write(request: pytest.FixtureRequest, tmp_path: Path):
    def to(name: str, text: str) -> Path:
        path = tmp_path / (name + (".gz" if request.param == "gz" else ""))
        data = text.encode()
        path.write_bytes(gzip.compress(data) if request.param == "gz" else data)
        return path

    return to


def test_azure_traces(write) -> None:
    rows = read_trace(write("azure.csv", AZURE))
    assert [(r.prompt_tokens, r.output_tokens) for r in rows] == [(374, 44), (396, 109), (3000, 1)]
    times = [r.arrival - rows[0].arrival for r in rows]
    assert times == pytest.approx([0, 4.314579, 13.31941], abs=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no requests"),
        ("a,b\n1,2\n", "line 2: .* 'TIMESTAMP'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,-1,2\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
    ],
)
def test_bad_traces_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(PedroError, match=message):
        read_trace(path)


@pytest.mark.parametrize("content", [None, b"\x1f\x8b\x08broken", b"\xff\xfe{"])
def test_traces_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "trace.csv.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PedroError, match="expected an Azure trace"):
        read_trace(path)


def test_replay(tmp_path: Path) -> None:
    lines = [f"2023-11-16 18:15:{5 * i:02},{100 * (i + 1)},20" for i in range(10)]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))

    def read(count: int, longest: int, speed: float = 1, shrink: float = 1) -> Workload:
        args = Namespace(trace=path, max_model_len=longest, trace_speed=speed, trace_shrink=shrink)
        return replay(args, "the", count, 3, "uniform")

    workload = read(4, 400, speed=2)
    assert workload.name == "the t"
    assert [r.prompt_tokens for r in workload.requests] == [100, 200, 300]
    assert [r.arrival for r in workload.requests] == [0.0, 2.5, 5.0]
    assert {r.tenant for r in workload.requests} == {0, 1, 2}
    assert "left out as too long: 7" in workload.rule
    assert workload.concurrency is None
    shrunk = read(10, 400, shrink=4)
    assert len(shrunk.requests) == 10
    assert shrunk.requests[3].prompt_tokens == 100
    with pytest.raises(PedroError, match="10 are longer than 10 tokens"):
        read(10, 10)
