"""Servers in turns, each sent the same requests by vLLM's own client, `vllm bench serve`.

The client is used as it comes. Its `timed_trace` data set takes each request's lengths, content
and arrival from a file, and its round robin over `--lora-modules` gives request i the i-th name,
so that any assignment of tenants can be asked for. Nothing of it needs pandas or datasets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from ..errors import PedroError
from . import figures
from .adapters import folder_bytes, write_adapters
from .cases import default_engines, engine_label, engine_options, slots, split
from .driver import Timing
from .results import Recorder, say
from .servers import Server, serve
from .workloads import (
    Workload,
    arrive_by_rate,
    assign_tenants,
    closed_loop,
    fixed_lengths,
    replay,
)

BASE_NAME: Final = "backbone"


# What is sent ------------------------------------------------------------------------------------


def plan(args: Namespace) -> list[Workload]:
    """The workloads that the options ask for, with tenants."""
    args.engines = args.engines or default_engines()
    plain = fixed_lengths(args.requests, args.prompt_tokens, args.output_tokens)
    rule = f"{plain.rule}, {args.tenants} tenants ({args.mix}, seed 0)"
    tenants = assign_tenants(args.mix, args.requests, args.tenants)
    plain = replace(plain, rule=rule).with_tenants(tenants)
    found = [
        replace(closed_loop(plain, c), name=f"server, closed loop {c}") for c in args.concurrency
    ]
    found += [
        replace(arrive_by_rate(plain, r), name=f"server, {r:g} requests/s") for r in args.rate
    ]
    if args.trace:
        found.append(replay(args, "server, trace", args.requests, args.tenants, args.mix))
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


def flags_of(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{flag}", *map(str, values)]
    return words


def client_arguments(
    workload: Workload, model: str, url: str, names: Sequence[str] | None, folder: Path
) -> list[str]:
    """Arguments of `vllm bench serve`.

    Args:
        workload: What to send.
        model: The model's folder, whose tokenizer the client needs.
        url: The server's.
        names: The adapter's name for each request; None for a server without adapters.
        folder: Where `data.jsonl` is and `result.json` will be.
    """
    options = {
        "backend": "vllm",
        "base_url": url,
        "endpoint": "/v1/completions",
        "model": model,
        "served_model_name": BASE_NAME,
        "dataset_name": "timed_trace",
        "dataset_path": folder / "data.jsonl",
        # A hash stands for so many tokens: as the longest prompt has.
        "timed_trace_chunk_hash_size": max(r.prompt_tokens for r in workload.requests),
        "num_prompts": len(workload.requests),
        "temperature": 0,
        "result_dir": folder,
        "result_filename": "result.json",
        "self_timed": workload.concurrency is None,
    }
    if workload.concurrency:
        options["max_concurrency"] = workload.concurrency
    if names is not None:
        options |= {"lora_assignment": "round-robin", "lora_modules": names}
    words = ["--ignore-eos", "--save-result", "--save-detailed", "--disable-tqdm"]
    return [*words, *flags_of(options)]


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
    rows = zip(
        workload.requests, result["start_times"], result["ttfts"], result["itls"], strict=True
    )
    return [
        Timing(request.tenant, sent - start, list(accumulate(gaps, initial=sent - start + ttft)))
        for request, sent, ttft, gaps in rows
    ]


# The run -----------------------------------------------------------------------------------------


def server_arguments(engine: str, args: Namespace, adapters: Sequence[Path]) -> list[str]:
    """Arguments of `vllm-pedro serve` for a kind of server; the same but for the adapters."""
    kind, _ = split(engine)
    options = {
        "served_model_name": BASE_NAME,
        "dtype": args.dtype,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": max(2048, args.max_model_len),
        "kv_cache_memory_bytes": args.kv_cache_mib << 20,
        **engine_options(engine, args.tenants),
    }
    if adapters:
        options[f"{kind}_modules"] = [f"{path.name}={path}" for path in adapters]
    return flags_of(options)


def run(
    args: Namespace, plan: Sequence[Workload], recorder: Recorder, repeats: Iterable[int]
) -> None:
    """Measure all servers, each started anew in each repeat; results go to the recorder."""
    count = max((r.tenant or 0) for w in plan for r in w.requests) + 1
    with tempfile.TemporaryDirectory(prefix="vllm-pedro-bench-") as name:
        folder = Path(name)
        kinds = sorted({split(engine)[0] for engine in args.engines} & {"pedro", "lora"})
        adapters = {k: write_adapters(args.model, folder / k, k, count) for k in kinds}
        settings = {k: getattr(args, k) for k in ("dtype", "max_model_len", "max_num_seqs")}
        settings["adapter slots"] = slots(args.tenants)["adapter slots"]
        recorder.add_settings(args.model, settings, server=True)
        for repeat in repeats:
            for engine in args.engines if repeat % 2 == 0 else args.engines[::-1]:
                say(f"repeat {repeat + 1} of {args.repeats}: starting the server: {engine} ...")
                _measure_server(args, plan, engine, adapters, recorder, folder, repeat)


def _measure_server(
    args: Namespace,
    plan: Sequence[Workload],
    engine: str,
    adapters: dict[str, list[Path]],
    recorder: Recorder,
    folder: Path,
    repeat: int,
) -> None:
    kind, mode = split(engine)
    paths = adapters.get(kind, [])
    log = folder / f"{engine}-{repeat}.log"
    flags = server_arguments(engine, args, paths)
    level = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
    with serve(args.model, flags, log, shares_cores=False, VLLM_LOGGING_LEVEL=level) as server:
        say(f"  it answers after {server.seconds:.0f} s; each tenant's first request ...")
        for name in [BASE_NAME, *(path.name for path in paths)]:
            _ask(server, name)
        for workload in plan:
            say(f"  {workload.name}: {workload.rule} ...")
            served = workload if paths else workload.with_tenants([None] * len(workload.requests))
            timings = run_client(served, args.model, server, paths, folder)
            speed = recorder.measured(
                served,
                timings,
                family="serving",
                x=0.0,
                kind=kind,
                mode=mode,
                tenants=served.num_tenants,
                repeat=repeat,
                per_adapter={
                    BASE_NAME if t is None else paths[t].name: f
                    for t, f in figures.per_tenant(timings).items()
                },
            )
            say(f"  {engine_label(engine)}: {speed:.1f} tokens/s")
        recorder.add(
            "engine",
            engine=engine,
            start_s=server.seconds,
            peak_bytes={"host": server.peak_bytes()},
            adapter_bytes={kind: folder_bytes(paths[0])} if paths else {},
        )


def _ask(server: Server, name: str) -> None:
    """One token of one adapter, so that loading it is in no figure."""
    body = json.dumps({"model": name, "prompt": [1, 2, 3, 4], "max_tokens": 1}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            answer.read()
    except OSError as error:
        text = error.read().decode()[:300] if isinstance(error, urllib.error.HTTPError) else ""
        raise PedroError(f"the server did not answer for {name!r}: {error} {text}") from error


def run_client(
    workload: Workload, model: str, server: Server, paths: Sequence[Path], folder: Path
) -> list[Timing]:
    """Run `vllm bench serve`.

    Raises:
        PedroError: The client failed, or requests did.
    """
    (folder / "data.jsonl").write_text(client_data(workload))
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    tenants = [r.tenant for r in workload.requests]
    names = [BASE_NAME if t is None else paths[t].name for t in tenants] if paths else None
    command = [sys.executable, "-m", "vllm_pedro.integration.bench_client"]
    command += client_arguments(workload, model, server.url, names, folder)
    # The client seeds prompts with hash() of a text, which Python salts anew in each process.
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, check=False
    )
    if done.returncode or not result.is_file():
        text = done.stdout.decode(errors="replace").strip().splitlines()
        raise PedroError(f"vllm bench serve ended with {done.returncode}: {' | '.join(text[-3:])}")
    return timings_of(json.loads(result.read_text()), workload)
