"""What whole prompts and exact cache keys cost: prompt tokens computed that a base row would not.

Conversations of several turns share a system prompt; each turn sends the whole conversation so far,
as chat clients do. Counted is what vLLM reports as cached for each request.

    python benchmarks/bench_recompute.py
"""

from __future__ import annotations

import argparse
import os
import random
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def converse(
    llm: Any, args: argparse.Namespace, adapter: str | None, ends: bool
) -> tuple[int, int]:
    """Hold all conversations, turn by turn; (prompt tokens, of these cached)."""
    from vllm import SamplingParams

    from vllm_pedro import PedroRequest

    llm.reset_prefix_cache()
    draw = random.Random(0)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def text(length: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(length)]

    system = text(args.system_tokens)
    texts = [system[:] for _ in range(args.conversations)]
    firsts: list[int] = []
    params = SamplingParams(temperature=0.0, max_tokens=args.answer_tokens, ignore_eos=True)
    total = cached = 0
    for turn in range(args.turns):
        for conversation in texts:
            conversation += text(args.user_tokens)
        if turn == 0:
            firsts = [len(conversation) for conversation in texts]
        requests = None
        if adapter is not None:
            requests = [
                PedroRequest("a", 1, adapter, prompt_length=first if ends else None)
                for first in firsts
            ]
        prompts = [{"prompt_token_ids": list(conversation)} for conversation in texts]
        outputs = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        for conversation, output in zip(texts, outputs, strict=True):
            total += len(output.prompt_token_ids)
            cached += output.num_cached_tokens or 0
            conversation += list(output.outputs[0].token_ids)
    return total, cached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="model folder; default the 135M model of the demo")
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--system-tokens", type=int, default=256)
    parser.add_argument("--user-tokens", type=int, default=40)
    parser.add_argument("--answer-tokens", type=int, default=60)
    args = parser.parse_args()

    import vllm_pedro.demo

    # isort: split
    from vllm import LLM

    if args.model is None:
        from vllm_pedro.fetch import fetch_model

        args.model = str(fetch_model(progress=False))
    longest = args.system_tokens + args.turns * (args.user_tokens + args.answer_tokens)
    llm = LLM(
        args.model,
        enable_pedro=True,
        enforce_eager=True,
        block_size=32,
        max_model_len=longest,
        max_num_seqs=2 * args.conversations,
        kv_cache_memory_bytes=1 << 30,
    )
    adapter = str(vllm_pedro.demo.ADAPTERS / "brief")
    rows = [
        ("base rows", None, False),
        ("PEDRO, P = the whole prompt of each turn", adapter, False),
        ("PEDRO, P = the first turn's prompt", adapter, True),
    ]
    computed_by_base = 0
    print(f"{'':44}{'prompt':>8}{'computed':>10}{'recomputed':>12}")
    for name, path, ends in rows:
        total, cached = converse(llm, args, path, ends)
        computed = total - cached
        computed_by_base = computed_by_base or computed
        extra = (computed - computed_by_base) / total
        print(f"{name:44}{total:8}{computed:10}{extra:12.1%}")


if __name__ == "__main__":
    main()
