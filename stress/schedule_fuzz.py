"""Random workloads on random engines, every answer compared with the reference.

A case is one workload: requests that arrive, run and are aborted at drawn engine steps. It is fixed
by (seed, case number). Ten cases in a row share an engine, its prefix cache and the sequences that
later cases go on with, so `--case N` replays its engine's cases up to N.

    python stress/schedule_fuzz.py --cases 2000 --seed 0 --json report.json
    python stress/schedule_fuzz.py --seed 0 --case 123
    python stress/schedule_fuzz.py --runner v2
    python stress/schedule_fuzz.py --mixed
"""

from __future__ import annotations

import os

# Threads that spin while they wait make a step ten times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

# Engines for tests; pytest has this folder on its path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

# isort: split
from architectures import make
from engines import Mismatch, Oracle, make_tiny_model, start_engine, write_random_adapter
from runners import current_runner, triton_operators, use_v2

# isort: split
import torch

from vllm_pedro import BackboneShape, PedroModel
from vllm_pedro.architectures import EXPERTS_UP, MODULES
from vllm_pedro.model.reference import NEAR_TIE_MARGIN, reference_logits

BLOCK = 32  # the smallest that vLLM's CPU attention takes
CASES_PER_ENGINE = 10
VOCABULARY = 128
EOS = 2  # of the tiny model's generation_config.json
LOGPROB_TOLERANCE = 5e-4
IDLE_STEPS = 30  # as many steps in which no request gets on are a hang
MOST_STEPS = 5000  # nor may a case take more than these, however busy

ADAPTERS: dict[str, dict[str, Any]] = {
    "last": {"r": 4, "down_scale": 15.0},
    "last-gelu": {
        "r": 8, "activation": "gelu", "down_scale": 15.0,
        "target_modules": ["v_proj", "k_proj", "gate_proj"],
    },
    "mean": {
        "r": 4, "pooling": "mean", "activation": "gelu", "down_scale": 30.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
    },
    "max": {
        "r": 4, "pooling": "max", "activation": "relu", "down_scale": 15.0,
        "target_modules": ["q_proj", "v_proj"],
    },
    "static": {"r": 0},
    "raw": {
        "r": 2, "activation": ["relu", "rational", "gelu"], "input_norm": None, "down_scale": 8.0,
        "target_modules": ["up_proj"],
    },
    "mean-rational": {
        "r": 12, "pooling": "mean", "down_scale": 30.0, "target_modules": ["v_proj", "up_proj"],
        "down_bias": True,
    },
    "rank-1": {
        "r": 1, "activation": "relu", "down_scale": 30.0, "target_modules": ["v_proj"],
        "down_bias": True,
    },
    # The content of "last" in another folder: one digest, so these two share slots and KV blocks.
    "twin": {"r": 4, "down_scale": 15.0},
}  # fmt: skip
ANSWERS: dict[str, dict[str, Any]] = {
    "answer": {"r": 4, "down_scale": 15.0, "scope": "answer", "down_bias": True},
    "answer-static": {
        "r": 0, "scope": "answer", "target_modules": ["v_proj", "k_proj", "gate_proj"],
    },
}  # fmt: skip
"""Adapters of scope "answer", in place of others of a case: see `draw_case`."""
IN_PLACE_OF = {"last": "answer", "twin": "answer", "mean": "answer", "static": "answer-static"}
ALL_MODULES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
DEFAULT_MODULES = ("q_proj", "v_proj", "up_proj")
MIXED: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen2MoeForCausalLM": {  # dense layers, experts and a shared one
        "hidden_size": 128, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    },
    "Gemma4ForCausalLM": {},  # layers of different widths
    "FalconForCausalLM": {},  # no gate; Q, K and V by head
    "GPT2LMHeadModel": {},
    "CohereForCausalLM": {},  # attention beside the MLP
    "Llama4ForCausalLM": {},  # rows of Q and K permuted; layers without an MLP
}  # fmt: skip
"""Architectures that `--mixed` draws, with changes of their sizes."""
BLOCKS_PER_TOKEN = {"Gemma4ForCausalLM": 3}
"""How many KV blocks a sequence takes for each that others take: layers of different kinds have
blocks of their own."""
OF_TWO_RANKS = ("LlamaForCausalLM", "Qwen2MoeForCausalLM")


class Hang(RuntimeError):
    """Requests are left, but no step gets on with any of them."""


class Leftover(AssertionError):
    """Something is still held after the last request of a case."""


class WrongRefusal(AssertionError):
    """A request that should be served was refused, or the other way round."""


@dataclass
class Draw:
    """One request as drawn.

    Attributes:
        adapter: Name in `ADAPTERS`, or None for a base row.
        prompt: Token ids; of a follow-up, those that come after the sequence it goes on with.
        prompt_length: P as the request states it, or None for the whole prompt.
        follows: "earlier N" for a sequence of this engine, which N indexes (modulo), or None.
        keeps_length: Whether a follow-up keeps the P of what it goes on with.
        arrives: Engine step, counted from the start of the case.
        aborted: How many steps after its arrival it is aborted, or None.
        name, number: Of the `PedroRequest`; drawn from few, as they must not matter.
    """

    adapter: str | None
    prompt: list[int]
    prompt_length: int | None = None
    follows: int | None = None
    keeps_length: bool = True
    arrives: int = 0
    aborted: int | None = None
    max_tokens: int = 8
    min_tokens: int = 0
    ignore_eos: bool = True
    stop_token_ids: list[int] = field(default_factory=list)
    temperature: float = 0.0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    name: str = "x"
    number: int = 1


@dataclass
class Sequence:
    """A sequence that a later request may go on with."""

    tokens: list[int]
    adapter: str | None
    prompt_length: int


