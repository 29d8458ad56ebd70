"""The serving benchmark without servers: what is sent, with what, and what comes back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_pedro.bench.main import make_parser
from vllm_pedro.bench.serving import (
    client_arguments,
    client_data,
    plan,
    server_arguments,
    timings_of,
)
from vllm_pedro.bench.workloads import Request, Workload, fixed_lengths
from vllm_pedro.errors import PedroError


def options(*words: str) -> argparse.Namespace:
    return make_parser().parse_args(["serving", *words])


def test_workloads_of_the_options(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,600,4\n")
    args = options("--concurrency", "1", "4", "--rate", "2.5", "--trace", str(trace))
    closed, wider, open_, replayed = plan(args)
    assert (closed.concurrency, wider.concurrency, open_.concurrency) == (1, 4, None)
    assert len(closed.requests) == 64
    assert closed.num_tenants == 8
    assert [r.tenant for r in closed.requests] == [r.tenant for r in open_.requests]
    assert open_.requests[-1].arrival > 0
    assert (replayed.requests[0].prompt_tokens, replayed.requests[0].output_tokens) == (600, 4)
    assert len({w.name for w in (closed, wider, open_, replayed)}) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--concurrency"], "nothing to send"), (["--prompt-tokens", "2000"], "longer than")],
)
def test_options_that_cannot_be(words: list[str], message: str) -> None:
    with pytest.raises(PedroError, match=message):
        plan(options(*words))


def test_client_data_of_prompts_of_their_own() -> None:
    workload = fixed_lengths(5, 40, 3)
    text = client_data(workload)
    rows = [json.loads(line) for line in text.splitlines()]
    words = client_arguments(workload, "/m", "http://h:1", None, Path("/f"))
    assert words[words.index("--timed-trace-chunk-hash-size") + 1] == "40"
    assert {len(r["hash_ids"]) for r in rows} == {1}
    assert len({r["hash_ids"][0] for r in rows}) == 5
    assert {(r["input_length"], r["output_length"]) for r in rows} == {(40, 3)}


def test_client_arguments_for_the_two_kinds_of_arrival() -> None:
    args = options("--rate", "2", "--requests", "4", "--tenants", "2")
    closed, open_ = plan(args)
    names = ["a", "b", "a", "b"]
    words = client_arguments(closed, "/m", "http://h:1", names, Path("/f"))
    assert words[words.index("--max-concurrency") + 1] == "16"
    assert "--no-self-timed" in words
    assert words[words.index("--lora-modules") + 1 :] == names
    assert words[words.index("--lora-assignment") + 1] == "round-robin"
    words = client_arguments(open_, "/m", "http://h:1", None, Path("/f"))
    assert "--self-timed" in words
    assert "--lora-modules" not in words


def test_server_arguments_differ_in_the_adapters_only() -> None:
    args = options("--tenants", "4")
    paths = [Path(f"/a/{i}") for i in range(4)]
    words = {
        name: server_arguments(name, args, paths if name[0] != "b" else [])
        for name in ("base-eager", "pedro-eager", "lora-eager", "base-compiled")
    }
    common = words["base-eager"]
    assert "--enforce-eager" in common
    assert "--enforce-eager" not in words["base-compiled"]
    for name in ("pedro-eager", "lora-eager"):
        assert words[name][: len(common)] == common
    pedro, lora = (words[n][len(common) :] for n in ("pedro-eager", "lora-eager"))
    assert pedro[pedro.index("--max-pedros") + 1] == lora[lora.index("--max-loras") + 1] == "5"
    assert pedro[-4:] == lora[-4:] == [f"{i}=/a/{i}" for i in range(4)]


RESULT: dict[str, Any] = {
    "failed": 0,
    "errors": ["", ""],
    "start_times": [100.0, 101.0],
    "ttfts": [0.5, 1.0],
    "itls": [[0.1, 0.2], [0.5]],
}


def test_what_the_client_measured() -> None:
    workload = Workload("w", (Request(10, 3, 1), Request(10, 2, 0)), "")
    first, second = timings_of(RESULT, workload)
    assert (first.tenant, second.tenant) == (1, 0)
    assert first.tokens == pytest.approx([0.5, 0.6, 0.8])
    assert second.sent == pytest.approx(1.0)
    assert second.tokens == pytest.approx([2.0, 2.5])


def test_failed_requests_are_an_error() -> None:
    result = {**RESULT, "failed": 1, "errors": ["", "Traceback\nValueError: no such model"]}
    with pytest.raises(PedroError, match="1 requests of 'w' failed: ValueError: no such model"):
        timings_of(result, Workload("w", (Request(1, 1),) * 2, ""))
