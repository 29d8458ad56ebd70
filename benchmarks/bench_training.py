"""Time and memory of a training step, PEDRO beside PEFT's LoRA with as many parameters.

Both train on the same batches with the same trainer's loss and optimizer, on one backbone, in
turns: LoRA's modules are attached for its turn and taken off again. Memory is what autograd keeps
between forward and backward (saved tensors, counted once each, parameters left out), which is
what differs between the two, and, on a GPU, the peak allocation too.

    python benchmarks/bench_training.py --repeats 5 --rows 8 --tokens 64
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from vllm_pedro import PedroConfig, get_pedro_model
from vllm_pedro.bench.adapters import MODULES
from vllm_pedro.fetch import fetch_model
from vllm_pedro.training.run import load_backbone

TARGETS = list(MODULES)


def make_batch(rows: int, tokens: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens; the last eighth of each row is the completion."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=random)
    labels = ids.clone()
    labels[:, : tokens - max(1, tokens // 8)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def kept_bytes(run: Callable[[], Any], model: torch.nn.Module) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of `run`."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(found.values())
    del result
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="FOLDER", help="default: the demo's, fetched")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pedro-r", type=int, default=12)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = args.model or str(fetch_model(progress=False))
    backbone, _ = load_backbone(folder, getattr(torch, args.dtype))
    backbone.to(device)
    backbone.config.use_cache = False
    batch = {
        name: tensor.to(device)
        for name, tensor in make_batch(args.rows, args.tokens, backbone.config.vocab_size).items()
    }

    def pedro() -> Any:
        return get_pedro_model(backbone, PedroConfig(r=args.pedro_r, input_norm="rms"))

    model = pedro()
    budget, _ = model.get_nb_trainable_parameters()
    shape = model.shape
    model.unload()
    each = sum(width + shape.hidden_size for width in shape.split_widths(TARGETS))
    lora_r = max(1, round(budget / (each * shape.num_layers)))

    def lora() -> Any:
        settings = LoraConfig(
            r=lora_r, lora_alpha=2 * lora_r, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        return get_peft_model(backbone, settings)

    times: dict[str, list[float]] = {"pedro": [], "lora": []}
    kept, counts, peaks = {}, {}, {}
    for repeat in range(args.repeats + 1):
        for name, make in (("pedro", pedro), ("lora", lora)):
            torch.manual_seed(0)
            model = make()
            model.train()
            trainable = [p for p in model.parameters() if p.requires_grad]
            counts[name] = sum(p.numel() for p in trainable)
            optimizer = torch.optim.AdamW(trainable, lr=1e-4)

            def step(model: Any = model, optimizer: Any = optimizer) -> None:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            if repeat == 0:
                kept[name] = kept_bytes(lambda model=model: model(**batch).loss, model)
            step()  # warm-up: the optimizer's state, LoRA's first allocation
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated()
            if repeat > 0:
                times[name].append(time.perf_counter() - began)
            model.unload()
    ratios = [a / b for a, b in zip(times["pedro"], times["lora"], strict=True)]
    print(
        json.dumps(
            {
                "device": device,
                "dtype": args.dtype,
                "rows": args.rows,
                "tokens": args.tokens,
                "trainable_parameters": counts,
                "lora_r": lora_r,
                "step_seconds_median": {k: statistics.median(v) for k, v in times.items()},
                "step_ratio_median": statistics.median(ratios),
                "step_ratio_range": [min(ratios), max(ratios)],
                "kept_for_backward_bytes": kept,
                "kept_ratio": kept["pedro"] / kept["lora"],
                "peak_bytes": peaks or None,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
