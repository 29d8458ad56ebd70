"""Is what vLLM serves what was trained? Greedy answers, float32, transformers beside vLLM.

For each adapter the prompts of a data file are continued greedily by both. An answer that differs
is looked into: where the float32 reference's two best logits are closer than 1e-3 at the first
token that differs, the choice hangs on rounding and is counted as a near-tie, otherwise as a
difference. `--scores` adds a task score by both engines, in a dtype of choice.

    python benchmarks/served_is_trained.py --adapter ADAPTER --data dev.jsonl --limit 100
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from vllm_pedro.fetch import fetch_model
from vllm_pedro.integration.evaluate import start_engine
from vllm_pedro.model import PedroModel
from vllm_pedro.model.reference import NEAR_TIE_MARGIN, reference_score
from vllm_pedro.training.data import encode, prompt_tokens, read_rows
from vllm_pedro.training.evaluate import METRICS, TransformersEngine, evaluate
from vllm_pedro.training.run import load_backbone, pad_token_id


def compare(args: argparse.Namespace, model_folder: str) -> dict[str, object]:
    rows = read_rows(args.data, args.limit)
    backbone, tokenizer = load_backbone(model_folder, torch.float32)
    model = PedroModel.from_pretrained(backbone, args.adapter)
    prompts = [prompt_tokens(tokenizer, row) for row in rows]
    asked = prompts, [len(prompt) for prompt in prompts], args.max_new_tokens
    local = TransformersEngine(model, pad_token_id(tokenizer)).generate(*asked)
    room = max(len(encode(tokenizer, row)) for row in rows) + args.max_new_tokens + 1
    with start_engine(model_folder, args.adapter, room, "float32") as engine:
        served = engine.generate(*asked)
    equal = near_ties = different = 0
    ends = tokenizer.eos_token_id
    for prompt, one, other in zip(prompts, local, served, strict=True):
        if one == other:
            equal += 1
            continue
        whole = [*one, ends]
        pairs = zip(whole, [*other, ends], strict=False)
        place = next(i for i, (a, b) in enumerate(pairs) if a != b)
        margin = reference_score(model, prompt, whole[: place + 1]).margins[place]
        if margin < NEAR_TIE_MARGIN:
            near_ties += 1
        else:
            different += 1
    found: dict[str, object] = {
        "adapter": args.adapter,
        "data": args.data,
        "prompts": len(prompts),
        "tokens": sum(len(answer) for answer in served),
        "equal": equal,
        "near_ties": near_ties,
        "different": different,
    }
    if args.scores is not None:
        model.unload()
        del model
        kind = getattr(torch, args.scores_dtype)
        model = PedroModel.from_pretrained(backbone.to(kind), args.adapter)
        here = TransformersEngine(model, pad_token_id(tokenizer))
        found["transformers"] = evaluate(here, tokenizer, rows, args.scores, args.max_new_tokens)
        del model, here, backbone
        with start_engine(model_folder, args.adapter, room, args.scores_dtype) as engine:
            found["vllm"] = evaluate(engine, tokenizer, rows, args.scores, args.max_new_tokens)
        found["dtype"] = args.scores_dtype
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="FOLDER", help="default: the demo's, fetched")
    parser.add_argument("--adapter", metavar="FOLDER", required=True)
    parser.add_argument("--data", metavar="FILE", required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--scores", choices=METRICS)
    parser.add_argument("--scores-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    found = compare(args, args.model or str(fetch_model(progress=False)))
    print(json.dumps(found))
    return 1 if found["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