@dataclass
class Active:
    """A request in the engine."""

    draw: Draw
    prompt: list[int]
    prompt_length: int  # P in effect
    arrived: int
    ended: int = 0
    completions: dict[int, Any] = field(default_factory=dict)
    prompt_logprobs: Any = None
    finished: bool = False
    was_aborted: bool = False


@dataclass
class Failure:
    """What a case found."""

    case: int
    kind: str
    message: str
    request: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None


@dataclass
class Report:
    """What all cases did."""

    seed: int = 0
    cases: int = 0
    engines: int = 0
    seconds: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)
    settings: dict[str, Counter[str]] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    checked_tokens: int = 0
    worst_logprob_error: float = 0.0
    near_ties: int = 0
    near_tie_flips: int = 0
    ill_conditioned: int = 0
    failures: list[Failure] = field(default_factory=list)

    @property
    def blind_spots(self) -> list[str]:
        """What a run of any size is there for and this one did not meet."""
        wanted = {
            "nothing was preempted": "preempted with adapter",
            "the prefix cache was never hit": "prefix hits with adapter",
            "no drafted token was accepted": "drafted tokens accepted",
            "no base prompt was chunked": "chunked prompts",
            "nothing was refused": "refused",
            "nothing was aborted": "aborted",
        }
        return [message for message, event in wanted.items() if not self.events[event]]


class Judge:
    """Compares what an engine answered with the reference."""

    def __init__(self, model: Path, adapters: dict[str, Path]) -> None:
        from transformers import AutoModelForCausalLM

        # All now, as loading draws random numbers. The backbone by itself applies no adapter.
        backbone = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        )
        self._backbone = backbone
        first, *others = adapters.items()
        self._model = PedroModel.from_pretrained(backbone, first[1], first[0])
        for name, path in others:
            self._model.load_adapter(path, name)

    def logits(self, adapter: str | None, tokens: list[int], prompt_length: int) -> torch.Tensor:
        """The reference's logits after every token."""
        return reference_logits(self._with(adapter), tokens, prompt_length)

    def _with(self, adapter: str | None) -> Any:
        if adapter is None:
            return self._backbone
        self._model.set_adapter(adapter)
        return self._model

    def check(self, active: Active, index: int, max_model_len: int, report: Report) -> None:
        """One completion, finished or cut short by an abort.

        Raises:
            Mismatch: It is not what the reference says.
        """
        draw, completion = active.draw, active.completions[index]
        tokens = list(completion.token_ids)
        if not active.was_aborted and completion.finish_reason != "error":
            _check_end(draw, len(active.prompt), tokens, completion.finish_reason, max_model_len)
        logits = self.logits(draw.adapter, active.prompt + tokens, active.prompt_length)
        start = len(active.prompt) - 1
        raw = torch.log_softmax(logits, -1)
        if active.prompt_logprobs is not None and index == 0 and tokens:
            self._check_logprobs(active, tokens, 0, active.prompt_logprobs[1:], raw[:start], report)
        if completion.logprobs is not None:
            rows = raw[start:-1]
            self._check_logprobs(active, tokens, start, completion.logprobs, rows, report)
        report.checked_tokens += len(tokens)
        if draw.temperature > 0 or not tokens:
            return
        rows = logits[start:-1].clone()
        rows[: draw.min_tokens, [EOS, *draw.stop_token_ids]] = -torch.inf
        top = rows.topk(2)
        margins = (top.values[:, 0] - top.values[:, 1]).tolist()
        report.near_ties += sum(m < NEAR_TIE_MARGIN for m in margins)
        for step, (token, best) in enumerate(zip(tokens, top.indices[:, 0].tolist(), strict=True)):
            if token == best:
                continue
            # The reference scores the engine's own tokens, so it can go on after a near-tie.
            gap = float(rows[step, best] - rows[step, token])
            if gap >= NEAR_TIE_MARGIN:
                raise Mismatch(f"token {step} is {token}, not {best}, which is {gap:.4f} better")
            report.near_tie_flips += 1

    def _check_logprobs(
        self,
        active: Active,
        tokens: list[int],
        first: int,
        entries: Any,
        rows: torch.Tensor,
        report: Report,
    ) -> None:
        """Rows and entries are those after token `first` of the sequence, and on."""
        if len(entries) != len(rows):
            raise Mismatch(f"{len(entries)} log probabilities of {len(rows)} after token {first}")
        for step, (entry, row) in enumerate(zip(entries, rows.tolist(), strict=True), first):
            for token, value in entry.items():
                error = abs(value.logprob - row[token])
                if not error <= LOGPROB_TOLERANCE:
                    # Some random weights make a large difference of a rounding.
                    if not error <= 4 * self._effect_of_rounding(active, tokens, step, token):
                        raise Mismatch(
                            f"after token {step}: log probability of {token} off by {error:.2e}"
                        )
                    report.ill_conditioned += 1
                    continue
                report.worst_logprob_error = max(report.worst_logprob_error, error)

    def _effect_of_rounding(
        self, active: Active, tokens: list[int], step: int, token: int
    ) -> float:
        """How far a log probability moves when each weight moves by half of its last bit."""
        model = self._with(active.draw.adapter)
        weights = [(p, p.detach().clone()) for p in model.parameters()]
        generator = torch.Generator().manual_seed(0)
        found = []
        for size in (0.0, *[6e-8] * 6):
            with torch.no_grad():
                for parameter, weight in weights:
                    noise = torch.randn(weight.shape, generator=generator)
                    parameter.copy_(weight * (1 + size * noise))
            logits = self.logits(active.draw.adapter, active.prompt + tokens, active.prompt_length)
            found.append(float(torch.log_softmax(logits[step], -1)[token]))
        with torch.no_grad():
            for parameter, weight in weights:
                parameter.copy_(weight)
        return max(abs(other - found[0]) for other in found)


