"""What whole prompts and exact cache keys cost: prompt tokens computed that a base row would not.

Conversations of several turns share a system prompt; each turn sends the whole conversation so far,
as chat clients do. Counted is what vLLM reports as cached for each request. With `--document`,
tenants ask about one long text in its place, beside LoRA, one after another; timed too is each
one's first token.

    python benchmarks/bench_recompute.py
    python benchmarks/bench_recompute.py --document
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm_pedro.bench.adapters import write_adapters
from vllm_pedro.bench.figures import Spread
from vllm_pedro.demo import ADAPTERS
from vllm_pedro.fetch import fetch_model
from vllm_pedro.integration.llm import start_llm
from vllm_pedro.integration.request import PedroRequest

CONVERSATIONS, TURNS = 8, 4
DOCUMENT_TOKENS = 2000
SYSTEM_TOKENS, USER_TOKENS, ANSWER_TOKENS = 256, 40, 60


def converse(llm: Any, adapter: str | None, ends: bool) -> tuple[int, int]:
    """Hold all conversations, turn by turn; (prompt tokens, of these cached)."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    draw = random.Random(0)
    vocabulary = range(llm.llm_engine.model_config.get_vocab_size())
    system = draw.choices(vocabulary, k=SYSTEM_TOKENS)
    texts = [system[:] for _ in range(CONVERSATIONS)]
    first = SYSTEM_TOKENS + USER_TOKENS if ends else None
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    total = cached = 0
    for _ in range(TURNS):
        for text in texts:
            text += draw.choices(vocabulary, k=USER_TOKENS)
        tenant: Any = adapter and PedroRequest("a", 1, adapter, prompt_length=first)
        prompts: Any = [{"prompt_token_ids": list(text)} for text in texts]
        outputs = llm.generate(prompts, params, lora_request=tenant, use_tqdm=False)
        for text, output in zip(texts, outputs, strict=True):
            total += len(output.prompt_token_ids)
            cached += output.num_cached_tokens or 0
            text += output.outputs[0].token_ids
    return total, cached


def share_document(model: str, folder: Path, count: int) -> None:
    """Tenants ask about one document, each its own question."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(temperature=0.0, max_tokens=1)
    settings = {"max_model_len": 2048, "max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 30}
    paths = {kind: write_adapters(model, folder / kind, kind, count) for kind in ("pedro", "lora")}
    answers = [with_scope(path, folder / "answer" / path.name, "answer") for path in paths["pedro"]]
    lora = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": count, "max_lora_rank": 16}
    engines: list[tuple[dict[str, Any], Any, dict[str, Any]]] = [
        (
            {"base rows": [None] * count, 'scope "answer"': answers,
             'scope "sequence"': paths["pedro"]},
            PedroRequest,
            {"adapters": [str(path) for path in paths["pedro"]]},
        ),
        ({"LoRA": paths["lora"]}, LoRARequest, lora),
    ]  # fmt: skip
    print(f"{'':20}{'prompt':>8}{'computed':>10}{'first token, s, of the second tenant on':>42}")
    for cases, kind, keywords in engines:
        with start_llm(model, **keywords, **settings) as llm:
            vocabulary = range(llm.llm_engine.model_config.get_vocab_size())
            for name, tenants in cases.items():
                llm.reset_prefix_cache()
                draw = random.Random(0)
                document = draw.choices(vocabulary, k=DOCUMENT_TOKENS)
                total = cached = 0
                seconds = []
                for i, path in enumerate(tenants):
                    tenant = path and kind(path.name, i + 1, str(path))
                    prompt: Any = {"prompt_token_ids": document + draw.choices(vocabulary, k=20)}
                    start = time.perf_counter()
                    (output,) = llm.generate(prompt, params, lora_request=tenant, use_tqdm=False)
                    seconds.append(time.perf_counter() - start)
                    total += len(output.prompt_token_ids)
                    cached += output.num_cached_tokens or 0
                spread = Spread.of(seconds[1:]).format(2)
                print(f"{name:20}{total:8}{total - cached:10}{spread:>42}", flush=True)


def with_scope(adapter: Path, copy: Path, scope: str) -> Path:
    """A copy of an adapter with another scope."""
    shutil.copytree(adapter, copy)
    config = copy / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scope": scope}))
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="model folder; default the 135M model of the demo")
    parser.add_argument("--document", action="store_true", help="of 2,000 tokens")
    parser.add_argument("--tenants", type=int, default=50, help="of the document (%(default)s)")
    args = parser.parse_args()
    model = args.model or str(fetch_model(progress=False))
    if args.document:
        with tempfile.TemporaryDirectory() as folder:
            share_document(model, Path(folder), args.tenants)
        return
    settings = {
        "block_size": 32,
        "max_model_len": SYSTEM_TOKENS + TURNS * (USER_TOKENS + ANSWER_TOKENS),
        "max_num_seqs": 2 * CONVERSATIONS,
        "kv_cache_memory_bytes": 1 << 30,
    }
    sequence = str(ADAPTERS / "brief")
    with tempfile.TemporaryDirectory() as folder:
        answer = with_scope(Path(sequence), Path(folder, "answer"), "answer")
        rows = {"base rows": (None, False)}
        for scope, adapter in (("sequence", sequence), ("answer", str(answer))):
            rows |= {
                f'scope "{scope}", P = the whole prompt of each turn': (adapter, False),
                f'scope "{scope}", P = the first turn\'s prompt': (adapter, True),
            }
        base = 0
        print(f"{'':52}{'prompt':>8}{'computed':>10}{'recomputed':>12}")
        with start_llm(model, [sequence], **settings) as llm:
            for name, case in rows.items():
                total, cached = converse(llm, *case)
                base = base or total - cached
                extra = (total - cached - base) / total
                print(f"{name:52}{total:8}{total - cached:10}{extra:12.1%}")


if __name__ == "__main__":
    main()
