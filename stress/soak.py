"""Many clients, and adapters that come, go and change, against one server; every answer is checked.

    python stress/soak.py --minutes 10 --clients 64 --json soak.json

Clients ask a random adapter, or the plain model, for greedy continuations, streamed or not; some
hang up half-way. Meanwhile operators load, swap and unload adapters and try to load broken folders.

Every answer is compared, token by token, with the one that the same content gave before the storm,
when hardly anybody asked; and those are compared with plain transformers. Where the two best
tokens are closer than 1e-3 in the quiet answer, later tokens may differ: counted as a near-tie. An
answer under a name that was swapped meanwhile has to be that of a content the name had while the
request ran. Ends with status 1 if an answer is wrong, a status is 5xx or not the expected one, an
answer names a path of the server, or memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from vllm_pedro import BackboneShape, PedroConfig, PedroModel
from vllm_pedro.bench.adapters import write_pedro
from vllm_pedro.bench.servers import Server, serve
from vllm_pedro.model.reference import NEAR_TIE_MARGIN, reference_score

BASE = "base"
MAX_TOKENS = 12
CONFIGS: tuple[dict[str, Any], ...] = (
    {"r": 12},
    {"r": 4, "pooling": "mean", "activation": "gelu"},
    {"r": 8, "pooling": "max", "activation": "relu"},
    {"r": 0},
    {"r": 6, "target_modules": ["q_proj", "v_proj"], "down_bias": True},
)


@dataclass
class Plan:
    """What a soak does.

    Attributes:
        seconds: How long clients ask.
        clients: How many at once.
        contents: How many different adapters exist.
        prompts: How many different prompts.
        warm_up: Share of the time after which memory must not grow any more.
        alone: Whether the server has no other adapters, so that none may be left at the end.
    """

    seconds: float = 600.0
    clients: int = 64
    contents: int = 12
    prompts: int = 6
    seed: int = 0
    warm_up: float = 0.25
    operators: int = 3
    alone: bool = True


@dataclass
class Quiet:
    """An answer that was given while nothing else ran."""

    tokens: list[int]
    margins: list[float]


@dataclass
class Report:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    def problem(self, text: str) -> None:
        self.counts["problems"] += 1
        if len(self.problems) < 40:
            self.problems.append(text)


def make_contents(model: Path, root: Path, plan: Plan) -> list[Path]:
    """Random adapters of all kinds, each in a folder below `root`."""
    shape = BackboneShape.from_pretrained(model)
    folders = []
    for number in range(plan.contents):
        config = PedroConfig(**{"input_norm": "rms", **CONFIGS[number % len(CONFIGS)]})
        folder = root / f"content-{number}"
        folders.append(write_pedro(folder, shape, config, plan.seed + number, scale=0.15))
    return folders


BREAKAGES: dict[str, Callable[[Path], Any]] = {
    "no weights": lambda f: (f / "adapter_model.safetensors").unlink(),
    "no config": lambda f: (f / "adapter_config.json").unlink(),
    "truncated": lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:-100]
    ),
    "empty weights": lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
    "not JSON": lambda f: (f / "adapter_config.json").write_text("{"),
    "unknown key": lambda f: (f / "adapter_config.json").write_text(
        (f / "adapter_config.json").read_text().replace("{", '{"bogus": 1,', 1)
    ),
    "pickled": lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
    "a FIFO-like folder": lambda f: (
        (f / "adapter_model.safetensors").unlink(),
        (f / "adapter_model.safetensors").mkdir(),
    ),
}


class Soak:
    """One run against a server that has `root` as `--pedro-root`."""

    def __init__(
        self, server: Server, model: Path, root: Path, plan: Plan, base: str = BASE
    ) -> None:
        self.server, self.model, self.root, self.plan, self.base = server, model, root, plan, base
        self.random = random.Random(plan.seed)
        self.report = Report()
        self.contents = make_contents(model, root, plan)
        self.prompts = self._make_prompts()
        self.quiet: dict[tuple[int | None, int], Quiet] = {}
        # name -> [(first moment, last moment, content)]; a swap's old and new overlap while it runs
        self.names: dict[str, list[list[Any]]] = {}
        # A connection for each request: one that waits may be closed as it is used again.
        once = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.client = openai.AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key="-",
            max_retries=0,
            timeout=300,
            http_client=httpx.AsyncClient(limits=once, timeout=300),
        )
        self.http = httpx.AsyncClient(base_url=server.url, limits=once, timeout=300)
        self._spare = 0

    def _make_prompts(self) -> list[list[int]]:
        common = [self.random.randrange(100, 40_000) for _ in range(32)]
        prompts = []
        for number in range(self.plan.prompts):
            own = [self.random.randrange(100, 40_000) for _ in range(4 + 7 * number)]
            prompts.append(common + own if number % 2 else own)
        return prompts

    # Requests.

    async def ask(self, name: str, prompt: int, stream: bool, hang_up: bool) -> list[int] | None:
        """The tokens of an answer; None if the adapter was gone."""
        keywords: dict[str, Any] = {
            "model": name,
            "prompt": self.prompts[prompt],
            "max_tokens": MAX_TOKENS,
            "temperature": 0.0,
            "extra_body": {"return_token_ids": True, "ignore_eos": True},
        }
        tokens: list[int] = []
        try:
            if stream:
                answer = await self.client.completions.create(stream=True, **keywords)
                async for chunk in answer:
                    tokens += getattr(chunk.choices[0], "token_ids", None) or []
                    if hang_up and len(tokens) >= 4:
                        await answer.close()
                        self.report.counts["hung up"] += 1
                        break
            else:
                whole = await self.client.completions.create(**keywords)
                tokens = whole.choices[0].token_ids  # type: ignore[attr-defined]
        except openai.APIStatusError as error:
            self.report.statuses[error.status_code] += 1
            self._check_text(error.message)
            if error.status_code in (400, 404) and name in self._spare_names():
                self.report.counts["refused after unload"] += 1
            else:
                self.report.problem(f"{name}: {error.status_code}: {error.message[:300]}")
            return None
        except openai.APIError as error:  # an error inside a stream
            code = (error.body or {}).get("code") if isinstance(error.body, dict) else None
            self.report.statuses[int(code or 0)] += 1
            self._check_text(str(error))
            if code in (400, 404) and name in self._spare_names():
                self.report.counts["refused after unload"] += 1
            else:
                self.report.problem(f"{name}: in a stream: {str(error)[:300]}")
            return None
        self.report.statuses[200] += 1
        return list(tokens)

    def _spare_names(self) -> set[str]:
        return {name for name in self.names if name.startswith("spare")}

    def _check_text(self, text: str) -> None:
        if str(self.root) in text or "Traceback" in text or 'File "' in text:
            self.report.problem(f"an answer tells too much: {text[:300]}")

    def compare(self, tokens: list[int], content: int | None, prompt: int) -> str:
        """ "equal", "near-tie" or "wrong"."""
        expected = self.quiet[content, prompt]
        for token, best, margin in zip(tokens, expected.tokens, expected.margins, strict=False):
            if margin < NEAR_TIE_MARGIN:
                return "near-tie"
            if token != best:
                return "wrong"
        return "equal"

    async def ask_and_check(self, name: str, stream: bool, hang_up: bool) -> None:
        prompt = self.random.randrange(len(self.prompts))
        before = time.monotonic()
        tokens = await self.ask(name, prompt, stream, hang_up)
        after = time.monotonic()
        if tokens is None:
            return
        if not hang_up and len(tokens) != MAX_TOKENS:
            self.report.problem(f"{name}: {len(tokens)} tokens")
        possible: list[int | None] = [None]
        if name != self.base:
            spans = self.names[name]
            possible = [
                content for first, last, content in spans if first <= after and last >= before
            ]
        results = [self.compare(tokens, content, prompt) for content in possible]
        best = next((r for r in ("equal", "near-tie") if r in results), "wrong")
        self.report.counts[best] += 1
        if best == "wrong":
            like = [
                c for c, p in self.quiet if p == prompt and self.compare(tokens, c, p) == "equal"
            ]
            self.report.problem(
                f"{name}, prompt {prompt}: {tokens}; of contents {possible}, but like {like}"
            )

    # Operators.

    async def post(self, path: str, **body: Any) -> httpx.Response:
        answer = await self.http.post(f"/v1/{path}", json=body)
        self.report.statuses[answer.status_code] += 1
        self._check_text(answer.text)
        return answer

    async def load(
        self, name: str, content: int, folder: Path | None = None, start: float | None = None
    ) -> None:
        """Load or swap; the name has both contents while that runs."""
        spans = self.names.get(name, [])
        span = [start or time.monotonic(), float("inf"), content]
        previous = spans[-1] if spans else None
        spans.append(span)
        answer = await self.post(
            "load_lora_adapter",
            lora_name=name,
            lora_path=str(folder or self.contents[content]),
            load_inplace=True,
        )
        if answer.status_code != 200:
            self.report.problem(f"load of {name}: {answer.status_code} {answer.text[:300]}")
        elif previous is not None:
            previous[1] = time.monotonic()
        del spans[:-50]
        self.names[name] = spans  # clients ask for it from now on
        self.report.counts["swaps" if previous else "loads"] += 1

    async def swap_in_place(self, name: str, folder: Path) -> None:
        """Overwrite a folder with other content, then reload it."""
        content = self.random.randrange(len(self.contents))
        files = list(self.contents[content].iterdir())
        for file in files:
            shutil.copyfile(file, folder / f".{file.name}")
        # From here on the former content can only be had from memory; where it has left that, a
        # request gets the new one.
        start = time.monotonic()
        for file in files:
            (folder / f".{file.name}").replace(folder / file.name)
        await self.load(name, content, folder, start)

    async def break_something(self, victim: str) -> None:
        """Try to put a broken folder under a name that serves, or under a new one."""
        kind = self.random.choice(list(BREAKAGES))
        with tempfile.TemporaryDirectory(dir=self.root, prefix="bad-") as place:
            folder = Path(place) / "adapter"
            shutil.copytree(self.contents[0], folder)
            BREAKAGES[kind](folder)
            name = self.random.choice([victim, "never"])
            answer = await self.post(
                "load_lora_adapter", lora_name=name, lora_path=str(folder), load_inplace=True
            )
        if answer.status_code != 400 or len(answer.json()["error"]["message"]) < 20:
            self.report.problem(f"{kind}: {answer.status_code} {answer.text[:300]}")
        self.report.counts["bad folders"] += 1

    async def operate(self, number: int) -> None:
        swapped, spare = f"swap-{number}", f"spare-{number}"
        folder = self.root / f"place-{number}"
        await self.load(swapped, number % len(self.contents))
        while not self._over():
            await asyncio.sleep(self.random.uniform(0.05, 0.6))
            action = self.random.random()
            if action < 0.3:
                await self.load(swapped, self.random.randrange(len(self.contents)))
            elif action < 0.5:
                await self.swap_in_place(swapped, folder)
            elif action < 0.75:
                await self.break_something(swapped)
            else:
                # Its name stays in the clients' minds after it is gone.
                await self.load(spare, self.random.randrange(len(self.contents)))
                await asyncio.sleep(self.random.uniform(0.0, 1.5))
                answer = await self.post("unload_lora_adapter", lora_name=spare)
                if answer.status_code != 200:
                    self.report.problem(f"unload: {answer.status_code} {answer.text[:200]}")
                self.report.counts["unloads"] += 1

    # The run.

    def _over(self) -> bool:
        return time.monotonic() > self._end

    async def _client(self) -> None:
        while not self._over():
            name = self.base
            if self.random.random() > 0.15:
                name = self.random.choice(list(self.names))
            stream = self.random.random() < 0.5
            hang_up = stream and self.random.random() < 0.25
            await self.ask_and_check(name, stream, hang_up)
            await asyncio.sleep(self.random.uniform(0, 0.05))

    async def _watch_memory(self) -> None:
        while not self._over():
            resident = self.server.resident_bytes()
            self.report.memory.append((time.monotonic() - self._start, resident))
            if len(self.report.memory) % 6 == 0:
                now = f"{self.report.memory[-1][0]:.0f} s, {resident >> 20} MiB"
                print(now, dict(self.report.counts), file=sys.stderr, flush=True)
            await asyncio.sleep(min(5.0, self.plan.seconds / 24))

    async def ask_quietly(self) -> None:
        """Every content with every prompt, a few at a time."""
        for number, folder in enumerate(self.contents):
            await self.load(f"tenant-{number}", number, folder)
        few = asyncio.Semaphore(4)

        async def ask(content: int | None, prompt: int) -> None:
            async with few:
                self.quiet[content, prompt] = await self._ask_quietly(content, prompt)

        contents = (None, *range(len(self.contents)))
        await asyncio.gather(*(ask(c, p) for c in contents for p in range(len(self.prompts))))

    async def _ask_quietly(self, content: int | None, prompt: int) -> Quiet:
        answer = await self.client.completions.create(
            model=self.base if content is None else f"tenant-{content}",
            prompt=self.prompts[prompt],
            max_tokens=MAX_TOKENS,
            temperature=0.0,
            logprobs=2,
            extra_body={
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                "ignore_eos": True,
            },
        )
        choice = answer.choices[0]
        assert choice.logprobs is not None
        margins = []
        for best in choice.logprobs.top_logprobs or []:
            values = sorted(best.values(), reverse=True)
            margins.append(values[0] - values[1])
        return Quiet(list(choice.token_ids), margins)  # type: ignore[attr-defined]

    def check_quiet_answers(self) -> None:
        """They are the reference's; and contents can be told apart by them."""
        import torch
        from transformers import AutoModelForCausalLM

        backbone: Any = AutoModelForCausalLM.from_pretrained(
            self.model, dtype=torch.float32, attn_implementation="eager"
        )
        for content in (None, *range(len(self.contents))):
            model = backbone
            if content is not None:
                model = PedroModel.from_pretrained(backbone, self.contents[content])
            for prompt, prompt_tokens in enumerate(self.prompts):
                quiet = self.quiet[content, prompt]
                reference = reference_score(model, prompt_tokens, quiet.tokens)
                for step, (token, best) in enumerate(
                    zip(quiet.tokens, reference.greedy, strict=True)
                ):
                    if reference.margins[step] < NEAR_TIE_MARGIN:
                        self.report.counts["reference: near-tie"] += 1
                        break
                    if token != best:
                        self.report.problem(f"quiet: content {content}, prompt {prompt}: {step}")
                        break
                else:
                    self.report.counts["reference: equal"] += 1
            if content is not None:
                model.unload()
        alike = sum(
            self.quiet[a, p].tokens == self.quiet[b, p].tokens
            for p in range(len(self.prompts))
            for a in range(len(self.contents))
            for b in range(a)
        )
        pairs = len(self.prompts) * len(self.contents) * (len(self.contents) - 1) // 2
        self.report.counts["pairs of contents"] = pairs
        self.report.counts["pairs of contents told apart"] = pairs - alike

    async def run(self) -> Report:
        """The whole soak."""
        await self.ask_quietly()
        await asyncio.to_thread(self.check_quiet_answers)
        for number in range(self.plan.operators):
            shutil.copytree(self.contents[0], self.root / f"place-{number}")
        self._start = time.monotonic()
        self._end = self._start + self.plan.seconds
        tasks: list[Awaitable[None]] = [self._watch_memory()]
        tasks += [self.operate(number) for number in range(self.plan.operators)]
        tasks += [self._client() for _ in range(self.plan.clients)]
        await asyncio.gather(*tasks)
        for name in list(self.names):
            await self.post("unload_lora_adapter", lora_name=name)
        if self.plan.alone:
            self.report.counts["leftover adapters"] = await self._leftovers()
        await self.client.close()
        await self.http.aclose()
        return self.report

    async def _leftovers(self) -> int:
        """Adapters that are still in memory, although all names are unloaded and nobody asks."""
        left = 0
        for _ in range(20):
            text = (await self.http.get("/metrics")).text
            lines = [line for line in text.splitlines() if "pedro_adapters_resident{" in line]
            left = int(sum(float(line.rpartition(" ")[2]) for line in lines))
            if not left:
                break
            await asyncio.sleep(0.5)
        return left

    def memory_growth(self) -> tuple[float, float]:
        """Resident memory after warm-up and at the end, in MiB: medians of a sixth of the time."""
        after = self.plan.seconds * self.plan.warm_up
        width = self.plan.seconds / 6
        early = [m for t, m in self.report.memory if after <= t <= after + width]
        late = [m for t, m in self.report.memory if t >= self.plan.seconds - width]
        return statistics.median(early) / 2**20, statistics.median(late) / 2**20


