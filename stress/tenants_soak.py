"""Thousands of tenants on a disk that is slow and at times hangs; every answer is checked.

    python stress/tenants_soak.py --minutes 6 --json tenants.json

The server has memory for 8 of the largest adapters on the device and for 64 on the host; on a CPU
it gets the second tier all the same, as engines on a GPU have it. Some clients ask tenants drawn by
Zipf's law, one request after the other; others, whose adapters are in memory, stream long answers.
The disk is by turns as fast as it is, and 50 ms late for each file, with one adapter that the
server never gets to read and one that its worker never does (`slow_disk/`).

Ends with status 1 if an answer is wrong (as `soak.py` sees it), a request of another tenant fails,
one that hangs does not fail with its reason, more adapters are in memory than there may be, or the
99th percentile of the time between streamed tokens beside the slow disk is above 1.2 times that
beside the fast one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
from soak import CONFIGS, MAX_TOKENS, Plan, Soak, flags

from vllm_pedro import BackboneShape
from vllm_pedro.adapter import WEIGHTS_NAME
from vllm_pedro.bench.servers import Server, serve
from vllm_pedro.config import CONFIG_NAME, PedroConfig
from vllm_pedro.serving.blobs import blob_bytes

ON_DEVICE, ON_HOST = 8, 64
HANGING = ("hangs", "hangs-later")
MEMORY = {
    "device": r'vllm:pedro_adapters_resident\{.*"device"',
    "host": r'vllm:pedro_adapters_resident\{.*"host"',
    "used bytes": r"vllm:pedro_adapter_memory_used_bytes\{",
    "bytes": r"vllm:pedro_adapter_memory_bytes\{",
}


@dataclass
class TenantsPlan(Plan):
    """What this soak does; `contents` are those that tenants share, so that all can be checked.

    Attributes:
        tenants: How many folders there are.
        streams: Clients that stream answers of `stream_tokens` tokens.
        delay: Seconds that the slow disk is late for each file.
        turns: Times that the fast disk is followed by the slow one.
    """

    contents: int = len(CONFIGS)
    clients: int = 6
    tenants: int = 2000
    streams: int = 3
    stream_tokens: int = 64
    delay: float = 0.05
    turns: int = 3


@dataclass
class Gaps:
    """What was seen beside one disk, in seconds.

    Attributes:
        tokens: Between streamed tokens.
        answers: From a request of Zipf's to its answer.
    """

    tokens: list[float] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """In milliseconds."""
        return {
            "streamed gaps": len(self.tokens),
            "gap p50": 1e3 * statistics.median(self.tokens),
            "gap p99": 1e3 * percentile(self.tokens, 0.99),
            "gap max": 1e3 * max(self.tokens),
            "answers": len(self.answers),
            "answer p50": 1e3 * statistics.median(self.answers),
        }


def percentile(values: list[float], share: float) -> float:
    """The value below which this share of the values lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class TenantsSoak(Soak):
    """One run against a server that `start` started."""

    plan: TenantsPlan

    def __init__(self, server: Server, model: Path, root: Path, plan: TenantsPlan) -> None:
        super().__init__(server, model, root, plan)
        self.gaps = {"fast": Gaps(), "slow": Gaps()}
        self.disk = "fast"
        weights = [1 / (rank + 1) for rank in range(plan.tenants)]
        self.order = self.random.choices(range(plan.tenants), weights, k=100_000)
        for number in range(plan.tenants):
            self._write_tenant(str(number), number)
        for name in HANGING:
            self._write_tenant(name, plan.tenants)
        self.most: dict[str, int] = {}

    def _write_tenant(self, name: str, number: int) -> None:
        """A folder with one of the contents' weights, and a digest of its own."""
        source, folder = self.contents[self._content_of(number)], self.root / name
        folder.mkdir()
        os.link(source / WEIGHTS_NAME, folder / WEIGHTS_NAME)
        config = (source / CONFIG_NAME).read_bytes()
        (folder / CONFIG_NAME).write_bytes(config + b" " * (number + 1))

    def _content_of(self, number: int) -> int:
        return number % len(self.contents)

    async def _ask_tenant(self) -> None:
        number = self.order.pop()
        prompt = self.random.randrange(len(self.prompts))
        before, disk = time.monotonic(), self.disk
        tokens = await self.ask(str(number), prompt, self.random.random() < 0.5, False)
        self.gaps[disk].answers.append(time.monotonic() - before)
        if tokens is None:
            return
        result = self.compare(tokens, self._content_of(number), prompt)
        if len(tokens) != MAX_TOKENS:
            result = "wrong"
        self.report.counts[result] += 1
        if result == "wrong":
            self.report.problem(f"tenant {number}, prompt {prompt}: {tokens}")

    async def _stream(self, number: int) -> None:
        """One long answer after the other, of an adapter that is read before it is measured."""
        while not self._over():
            content, prompt = number % len(self.contents), number % len(self.prompts)
            answer = await self.client.completions.create(
                model=f"tenant-{content}",
                prompt=self.prompts[prompt],
                max_tokens=self.plan.stream_tokens,
                temperature=0.0,
                stream=True,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
            tokens: list[int] = []
            times: list[tuple[float, str]] = []
            async for chunk in answer:
                new = getattr(chunk.choices[0], "token_ids", None) or []
                tokens += new
                if new:
                    times.append((time.monotonic(), self.disk))
            for (begin, before), (end, after) in pairwise(times):
                if before == after:
                    self.gaps[after].tokens.append(end - begin)
            result = self.compare(tokens, content, prompt)
            self.report.counts[f"streams {result}"] += 1
            if result == "wrong" or len(tokens) != self.plan.stream_tokens:
                self.report.problem(f"stream {number}: {tokens}")

    async def _ask_in_vain(self, name: str) -> None:
        """Of an adapter that hangs: it has to fail, with the reason."""
        start = time.monotonic()
        try:
            await self.client.completions.create(
                model=name, prompt=self.prompts[0], max_tokens=4, temperature=0.0
            )
            self.report.problem(f"{name}: an answer")
        except openai.APIStatusError as error:
            self._check_text(error.message)
            if "does not answer" not in error.message:
                self.report.problem(f"{name}: {error.status_code}: {error.message[:300]}")
            self.report.counts[f"{name} failed"] += 1
        seconds = time.monotonic() - start
        print(f"{name}: failed after {seconds:.0f} s", file=sys.stderr, flush=True)

    async def _watch_tiers(self) -> None:
        """The most that the metrics have shown of each of `MEMORY`."""
        while not self._over():
            for line in (await self.http.get("/metrics")).text.splitlines():
                for what, start in MEMORY.items():
                    if re.match(start, line):
                        found = int(float(line.rpartition(" ")[2]))
                        self.most[what] = max(self.most.get(what, 0), found)
            await asyncio.sleep(0.5)

    async def _turn_disk(self) -> None:
        """Fast and slow by turns; once it is slow, what hangs is asked for."""
        delay, vain = Path(self.root).with_name("delay"), []
        length = self.plan.seconds / (2 * self.plan.turns)
        for turn in range(2 * self.plan.turns):
            self.disk = "slow" if turn % 2 else "fast"
            delay.write_text(str(self.plan.delay if turn % 2 else 0))
            if turn == 1:
                vain = [asyncio.create_task(self._ask_in_vain(name)) for name in HANGING]
            await asyncio.sleep(length)
            print(self.disk, dict(self.report.counts), file=sys.stderr, flush=True)
        delay.write_text("0")
        await asyncio.gather(*vain)

    async def _one_after_the_other(self) -> None:
        while not self._over():
            await self._ask_tenant()

    async def run_tenants(self) -> None:
        """The whole soak."""
        await self.ask_quietly()
        await asyncio.to_thread(self.check_quiet_answers)
        self._end = time.monotonic() + self.plan.seconds
        clients = [self._one_after_the_other() for _ in range(self.plan.clients)]
        streams = [self._stream(number) for number in range(self.plan.streams)]
        await asyncio.gather(self._turn_disk(), self._watch_tiers(), *clients, *streams)
        await self.client.close()
        await self.http.aclose()
        for name in HANGING:
            if not self.report.counts[f"{name} failed"]:
                self.report.problem(f"{name} did not fail")
        if self.most["host"] > ON_HOST or self.most["used bytes"] > self.most["bytes"]:
            self.report.problem(f"too much in memory: {self.most}")

    def figures(self) -> dict[str, Any]:
        """What was seen, as JSON."""
        gaps = {disk: gaps.figures() for disk, gaps in self.gaps.items()}
        return {
            "plan": vars(self.plan),
            "counts": dict(self.report.counts),
            "statuses": dict(self.report.statuses),
            "most in memory": self.most,
            "milliseconds": gaps,
            "p99, slow over fast": gaps["slow"]["gap p99"] / gaps["fast"]["gap p99"],
            "problems": self.report.problems,
        }


def options(
    model: Path, root: Path, patience: float | None = None
) -> tuple[list[str], dict[str, str]]:
    """Flags and environment of the server.

    Args:
        model: The model's folder.
        root: What tenants are in.
        patience: Seconds that reading an adapter may take, if not as many as usual.
    """
    shape = BackboneShape.from_pretrained(model)
    largest = max(
        blob_bytes(PedroConfig(**{"input_norm": "rms", **config}), "float32", shape)
        for config in CONFIGS
    )
    own = flags(root)
    at = own.index("--max-pedros")
    own[at : at + 4] = ["--pedro-memory-bytes", str(ON_DEVICE * largest)]
    own += ["--max-cpu-pedros", str(ON_HOST)]
    delay = root.with_name("delay")
    delay.write_text("0")
    here = Path(__file__).parent
    paths = [str(here / "slow_disk"), os.environ.get("PYTHONPATH", "")]
    return own, {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "SLOW_DISK": str(delay),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        **({} if patience is None else {"READ_SECONDS": str(patience)}),
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--tenants", type=int, default=TenantsPlan.tenants)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="default: the demo's")
    parser.add_argument("--log", type=Path, help="where the server's log goes")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--max-ratio", type=float, default=1.2, help="(%(default)s)")
    args = parser.parse_args()
    from vllm_pedro.fetch import fetch_model

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    model = args.model or fetch_model(progress=False)
    plan = TenantsPlan(seconds=60 * args.minutes, tenants=args.tenants, seed=args.seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        root = Path(place) / "root"
        root.mkdir()
        own, environment = options(model, root)
        log = args.log or Path(place) / "server.log"
        with serve(model, own, log, **environment) as server:
            soak = TenantsSoak(server, model, root, plan)
            asyncio.run(soak.run_tenants())
    figures = soak.figures()
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if soak.report.problems or figures["p99, slow over fast"] > args.max_ratio else 0


if __name__ == "__main__":
    sys.exit(main())