def _check_end(
    draw: Draw, prompt: int, tokens: list[int], reason: str | None, max_model_len: int
) -> None:
    stops = {*draw.stop_token_ids} | (set() if draw.ignore_eos else {EOS})
    limit = min(draw.max_tokens, max_model_len - prompt)
    for count, token in enumerate(tokens, 1):
        ends = "stop" if token in stops else "length" if count == limit else None
        if (ends is not None) != (count == len(tokens)) or (ends and ends != reason):
            raise Mismatch(f"ended with {reason!r} after {len(tokens)} tokens, {ends!r} at {count}")
    if not tokens:
        raise Mismatch(f"ended with {reason!r} without a token")


class Workshop:
    """The model (a tiny one unless given), its adapters and the judge, made once a run.

    Attributes:
        model: Its folder.
        architecture: Its class's name.
        adapters: Folders by name.
        configs: What each was made with.
    """

    def __init__(
        self, folder: Path, model: Path | None = None, architecture: str | None = None
    ) -> None:
        self.architecture = architecture or "LlamaForCausalLM"
        self.model = model or folder / "model"
        if not self.model.exists():
            if architecture is None:
                make_tiny_model(self.model)
            else:
                make(architecture, self.model, **MIXED[architecture])
        shape = BackboneShape.from_pretrained(self.model)
        layers = shape.num_layers
        self.adapters, self.configs = {}, {}
        for number, (name, config) in enumerate((ADAPTERS | ANSWERS).items()):
            seed = 0 if name == "twin" else number
            config = {**config, "scale": 0.2}
            if architecture is not None:
                config |= _draw_rank_and_modules(architecture, name, config, shape)
            self.configs[name] = config
            if isinstance(kinds := config.get("activation"), list):
                config["activation"] = (kinds * layers)[:layers]
            if model is not None:
                # A trained model's residual stream is larger, and raw ones by far.
                raw = config.get("input_norm", "rms") is None
                config |= {"down_scale": 1.0, "scale": 0.002 if raw else 0.03}
            self.adapters[name] = write_random_adapter(
                self.model, folder / name, seed=seed, **config
            )
        self.judge = Judge(self.model, self.adapters)
        oracle = Oracle(self.model)
        self.largest = max(oracle.adapter_bytes(folder) for folder in self.adapters.values())


def _draw_rank_and_modules(
    architecture: str, name: str, config: dict[str, Any], shape: BackboneShape
) -> dict[str, Any]:
    """An adapter's rank, and those of its modules that a model has."""
    name = "last" if name == "twin" else name
    rng = random.Random(f"{architecture}:{name}")
    modules = [m for m in config.get("target_modules", DEFAULT_MODULES) if shape.widths[m]]
    if shape.widths[EXPERTS_UP] and rng.random() < 0.5:
        modules.append(EXPERTS_UP)
    return {
        "r": config["r"] and rng.choice([1, 2, 3, 5, 8, 12]),
        "target_modules": modules or ["v_proj"],
    }


# Drawing.


def draw_settings(
    seed: int, group: int, compiled: bool = False, runner: str = "v1"
) -> dict[str, Any]:
    """Engine settings of a group of cases: on V2 the same as on V1, half of them asynchronous."""
    rng = random.Random(f"{seed}:engine:{group}")
    max_model_len = rng.choice([128, 160, 192, 256])
    budget = rng.choice([24, 32, 33, 48, 64, 65, 96, 128, 200, 512])
    blocks = -(-max_model_len // BLOCK) + 1  # one is the null block
    caching = rng.random() < 0.7
    max_pedros = rng.randint(1, 4)
    settings: dict[str, Any] = {
        "max_model_len": max_model_len,
        "max_num_batched_tokens": budget,
        "max_num_seqs": rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 8]),
        "num_gpu_blocks_override": blocks + rng.choice([0, 0, 0, 0, 1, 2, 4, 64]),
        "enable_prefix_caching": caching,
        "max_pedros": max_pedros,
        "max_cpu_pedros": rng.choice([None, max_pedros, max_pedros + 1, 16]),
        "scheduling_policy": rng.choice(["fcfs", "fcfs", "priority"]),
    }
    drafts = rng.choice([0, 0, 2, 4]) if group % 2 else 0  # the first such engine compiles for 5 s
    if drafts:
        settings["speculative_config"] = {
            "num_speculative_tokens": drafts, "prompt_lookup_max": 3, "prompt_lookup_min": 1,
        }  # fmt: skip
    if rng.random() < 0.25:
        settings["long_prefill_token_threshold"] = rng.choice([20, 40, 70])
    if rng.random() < 0.15 and budget >= max_model_len:
        settings["enable_chunked_prefill"] = False
    if rng.random() < 0.15:
        settings["pedro_target_modules"] = ["q_proj", "v_proj", "up_proj"]
    if rng.random() < 0.1:
        settings["max_pedro_rank"] = 4
    if runner == "v2":
        settings["async_scheduling"] = rng.random() < 0.5
        # Not the engine's: taken out before it starts.
        settings["operators"] = rng.choice(["native", "native", "triton"])
    if compiled:
        settings["enforce_eager"] = False
    # Adapters of the largest size that the device holds; None: all of them. By a generator of its
    # own, so that the other settings of a seed stay what they were.
    settings["memory"] = random.Random(f"{seed}:memory:{group}").choice([None, 1, 1.5, 3])
    # Milliseconds that each adapter takes longer to be read.
    settings["late"] = random.Random(f"{seed}:late:{group}").choice([0, 0, 4, 30])
    # Whether KV blocks are moved out of the device and back in.
    settings["offload"] = caching and random.Random(f"{seed}:offload:{group}").random() < 0.25
    return settings