def flags(root: Path) -> list[str]:
    """How the soak's server is started."""
    return [
        *("--served-model-name", BASE),
        *("--enforce-eager", "--dtype", "float32", "--max-model-len", "256"),
        *("--kv-cache-memory-bytes", str(256 << 20), "--max-num-seqs", "16"),
        *("--enable-pedro", "--max-pedros", "4", "--max-cpu-pedros", "8"),
        *("--pedro-root", str(root), "--uvicorn-log-level", "warning"),
    ]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="default: the demo's")
    parser.add_argument("--log", type=Path, help="where the server's log goes")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument(
        "--max-growth", type=float, default=3.0, help="in %% after warm-up (%(default)s)"
    )
    args = parser.parse_args()
    from vllm_pedro.fetch import fetch_model

    # Ends through the blocks below, which stop the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    model = args.model or fetch_model(progress=False)
    plan = Plan(seconds=60 * args.minutes, clients=args.clients, seed=args.seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        root = Path(place) / "root"
        root.mkdir()
        log = args.log or Path(place) / "server.log"
        with serve(model, flags(root), log, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as server:
            soak = Soak(server, model, root, plan)
            report = asyncio.run(soak.run())
            early, late = soak.memory_growth()
    growth = 100 * (late / early - 1)
    figures = {
        "seconds": plan.seconds,
        "clients": plan.clients,
        "counts": dict(report.counts),
        "statuses": dict(report.statuses),
        "memory_mib": {"after warm-up": early, "at the end": late, "growth_percent": growth},
        "problems": report.problems,
    }
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    server_errors = sum(n for status, n in report.statuses.items() if status >= 500)
    failed = report.problems or server_errors or growth > args.max_growth
    return 1 if failed or report.counts["leftover adapters"] else 0


if __name__ == "__main__":
    sys.exit(main())
