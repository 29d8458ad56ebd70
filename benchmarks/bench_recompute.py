"""What whole prompts and exact cache keys cost: prompt tokens computed that a base row would not.

Conversations of several turns share a system prompt; each turn sends the whole conversation so far,
as chat clients do. Counted is what vLLM reports as cached for each request.

    python benchmarks/bench_recompute.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm_pedro.demo import ADAPTERS
from vllm_pedro.fetch import fetch_model
from vllm_pedro.integration.llm import start_llm
from vllm_pedro.integration.request import PedroRequest

CONVERSATIONS, TURNS = 8, 4
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="model folder; default the 135M model of the demo")
    args = parser.parse_args()
    settings = {
        "block_size": 32,
        "max_model_len": SYSTEM_TOKENS + TURNS * (USER_TOKENS + ANSWER_TOKENS),
        "max_num_seqs": 2 * CONVERSATIONS,
        "kv_cache_memory_bytes": 1 << 30,
    }
    sequence = str(ADAPTERS / "brief")
    model = args.model or str(fetch_model(progress=False))
    with tempfile.TemporaryDirectory() as folder:
        answer = shutil.copytree(sequence, Path(folder, "answer"))
        config = answer / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "scope": "answer"}))
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