def draw_kind(seed: int, group: int) -> tuple[str, str | None]:
    """A group's architecture, and whether its engine has two ranks: "tensor", "pipeline" or not."""
    rng = random.Random(f"{seed}:kind:{group}")
    architecture = rng.choice(list(MIXED))
    ranks = rng.choice(["tensor", "pipeline"]) if rng.random() < 0.25 else None
    return rng.choice(OF_TWO_RANKS) if ranks else architecture, ranks


def of_two_ranks(settings: dict[str, Any], ranks: str) -> None:
    """Change settings of an engine to those of one with two ranks."""
    settings |= {f"{ranks}_parallel_size": 2, "distributed_executor_backend": "mp"}
    # Done in this process alone, or, with pipelines, not vLLM's.
    settings |= {"late": 0, "offload": False}
    if "operators" in settings:
        settings["operators"] = "native"
    if ranks == "pipeline":
        settings.pop("speculative_config", None)


def step_limit(settings: dict[str, Any]) -> int:
    """The longest P that one step takes: what the documentation promises, worked out anew."""
    threshold = settings.get("long_prefill_token_threshold", 0)
    budget = settings["max_num_batched_tokens"]
    return min(budget, threshold) if threshold else budget


def draw_families(seed: int, group: int) -> list[list[int]]:
    """Texts that an engine's prompts are cut from; two share a prefix, one repeats itself."""
    rng = random.Random(f"{seed}:text:{group}")
    texts = [[rng.randrange(3, VOCABULARY) for _ in range(260)] for _ in range(2)]
    shared = rng.choice([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 5])
    texts.append(texts[0][:shared] + [rng.randrange(3, VOCABULARY) for _ in range(260 - shared)])
    loop = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 9))]
    texts.append((loop * 260)[:260])
    return texts


@dataclass
class Case:
    """One workload.

    Attributes:
        draws: Its requests.
        reset: Step at which all running requests lose their KV and the cache is emptied, or None.
        gone: (adapter, from step, to step): its folder is away for a while, or None.
    """

    draws: list[Draw]
    reset: int | None
    gone: tuple[str, int, int] | None


def draw_case(seed: int, case: int, settings: dict[str, Any], families: list[list[int]]) -> Case:
    """The case with this number."""
    rng = random.Random(f"{seed}:case:{case}")
    limit, longest = step_limit(settings), settings["max_model_len"] - 1
    few: list[str | None] = [*ADAPTERS, None, None]
    if rng.random() < 0.7:
        # Else two requests with one adapter hardly ever share a prefix.
        few = random.Random(f"{seed}:few:{case // CASES_PER_ENGINE}").sample(few, 3)
    draws: list[Draw] = []
    for _ in range(rng.randint(2, 10)):
        draws.append(_draw_request(rng, draws, few, families, limit, longest))
    if rng.random() < 0.4:
        # All at once and long answers: what it takes to run out of KV blocks.
        for draw in draws:
            draw.arrives = rng.randint(0, 3)
            draw.max_tokens = max(draw.max_tokens, rng.randint(25, 40))
    if "speculative_config" in settings:
        # vLLM 0.32's CPU rejection sampler gives greedy rows random tokens if a sampled row is in
        # the batch, with and without PEDRO: a case is either all greedy or all sampled.
        sampled = rng.random() < 0.15
        for draw in draws:
            draw.temperature, draw.n = (1.0, draw.n) if sampled else (0.0, 1)
            draw.logprobs = draw.logprobs or 0 if sampled else draw.logprobs
            # vLLM 0.32 forbids the stop tokens for the token after accepted drafts too, though
            # min_tokens is reached by then, with and without PEDRO.
            draw.min_tokens = 0
    reset = rng.randint(1, 40) if rng.random() < 0.05 else None
    gone = None
    with_adapter = [draw for draw in draws if draw.adapter is not None]
    if rng.random() < 0.25 and with_adapter:
        draw = rng.choice(with_adapter)
        start = draw.arrives + 1
        gone = (str(draw.adapter), start, start + rng.randint(1, 60))
    # By a generator of its own, so that the other cases of a seed stay what they were.
    rng = random.Random(f"{seed}:answer:{case}")
    if rng.random() < 0.5:
        shift = rng.choice([0, 0, BLOCK, 3 * BLOCK])
        for draw in draws:
            draw.adapter = IN_PLACE_OF.get(str(draw.adapter), draw.adapter)
            if draw.adapter in ANSWERS and draw.prompt_length and rng.random() < 0.5:
                # Longer than a step takes, which these may be.
                draw.prompt_length = min(draw.prompt_length + shift, max(1, len(draw.prompt)))
        if gone is not None:
            gone = (IN_PLACE_OF.get(gone[0], gone[0]), *gone[1:])
    return Case(draws, reset, gone)


