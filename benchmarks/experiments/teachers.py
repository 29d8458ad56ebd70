"""Teachers for `vllm-pedro distill`: LoRA adapters and one full fine-tune, from a config's list.

    python benchmarks/experiments/teachers.py CONFIG --data DATA --output FOLDER

A teacher's folder that is there is left as it is. PEFT's LoRA, this project's trainer and data.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from controlled import TASKS, write_task
from transformers import PrinterCallback, set_seed

from vllm_pedro.fetch import fetch_model
from vllm_pedro.training.collator import CompletionCollator
from vllm_pedro.training.data import load_dataset
from vllm_pedro.training.run import choose_dtype, end_tokens, load_backbone, pad_token_id
from vllm_pedro.training.trainer import PedroTrainer, PedroTrainingArguments


def train_teacher(model: str, teacher: dict[str, Any], data: Path, output: Path) -> None:
    """Train one teacher and save it; beside it `teacher.json` says how."""
    import peft

    backbone, tokenizer = load_backbone(model, choose_dtype("float32"))
    rows = load_dataset(
        data / teacher["train"],
        tokenizer,
        teacher.get("max_length"),
        end_tokens=end_tokens(model),
    )
    set_seed(0)
    trained: Any = backbone
    if teacher["kind"] == "lora":
        settings = peft.LoraConfig(task_type="CAUSAL_LM", **teacher["settings"])
        trained = peft.get_peft_model(backbone, settings)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        args = PedroTrainingArguments(
            output_dir=scratch,
            max_steps=teacher["steps"],
            per_device_train_batch_size=teacher.get("batch_size", 8),
            learning_rate=teacher["learning_rate"],
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
            logging_steps=teacher["steps"],
        )
        collator = CompletionCollator(pad_token_id(tokenizer))
        trainer = PedroTrainer(trained, args, train_dataset=rows, data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
    trained.save_pretrained(output)
    if teacher["kind"] == "full":
        tokenizer.save_pretrained(output)
    seconds = round(time.monotonic() - began, 1)
    record = teacher | {"rows": len(rows), "train_loss": loss, "seconds": seconds}
    (output / "teacher.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record), file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' files")
    parser.add_argument("--output", type=Path, required=True, help="folder for the teachers")
    parser.add_argument("--model", metavar="FOLDER", help="the backbone; default: SmolLM2-135M")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    args = parser.parse_args()
    model = args.model or str(fetch_model(progress=False))
    for teacher in json.loads(args.config.read_text())["teachers"]:
        name = teacher["name"]
        if (args.output / name / "teacher.json").exists() or (args.only and name not in args.only):
            continue
        made = teacher.get("controlled")
        if made in TASKS and not (args.output / teacher["train"]).exists():
            write_task(made, args.output / teacher["train"], 1, 2000)
            write_task(made, args.output / teacher["dev"], 2, 300)
        data = args.output if made else args.data
        train_teacher(model, teacher, data, args.output / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
