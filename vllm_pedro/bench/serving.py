"""Servers in turns, each sent the same requests by vLLM's own client, `vllm bench serve`.

The client is used as it comes. Its `timed_trace` data set takes each request's lengths, content
and arrival from a file, and its round robin over `--lora-modules` gives request i the i-th name,
so that any assignment of tenants can be asked for. Nothing of it needs pandas or datasets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from ..errors import PedroError
from . import figures
from .adapters import LORA_RANK, MODULES, PEDRO_RANK, folder_bytes, model_label, write_adapters
from .cases import EngineName, default_engines, is_cpu
from .driver import Timing
from .results import Recorder, load_average, say
from .servers import HOST, serve
from .workloads import (
    Workload,
    arrive_by_rate,
    assign_tenants,
    closed_loop,
    fixed_lengths,
    read_trace,
    replay,
)

BASE_NAME: Final = "backbone"


# What is sent ------------------------------------------------------------------------------------


def workloads(args: argparse.Namespace) -> list[Workload]:
    """The workloads that the options ask for, with tenants."""
    plain = fixed_lengths(args.requests, args.prompt_tokens, args.output_tokens)
    tenants = assign_tenants(args.mix, args.requests, args.tenants, args.seed)
    plain = replace(
        plain,
        seed=args.seed,
        rule=f"{plain.rule}, {args.tenants} tenants ({args.mix}, seed {args.seed})",
    ).with_tenants(tenants)
    found = [
        replace(closed_loop(plain, c), name=f"server, closed loop {c}") for c in args.concurrency
    ]
    found += [
        replace(arrive_by_rate(plain, r, args.seed), name=f"server, {r:g} requests/s")
        for r in args.rate
    ]
    if args.trace:
        found.append(
            replay(
                read_trace(args.trace),
                "server, trace " + Path(args.trace).name.partition(".")[0],
                count=args.requests,
                longest=args.max_model_len,
                speed=args.trace_speed,
                shrink=args.trace_shrink,
                tenants=args.tenants,
                mix=args.mix,
                seed=args.seed,
            )
        )
    if not found:
        raise PedroError("nothing to send: give --concurrency, --rate or --trace")
    too_long = [w.name for w in found if w.longest > args.max_model_len]
    if too_long:
        raise PedroError(f"{', '.join(too_long)}: requests are longer than --max-model-len")
    return found


def client_data(workload: Workload) -> str:
    """A workload as the client's `timed_trace` file; each prompt is one hash of its own."""
    rows = (
        {
            "timestamp": request.arrival,
            "input_length": request.prompt_tokens,
            "output_length": request.output_tokens,
            # A number that no other request has.
            "hash_ids": [10**12 * (1 + workload.seed) + index],
        }
        for index, request in enumerate(workload.requests)
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


def client_arguments(
    workload: Workload, model: str, port: int, names: Sequence[str] | None, folder: Path
) -> list[str]:
    """Arguments of `vllm bench serve`.

    Args:
        workload: What to send.
        model: The model's folder, whose tokenizer the client needs.
        port: The server's.
        names: The adapter's name for each request; None for a server without adapters.
        folder: Where `data.jsonl` is and `result.json` will be.
    """
    arguments = {
        "--backend": "vllm",
        "--host": HOST,
        "--port": port,
        "--endpoint": "/v1/completions",
        "--model": model,
        "--served-model-name": BASE_NAME,
        "--dataset-name": "timed_trace",
        "--dataset-path": folder / "data.jsonl",
        # A hash stands for so many tokens: as the longest prompt has.
        "--timed-trace-chunk-hash-size": max(r.prompt_tokens for r in workload.requests),
        "--num-prompts": len(workload.requests),
        "--temperature": 0,
        "--percentile-metrics": "ttft,tpot,itl,e2el",
        "--metric-percentiles": "99",
        "--result-dir": folder,
        "--result-filename": "result.json",
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    words += ["--ignore-eos", "--save-result", "--save-detailed", "--disable-tqdm"]
    if workload.concurrency:
        words += ["--no-self-timed", "--max-concurrency", str(workload.concurrency)]
    else:
        words.append("--self-timed")
    if names is not None:
        words += ["--lora-assignment", "round-robin", "--lora-modules", *names]
    return words


def timings_of(result: dict[str, Any], workload: Workload) -> list[Timing]:
    """The client's detailed result as times; seconds after the first request was sent.

    Raises:
        PedroError: Requests failed.
    """
    failed = [error for error in result["errors"] if error]
    if failed or result["failed"]:
        first = failed[0].strip().splitlines()[-1] if failed else "no reason given"
        raise PedroError(f"{result['failed']} requests of {workload.name!r} failed: {first}")
    start = min(result["start_times"])
    timings = []
    rows = zip(
        workload.requests, result["start_times"], result["ttfts"], result["itls"], strict=True
    )
    for request, sent, ttft, gaps in rows:
        sent -= start
        tokens = list(accumulate(gaps, initial=sent + ttft))
        timings.append(Timing(request.tenant, request.prompt_tokens, sent, tokens))
    return timings


def measures_of(result: dict[str, Any]) -> dict[str, float]:
    """The client's own figures under this package's names."""
    found = {
        "seconds": result["duration"],
        "output_tokens_per_s": result["output_throughput"],
        "latency_mean_ms": result["mean_e2el_ms"],
    }
    for name in ("ttft", "itl"):
        for ours, theirs in (("mean", "mean"), ("median", "median"), ("p99", "p99")):
            found[f"{name}_{ours}_ms"] = result[f"{theirs}_{name}_ms"]
    return {name: float(value) for name, value in found.items()}


# Servers -----------------------------------------------------------------------------------------


def slots_of(args: argparse.Namespace) -> int:
    """Adapters on the device at once."""
    return int(args.slots or min(args.tenants, 32) + 1)


def server_arguments(
    engine: EngineName, args: argparse.Namespace, adapters: Sequence[Path]
) -> list[str]:
    """Arguments of `vllm-pedro serve` for a kind of server; the same but for the adapters."""
    slots = slots_of(args)
    host_slots = max(slots, min(args.tenants, 256))
    words = ["--served-model-name", BASE_NAME]
    words += ["--dtype", args.dtype, "--max-model-len", str(args.max_model_len)]
    words += ["--max-num-seqs", str(args.max_num_seqs), "--no-enable-prefix-caching"]
    words += ["--max-num-batched-tokens", str(max(2048, args.max_model_len))]
    words += ["--kv-cache-memory-bytes", str(args.kv_cache_mib << 20), "--seed", "0"]
    if engine.mode == "eager":
        words.append("--enforce-eager")
    modules = [f"{path.name}={path}" for path in adapters]
    if engine.kind == "pedro":
        words += ["--enable-pedro", "--max-pedros", str(slots)]
        words += ["--max-cpu-pedros", str(host_slots), "--max-pedro-rank", str(PEDRO_RANK)]
        words += ["--pedro-target-modules", *MODULES, "--pedro-modules", *modules]
    elif engine.kind == "lora":
        words += ["--enable-lora", "--max-loras", str(slots), "--max-cpu-loras", str(host_slots)]
        words += ["--max-lora-rank", str(LORA_RANK), "--lora-modules", *modules]
    return words


# The run -----------------------------------------------------------------------------------------


def run(
    args: argparse.Namespace,
    plan: Sequence[Workload],
    model: str,
    recorder: Recorder,
    repeats: Iterable[int],
) -> None:
    """Measure all servers, each started anew in each of the `repeats`; results go to the recorder.

    Args:
        args: Of `vllm-pedro bench serving`.
        plan: From `workloads`.
        model: The model's folder.
        recorder: Where results go.
        repeats: Numbers of the repeats.
    """
    servers = [EngineName(name) for name in args.servers or default_engines()]
    count = max((t for w in plan for r in w.requests if (t := r.tenant) is not None), default=0) + 1
    with tempfile.TemporaryDirectory(prefix="vllm-pedro-bench-") as name:
        folder = Path(name)
        kinds = {engine.kind for engine in servers} - {"base"}
        adapters = {k: write_adapters(model, folder / k, k, count) for k in sorted(kinds)}
        settings = {k: getattr(args, k) for k in ("dtype", "max_model_len", "max_num_seqs")}
        recorder.add_settings(
            settings | {"adapter slots": slots_of(args)},
            model=model_label(model),
            cpu=is_cpu(),
            server=True,
        )
        for repeat in repeats:
            for engine in servers if repeat % 2 == 0 else servers[::-1]:
                say(f"repeat {repeat + 1} of {args.repeats}: starting the server: {engine} ...")
                paths = adapters.get(engine.kind, [])
                _measure_server(args, plan, model, engine, paths, recorder, folder, repeat)


def _measure_server(
    args: argparse.Namespace,
    plan: Sequence[Workload],
    model: str,
    engine: EngineName,
    paths: Sequence[Path],
    recorder: Recorder,
    folder: Path,
    repeat: int,
) -> None:
    log = folder / f"{engine}-{repeat}.log"
    flags = server_arguments(engine, args, paths)
    level = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
    with serve(model, flags, log, shares_cores=False, VLLM_LOGGING_LEVEL=level) as server:
        say(f"  it answers after {server.seconds:.0f} s; each tenant's first request ...")
        for model_name in [BASE_NAME, *(p.name for p in paths)]:
            _ask(server.port, model_name)
        for workload in plan:
            say(f"  {workload.name}: {workload.rule} ...")
            served = workload if paths else workload.with_tenants([None] * len(workload.requests))
            result = run_client(served, model, server.port, paths, folder)
            timings = timings_of(result, served)
            measures = measures_of(result)
            tenants = figures.per_tenant(timings)
            recorder.add(
                "measurement",
                family="serving",
                x=0.0,
                workload=workload.name,
                rule=workload.rule,
                kind=engine.kind,
                mode=engine.mode,
                tenants=served.num_tenants,
                repeat=repeat,
                measures=measures,
                load_average=load_average(),
                per_adapter={
                    BASE_NAME if t is None else paths[t].name: f for t, f in tenants.items()
                },
                **({"fairness": figures.fairness(tenants)} if len(tenants) > 1 else {}),
            )
            say(f"  {engine.label}: {measures['output_tokens_per_s']:.1f} tokens/s")
        recorder.add(
            "engine",
            engine=engine,
            start_s=server.seconds,
            peak_bytes={"host": server.peak_bytes()},
            adapter_bytes={engine.kind: folder_bytes(paths[0])} if paths else {},
        )


def _ask(port: int, name: str) -> None:
    """One token of one adapter, so that loading it is in no figure."""
    body = json.dumps({"model": name, "prompt": [1, 2, 3, 4], "max_tokens": 1}).encode()
    request = urllib.request.Request(
        f"http://{HOST}:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")[:300]
        raise PedroError(f"the server answered {error.code} for {name!r}: {text}") from error
    except OSError as error:
        raise PedroError(f"the server does not answer for {name!r}: {error}") from error


def run_client(
    workload: Workload, model: str, port: int, paths: Sequence[Path], folder: Path
) -> dict[str, Any]:
    """Run `vllm bench serve`; its detailed result.

    Raises:
        PedroError: The client failed.
    """
    (folder / "data.jsonl").write_text(client_data(workload))
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    names = None
    if paths:
        tenants = [r.tenant for r in workload.requests]
        names = [BASE_NAME if t is None else paths[t].name for t in tenants]
    command = [sys.executable, "-m", "vllm_pedro.integration.bench_client"]
    command += client_arguments(workload, model, port, names, folder)
    # The client seeds prompts with hash() of a text, which Python salts anew in each process.
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    run = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, check=False
    )
    if run.returncode or not result.is_file():
        text = run.stdout.decode(errors="replace").strip().splitlines()
        raise PedroError(f"vllm bench serve ended with {run.returncode}: {' | '.join(text[-3:])}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found