def _draw_request(
    rng: random.Random,
    before: list[Draw],
    adapters: list[str | None],
    families: list[list[int]],
    limit: int,
    longest: int,
) -> Draw:
    draw = Draw(rng.choice(adapters), [])
    near = [limit - 1, limit, limit] + ([limit + 1] if rng.random() < 0.2 else [])
    aligned = [k * BLOCK + d for k in range(1, 8) for d in (-1, 0, 1)]
    kind = rng.random()
    if kind < 0.25 and before:
        # The text of an earlier request of this case, again or under another adapter.
        other = rng.choice(before)
        draw.adapter = other.adapter if rng.random() < 0.6 else draw.adapter
        draw.prompt, draw.follows = list(other.prompt), other.follows
        draw.prompt_length, draw.keeps_length = other.prompt_length, other.keeps_length
        if rng.random() < 0.5 and draw.prompt_length is None and draw.prompt:
            # Another ending, and so other vectors for the blocks before it.
            draw.prompt[rng.randint(len(draw.prompt) // 2, len(draw.prompt) - 1) :] = [
                rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 3))
            ]
    elif kind < 0.45:
        draw.follows = rng.randrange(1 << 20)
        draw.keeps_length = rng.random() < 0.8
        draw.prompt = [rng.randrange(3, VOCABULARY) for _ in range(rng.choice([0, 1, 5, 33]))]
    else:
        lengths = (
            aligned if rng.random() < 0.4 else [rng.randint(1, longest), 1, 2, rng.randint(1, 40)]
        )
        if draw.adapter is not None and rng.random() < 0.3:
            lengths = near
        elif draw.adapter is not None and rng.random() < 0.85:
            lengths = [n for n in lengths if n <= limit] or [rng.randint(1, limit)]
        length = max(1, rng.choice(lengths))
        if length > longest and rng.random() < 0.9:
            length = longest
        draw.prompt = families[rng.randrange(len(families))][:length]
        if rng.random() < 0.3:
            draw.prompt = [*draw.prompt[:-1], rng.randrange(3, VOCABULARY)]
        if draw.adapter is not None and rng.random() < 0.2:
            # P inside a longer text, as in the later turns of a conversation.
            draw.prompt_length = rng.randint(1, min(limit, len(draw.prompt)))
            if rng.random() < 0.5:
                more = min(longest, len(draw.prompt) + rng.randint(1, 80)) - len(draw.prompt)
                draw.prompt = draw.prompt + [
                    rng.randrange(3, VOCABULARY) for _ in range(max(0, more))
                ]
            if rng.random() < 0.03:
                draw.prompt_length = len(draw.prompt) + 1
    draw.max_tokens = rng.choice([1, 2, rng.randint(1, 40), rng.randint(20, 40)])
    draw.arrives = rng.choice([0, 0, 0, rng.randint(0, 10), rng.randint(0, 60)])
    if rng.random() < 0.12:
        draw.aborted = rng.choice([0, 1, 2, rng.randint(0, 30)])
    if rng.random() < 0.3:
        draw.ignore_eos = rng.random() < 0.5
        draw.stop_token_ids = rng.sample(range(VOCABULARY), rng.choice([0, 5, 30]))
        draw.min_tokens = rng.choice([0, rng.randint(0, draw.max_tokens)])
    if rng.random() < 0.15:
        draw.temperature, draw.n, draw.logprobs = 1.0, rng.choice([1, 2, 3]), 0
    elif rng.random() < 0.4:
        draw.logprobs = rng.choice([0, 0, 3])
    if draw.n == 1 and rng.random() < 0.12:
        draw.prompt_logprobs = rng.choice([0, 2])
    draw.priority = rng.randint(0, 3)
    draw.name, draw.number = rng.choice("xy"), rng.randint(1, 3)
    return draw


# Running.


class Bench:
    """One engine with its counters and the sequences it has made so far."""

    def __init__(self, llm: Any, settings: dict[str, Any], shop: Workshop, report: Report) -> None:
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.settings = settings
        self.shop = shop
        self.report = report
        self.history: list[Sequence] = []
        self.ids: Iterator[int] = iter(range(1 << 30))
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.free_blocks = self.pool.get_num_free_blocks()
        self._observe()

    def _observe(self) -> None:
        """Count what the scheduler does; nothing it does changes."""
        scheduler, events = self.scheduler, self.report.events

        def after(owner: Any, name: str, look: Callable[..., None]) -> None:
            original = getattr(owner, name)

            def observed(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                look(result, *args, **kwargs)
                return result

            setattr(owner, name, observed)

        def suffix(request: Any) -> str:
            return "with adapter" if request.pedro is not None else "base"

        def preempted(_: Any, request: Any, *args: Any, **kwargs: Any) -> None:
            events[f"preempted {suffix(request)}"] += 1

        def looked_up(_: Any, request: Any, hit: int) -> None:
            if hit:
                events[f"prefix hits {suffix(request)}"] += 1
                if request.num_preemptions:
                    events["prefix hits of resumed requests"] += 1
                if request.pedro is not None and request.num_prompt_tokens > (
                    request.pedro.prompt_length
                ):
                    events["prefix hits with tokens past P"] += 1

        def speculated(_: Any, stats: Any, drafted: int, accepted: int, *args: Any) -> None:
            events["drafted tokens"] += drafted
            events["drafted tokens accepted"] += accepted

        def scheduled(output: Any, *args: Any, **kwargs: Any) -> None:
            tokens = output.num_scheduled_tokens
            events["steps"] += bool(tokens)
            adapters = set()
            for new in output.scheduled_new_reqs:
                request = scheduler.requests[new.req_id]
                if new.num_computed_tokens + tokens[new.req_id] < request.num_prompt_tokens:
                    events["chunked prompts"] += 1
                if request.pedro is not None:
                    adapters.add(request.pedro.digest)
            events["steps that prefill several adapters"] += len(adapters) > 1

        def loaded(_: Any, request: Any, blocks: Any, count: int) -> None:
            if count:
                events[f"KV loaded from host memory {suffix(request)}"] += 1

        after(scheduler, "_preempt_request", preempted)
        if scheduler.connector is not None:
            after(scheduler.connector, "update_state_after_alloc", loaded)
        after(scheduler.kv_cache_manager, "record_prefix_cache_stats", looked_up)
        after(scheduler, "schedule", scheduled)
        spec = scheduler.make_spec_decoding_stats

        def make_stats(
            spec_decoding_stats: Any, num_draft_tokens: int, num_accepted_tokens: int, **kwargs: Any
        ) -> Any:
            speculated(None, None, num_draft_tokens, num_accepted_tokens)
            return spec(
                spec_decoding_stats,
                num_draft_tokens=num_draft_tokens,
                num_accepted_tokens=num_accepted_tokens,
                **kwargs,
            )

        scheduler.make_spec_decoding_stats = make_stats

    def run(self, case: Case) -> None:
        """One case; raises what it finds."""
        self.last: dict[str, Any] | None = None
        reset, self.gone = case.reset, case.gone
        waiting = sorted(enumerate(case.draws), key=lambda pair: (pair[1].arrives, pair[0]))
        actives: dict[str, Active] = {}
        step, idle, seen = 0, 0, None
        while waiting or self.engine.has_unfinished_requests():
            if not self.engine.has_unfinished_requests():
                step = max(step, waiting[0][1].arrives)
            self._move_folder(step)
            while waiting and waiting[0][1].arrives <= step:
                self._add(waiting.pop(0)[1], step, actives)
            for request_id, active in actives.items():
                due = active.draw.aborted
                if due is not None and not active.finished and step >= active.arrived + due:
                    self._abort(request_id, active)
            if reset is not None and step >= reset:
                reset = None
                self.report.events["cache resets under way"] += 1
                self.engine.reset_prefix_cache(True, reset_connector=self.settings["offload"])
            for output in self.engine.step():
                self._take(actives[output.request_id], output, step)
            step += 1
            state = sorted(
                (r.request_id, r.num_computed_tokens, r.num_output_tokens)
                for r in self.scheduler.requests.values()
            )
            idle = idle + 1 if state and state == seen else 0
            seen = state
            if idle >= IDLE_STEPS or step >= MOST_STEPS:
                raise Hang(
                    f"{len(state)} requests left after {step} steps, {idle} without progress"
                )
        self._move_folder(None)
        for _ in range(3):  # tell the worker about the last requests that ended
            self.engine.step()
        problem: Mismatch | None = None
        for active in actives.values():
            try:
                self._judge(active)
            except Mismatch as error:
                if problem is None:
                    problem, self.last = error, self._describe(active)
        self._check_leftovers()
        if problem is not None:
            raise problem
        self.last = None

    def _move_folder(self, step: int | None) -> None:
        """Take an adapter's folder away for the steps that the case says; None: back for good."""
        if self.gone is None:
            return
        name, start, end = self.gone
        here = self.shop.adapters[name]
        away = here.with_name(f"{name}-away")
        if step is not None and start <= step < end:
            if here.exists():
                here.rename(away)
                self.report.events["adapter folders taken away"] += 1
        elif away.exists():
            away.rename(here)

    def _add(self, draw: Draw, step: int, actives: dict[str, Active]) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        from vllm_pedro import PedroRequest

        prompt, stated, adapter = list(draw.prompt), draw.prompt_length, draw.adapter
        if draw.follows is not None:
            if self.history:
                earlier = self.history[draw.follows % len(self.history)]
                prompt = [*earlier.tokens, *prompt]
                if draw.keeps_length:
                    stated = earlier.prompt_length
                    adapter = draw.adapter and (earlier.adapter or draw.adapter)
                self.report.requests["follow-up"] += 1
            prompt = prompt or [5]
        draw = Draw(**{**asdict(draw), "adapter": adapter})
        if adapter is None:
            stated = None
        if len(prompt) == 1 and "speculative_config" in self.settings and current_runner() == "v2":
            # vLLM 0.32's V2 scheduler drafts behind a one-token prompt in its first step, and its
            # runner takes the drafts for prompt tokens, with and without PEDRO.
            draw.prompt_logprobs = None
        active = Active(draw, prompt, stated or len(prompt), step)
        self.last = self._describe(active)
        request = adapter and PedroRequest(
            draw.name, draw.number, str(self.shop.adapters[adapter]), prompt_length=stated
        )
        request_id = str(next(self.ids))
        reason = self._refusal(active)
        try:
            self.engine.add_request(
                request_id,
                {"prompt_token_ids": prompt},
                SamplingParams(
                    n=draw.n,
                    temperature=draw.temperature,
                    max_tokens=draw.max_tokens,
                    min_tokens=draw.min_tokens,
                    ignore_eos=draw.ignore_eos,
                    stop_token_ids=draw.stop_token_ids,
                    logprobs=draw.logprobs,
                    prompt_logprobs=draw.prompt_logprobs,
                    detokenize=False,
                ),
                arrival_time=float(request_id),  # priority queues break ties by it
                lora_request=request or None,
                priority=draw.priority if self.settings["scheduling_policy"] == "priority" else 0,
            )
        except (ValueError, VLLMClientError) as error:
            if reason is None:
                raise WrongRefusal(f"refused, but should be served: {error}") from error
            self.report.events["refused"] += 1
            self.report.requests[f"refused: {reason}"] += 1
            return
        if reason is not None:
            raise WrongRefusal(f"should be refused, but was taken: {reason}")
        actives[request_id] = active
        self._count(active)

    def _count(self, active: Active) -> None:
        draw, kinds = active.draw, self.report.requests
        kinds["served"] += 1
        kinds[f"adapter {draw.adapter}"] += 1
        kinds["explicit P"] += active.prompt_length < len(active.prompt)
        kinds["P is all that a step takes"] += draw.adapter is not None and (
            active.prompt_length == step_limit(self.settings)
        )
        kinds["sampled"] += draw.temperature > 0
        kinds["n > 1"] += draw.n > 1
        kinds["stop tokens"] += bool(draw.stop_token_ids) or not draw.ignore_eos
        kinds["min_tokens"] += draw.min_tokens > 0
        kinds["logprobs"] += draw.logprobs is not None
        kinds["prompt logprobs"] += draw.prompt_logprobs is not None

    def _refusal(self, active: Active) -> str | None:
        """Why a request has to be refused, by the documented limits."""
        settings, draw = self.settings, active.draw
        if draw.adapter is not None:
            if not self.shop.adapters[draw.adapter].exists():
                return "adapter folder is not there"
            config = self.shop.configs[draw.adapter]
            modules = config.get("target_modules", DEFAULT_MODULES)
            if config["r"] > settings.get("max_pedro_rank", 32):
                return "rank above max_pedro_rank"
            if not set(modules) <= set(settings.get("pedro_target_modules", ALL_MODULES)):
                return "module not in pedro_target_modules"
        if len(active.prompt) >= settings["max_model_len"]:
            return "prompt longer than the model's length"
        if draw.adapter is not None:
            if active.prompt_length > len(active.prompt):
                return "prompt_length beyond the prompt"
            needs_whole = draw.adapter not in ANSWERS and config["r"] > 0
            if active.prompt_length > step_limit(settings) and needs_whole:
                return "P longer than a step takes"
        return None

    def _abort(self, request_id: str, active: Active) -> None:
        self.engine.abort_request([request_id])
        active.finished = active.was_aborted = True
        self.report.events["aborted"] += 1
        self.report.events["aborted after the first token"] += bool(active.completions)

    def _take(self, active: Active, output: Any, step: int) -> None:
        for completion in output.outputs:
            active.completions[completion.index] = completion
        active.prompt_logprobs = output.prompt_logprobs
        if output.finished:
            active.finished, active.ended = True, step
            tokens = [*active.prompt, *active.completions[0].token_ids]
            self.history.append(Sequence(tokens, active.draw.adapter, active.prompt_length))

    def _judge(self, active: Active) -> None:
        self.report.requests["finished"] += not active.was_aborted
        if not active.was_aborted and len(active.completions) != active.draw.n:
            raise Mismatch(f"{len(active.completions)} completions of {active.draw.n}")
        failed = {c.index for c in active.completions.values() if c.finish_reason == "error"}
        self.report.events["requests that lost their adapter"] += bool(failed)
        if failed and not (
            self.gone is not None
            and self.gone[0] == active.draw.adapter
            and active.ended >= self.gone[1]
            and active.arrived < self.gone[2]
        ):
            raise Mismatch("ended with an error, but its adapter's folder was there all along")
        for index in active.completions:
            self.shop.judge.check(active, index, self.settings["max_model_len"], self.report)

    def _describe(self, active: Active) -> dict[str, Any]:
        return {
            **asdict(active.draw),
            "prompt": active.prompt,
            "P": active.prompt_length,
            "tokens": {i: list(c.token_ids) for i, c in active.completions.items()},
        }

    def _check_leftovers(self) -> None:
        scheduler = self.scheduler
        held = {
            "vector rows": self.scheduler._pedro_rows.num_read,
            "vector rows without an owner": self._lost_rows(),
            "requests in the scheduler": len(scheduler.requests),
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "deferred": len(scheduler.deferred_waiting),
            "KV blocks": self.free_blocks - self.pool.get_num_free_blocks(),
        }
        for rank, found in enumerate(self.core.collective_rpc(held_by_worker)):
            held |= {f"{what}, rank {rank}": count for what, count in found.items()}
        found = [f"{count} {what}" for what, count in held.items() if count]
        if found:
            raise Leftover("left after the case: " + ", ".join(found))

    def _lost_rows(self) -> int:
        """Rows that are neither free nor cached for a later request."""
        rows = self.scheduler._pedro_rows
        return int(self.settings["max_num_seqs"]) - len(rows._free) - len(rows._cached)


def held_by_worker(worker: Any) -> dict[str, int]:
    """What a worker holds."""
    runtime = worker.model_runner.pedro
    return {
        "requests in the runtime": len(runtime._specs) + len(runtime._rows),
        "failed requests": len(runtime.failed),
        "bytes over the budget": max(0, runtime.bank.used_bytes - runtime.bank.nbytes),
        "changed identity rows": sum(bool(v[0].any()) for v in runtime.store.vectors),
    }


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """A step that never returns is a hang too."""

    def give_up(*_: Any) -> None:
        raise Hang(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_group(
    shop: Workshop,
    seed: int,
    cases: range,
    report: Report,
    compiled: bool = False,
    on_failure: Callable[[Failure], None] | None = None,
    stop_at_failure: bool = False,
    ranks: str | None = None,
) -> None:
    """Consecutive cases of one engine; after a failure the rest get a fresh one."""
    group = cases.start // CASES_PER_ENGINE
    settings = draw_settings(seed, group, compiled, current_runner())
    settings["num_gpu_blocks_override"] *= BLOCKS_PER_TOKEN.get(shop.architecture, 1)
    if ranks is not None:
        of_two_ranks(settings, ranks)
    if any(EXPERTS_UP in config.get("target_modules", ()) for config in shop.configs.values()):
        settings.setdefault("pedro_target_modules", list(MODULES))
    families = draw_families(seed, group)
    for name, value in settings.items():
        shown = value["num_speculative_tokens"] if name == "speculative_config" else value
        report.settings.setdefault(name, Counter())[str(shown)] += 1
    todo = list(cases)
    while todo:
        report.engines += 1
        # vLLM compiles a helper of its sampler even when eager: seconds, and again for new shapes.
        stance = "default" if compiled else "force_eager"
        operators = triton_operators if settings.get("operators") == "triton" else nullcontext
        own = ("operators", "memory", "late", "offload")
        given = {k: v for k, v in settings.items() if k not in own}
        if settings["offload"]:
            from offloading import offloading  # imports vLLM, whose runner is chosen before

            given["kv_transfer_config"] = offloading()
        if settings["memory"] is not None:
            given["pedro_memory_bytes"] = int(settings["memory"] * shop.largest)
        with (
            torch.compiler.set_stance(stance),
            operators(),
            late_adapters(settings["late"] / 1000),
            start_engine(shop.model, skip_tokenizer_init=True, block_size=BLOCK, **given) as llm,
        ):
            bench = Bench(llm, settings, shop, report)
            while todo:
                case = todo.pop(0)
                report.cases += 1
                try:
                    # Sampled requests draw from here: with a seed of their own, a chunked prompt
                    # makes vLLM's CPU runner fail ("CPU Generator does not use offset").
                    torch.manual_seed(seed * 1_000_003 + case)
                    in_process = current_runner() == "v1" and ranks is None
                    with time_limit(120 if in_process else 900):
                        bench.run(draw_case(seed, case, settings, families))
                except Exception as error:
                    bench._move_folder(None)
                    failure = Failure(case, type(error).__name__, str(error), bench.last, settings)
                    report.failures.append(failure)
                    if on_failure is not None:
                        on_failure(failure)
                    if stop_at_failure:
                        return
                    break


@contextmanager
def late_adapters(seconds: float) -> Iterator[None]:
    """Each adapter takes so much longer to be read."""
    from vllm_pedro.serving.adapters import AdapterReader

    original = AdapterReader.read

    def read(self: AdapterReader, spec: Any) -> Any:
        time.sleep(seconds)
        return original(self, spec)

    with mock.patch.object(AdapterReader, "read", read):
        yield


def run(
    folder: Path,
    cases: int,
    seed: int = 0,
    first: int = 0,
    minutes: float | None = None,
    compiled: bool = False,
    stop_at_failure: bool = False,
    on_failure: Callable[[Failure], None] | None = None,
    on_progress: Callable[[Report], None] | None = None,
    model: Path | None = None,
    mixed: bool = False,
) -> Report:
    """Run cases `first` to `first + cases`; `first` is a multiple of ten.

    `mixed`: engines of other architectures, and of two ranks, too.
    """
    torch.set_num_threads(1)  # the tiny model's matrices are not worth more
    # What leftovers are asked for by is sent to workers.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    shops: dict[str | None, Workshop] = {}
    report, began = Report(seed), time.monotonic()
    end = first + cases
    for start in range(first, end, CASES_PER_ENGINE):
        group = range(start, min(start + CASES_PER_ENGINE, end))
        architecture, ranks = draw_kind(seed, start // CASES_PER_ENGINE) if mixed else (None, None)
        if architecture not in shops:
            place = folder / architecture if architecture else folder
            shops[architecture] = Workshop(place, model, architecture)
        for name, value in (("architecture", architecture), ("ranks", ranks)):
            report.settings.setdefault(name, Counter())[str(value)] += mixed
        shop = shops[architecture]
        run_group(shop, seed, group, report, compiled, on_failure, stop_at_failure, ranks)
        report.seconds = time.monotonic() - began
        if on_progress is not None:
            on_progress(report)
        if stop_at_failure and report.failures:
            break
        if minutes is not None and report.seconds > 60 * minutes:
            break
    return report


def format_report(report: Report) -> str:
    """The report as text."""
    lines = [
        f"{report.cases} cases on {report.engines} engines in {report.seconds:.0f} s "
        f"({report.cases / max(report.seconds, 1e-9):.2f} cases/s), seed {report.seed}",
        f"tokens compared {report.checked_tokens}, near-ties {report.near_ties} "
        f"(of which taken the other way {report.near_tie_flips}), "
        f"log probabilities that hang on a rounding {report.ill_conditioned}, "
        f"largest log probability error {report.worst_logprob_error:.1e}",
    ]
    for title, counter in (("requests", report.requests), ("events", report.events)):
        lines.append(f"{title}:")
        lines += [f"  {name:<40} {count:>8}" for name, count in sorted(counter.items()) if count]
    lines.append("settings (engines):")
    for name, values in sorted(report.settings.items()):
        shown = ", ".join(f"{v}: {c}" for v, c in sorted(values.items()))
        lines.append(f"  {name:<28} {shown}")
    lines += [f"*** {spot.upper()}: this run says nothing about it" for spot in report.blind_spots]
    lines.append(f"failures: {len(report.failures)}")
    lines += [f"  case {f.case}: {f.kind}: {f.message}" for f in report.failures]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="first case, a multiple of ten")
    parser.add_argument(
        "--case", type=int, help="only this one, after those before it on its engine"
    )
    parser.add_argument("--minutes", type=float, help="stop after these, at the end of an engine")
    parser.add_argument("--model", type=Path, help="another model than the tiny random one")
    parser.add_argument(
        "--mixed", action="store_true", help="engines of other architectures and of two ranks too"
    )
    parser.add_argument("--runner", choices=["v1", "v2"], default="v1", help="vLLM's model runner")
    parser.add_argument("--compiled", action="store_true", help="without enforce_eager")
    parser.add_argument("--json", type=Path, help="write the report here as well")
    parser.add_argument("--folder", type=Path, help="where the model and adapters go")
    args = parser.parse_args()
    if args.runner == "v2":
        use_v2()
    else:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # V2 is the default on GPUs
    # Else every process on the machine binds itself to the same cores.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if args.case is not None:
        args.first = args.case - args.case % CASES_PER_ENGINE
        args.cases = args.case - args.first + 1

    def show_failure(failure: Failure) -> None:
        print(f"case {failure.case}: {failure.kind}: {failure.message}")
        print(f"  settings {failure.settings}\n  request {failure.request}", flush=True)

    def show_progress(report: Report) -> None:
        print(
            f"{report.cases} cases, {len(report.failures)} failures, {report.seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        if args.json is not None:
            failures = [asdict(failure) for failure in report.failures]
            spots = report.blind_spots
            text = json.dumps(
                {**vars(report), "failures": failures, "blind_spots": spots}, indent=1
            )
            args.json.write_text(text)

    with tempfile.TemporaryDirectory() as temporary:
        report = run(
            args.folder or Path(temporary),
            args.cases,
            args.seed,
            args.first,
            args.minutes,
            args.compiled,
            on_failure=show_failure,
            on_progress=show_progress,
            model=args.model,
            mixed=args.mixed,
        )
    print(format_report(report))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
