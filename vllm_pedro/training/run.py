"""A whole training: from files and settings to an adapter folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from ..backbone import check_model_folder
from ..config import PedroConfig
from ..errors import PedroError, first_line
from ..files import replace_file
from ..model import PedroModel, get_pedro_model
from .choices import DTYPES
from .collator import CompletionCollator, PackedCollator
from .data import Dataset, Example, encode, load_dataset, read_rows
from .evaluate import Engine, TransformersEngine, evaluate
from .inspection import describe_use, prompt_use, vectors_of_prompts
from .progress import Progress
from .start import condition
from .trainer import PedroTrainer, PedroTrainingArguments

RECORD_NAME = "training.json"
USE_ROWS = 24
"""Rows, of the dev data if there are any, that tell whether the prompt matters."""
WARNING = (
    "the adapter ends as (IA)3: other prompts' vectors do as well. Either the task needs no more, "
    "and static vectors (--r 0) are smaller and cheaper to serve, or it was trained too little"
)


@dataclass(frozen=True)
class TrainingJob:
    """What to train on what.

    Attributes:
        model: the backbone's folder.
        train: training data, JSONL or JSONL.gz.
        output: the folder for the adapter; checkpoints go into it too.
        config: the adapter's config.
        start: one of `STARTS`, what W_down starts from; "data" needs a config with `down_bias`.
        dev: data for evaluation; None for none.
        dtype: the backbone's; "auto" is bfloat16 on GPUs that have it, else float32.
        max_length: rows with more tokens are left out.
        limit: use this many rows of the training data; None for all.
        dev_limit: the same for the dev data.
        prompt_length: one of `PROMPT_LENGTHS`, what is pooled of a chat.
        packing: pack the sequences of a batch into one row.
        patience: stop after so many evaluations without a better dev loss; None for never.
        resume: go on from the last checkpoint in `output`.
        save_dtype: the dtype to store the finished adapter in; checkpoints are in float32.
        command: what was typed, for the record.
    """

    model: str
    train: str
    output: str
    config: PedroConfig
    start: str = "random"
    dev: str | None = None
    dtype: str = "auto"
    max_length: int | None = None
    limit: int | None = None
    dev_limit: int | None = None
    prompt_length: str = "whole"
    packing: bool = False
    patience: int | None = None
    resume: bool = False
    save_dtype: str = "float32"
    command: Sequence[str] = field(default_factory=list)


def choose_dtype(name: str, use_cpu: bool = False) -> torch.dtype:
    """The dtype of this name; for "auto" what the device is good at."""
    if name not in DTYPES:
        raise PedroError(f"dtype: expected one of {list(DTYPES)}, found {name!r}")
    if name != "auto":
        return getattr(torch, name)
    on_gpu = torch.cuda.is_available() and not use_cpu and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if on_gpu else torch.float32


def load_backbone(folder: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model and its tokenizer from a folder; nothing is downloaded.

    Raises:
        PedroError: the folder is not there, or holds no causal language model and tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    with _naming(folder, "model"), quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model, tokenizer


def load_tokenizer(folder: str) -> Any:
    """A model's tokenizer from its folder.

    Raises:
        PedroError: the folder is not there, or holds no tokenizer.
    """
    check_model_folder(folder)
    with _naming(folder, "tokenizer"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextlib.contextmanager
def _naming(folder: str, what: str) -> Iterator[None]:
    """Turn what loading raises into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise PedroError(f"{folder}: cannot load the {what}: {first_line(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, which would stand among ours."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def pad_token_id(tokenizer: Any) -> int:
    """What to pad with; it is masked out, so any token will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def train(job: TrainingJob, args: PedroTrainingArguments) -> dict[str, Any]:
    """Train an adapter and save it, the one with the best dev loss if there are dev data.

    Args:
        job: what to train.
        args: how; evaluation and checkpoints follow its `eval_steps` and `save_steps`.

    Returns:
        The record that is also saved as `training.json` in the output folder.

    Raises:
        PedroError: unusable data, model or settings; the training diverged.
    """
    model, tokenizer = load_backbone(job.model, choose_dtype(job.dtype, args.use_cpu))
    longest = getattr(model.config, "max_position_embeddings", None)
    max_length = job.max_length if job.max_length is not None else longest
    data = load_dataset(job.train, tokenizer, max_length, job.limit, job.prompt_length)
    dev = None
    if job.dev is not None:
        dev = load_dataset(job.dev, tokenizer, max_length, job.dev_limit, job.prompt_length)
    _report(job.train, data, max_length)
    if dev is not None:
        _report(str(job.dev), dev, max_length)

    checkpoint = _checkpoint(job)
    set_seed(args.seed)  # the generators are drawn from it
    pedro = get_pedro_model(model, job.config)
    if job.start == "data" and job.config.r > 0 and checkpoint is None:
        condition(pedro, data, CompletionCollator(pad_token_id(tokenizer)))
    callbacks = []
    if job.patience is not None:
        if dev is None:
            raise PedroError("patience needs dev data, whose loss it watches")
        callbacks.append(EarlyStoppingCallback(job.patience))
    collator = PackedCollator() if job.packing else CompletionCollator(pad_token_id(tokenizer))
    # Without an accelerator there is nothing to pin memory for, and torch would say so.
    args.dataloader_pin_memory &= torch.accelerator.is_available()
    trainer = PedroTrainer(
        model=pedro,
        args=args,
        train_dataset=data,
        eval_dataset=dev,
        data_collator=collator,
        callbacks=callbacks,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress(trainer))
    trainable, total = pedro.get_nb_trainable_parameters()
    _say(f"{trainable:,} trainable parameters beside {total - trainable:,} of the model")

    began = time.monotonic()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - began
    digest = pedro.save_pretrained(job.output, dtype=getattr(torch, job.save_dtype))
    use = None
    if job.config.r > 0:
        rows = (data if dev is None else dev)[:USE_ROWS]
        if len(rows) > 1:
            vectors = vectors_of_prompts(pedro, [row.prompt[: row.prompt_length] for row in rows])
            use = prompt_use(pedro, rows, vectors)
            _say(describe_use(use))
            if not use.matters:
                _say(f"warning: {WARNING}")
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    record = {
        "command": shlex.join(job.command) if job.command else None,
        "steps": trainer.state.global_step,
        "train_loss": result.training_loss,
        "dev_losses": {str(entry["step"]): entry["eval_loss"] for entry in history},
        "best_step": _step_of(trainer.state.best_model_checkpoint),
        "rows": {"train": len(data), "dev": 0 if dev is None else len(dev)},
        "rows_too_long": {"train": data.too_long, "dev": 0 if dev is None else dev.too_long},
        "trainable_parameters": trainable,
        "seconds": round(seconds, 1),
        "tokens": trainer.tokens_seen,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt_length": job.prompt_length,
        "start": job.start if job.config.r > 0 else None,
        "prompt_use": None if use is None else dataclasses.asdict(use),
        "digest": digest,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    replace_file(Path(job.output) / RECORD_NAME, text.encode())
    return record


def evaluate_files(
    model: str,
    data: str,
    metric: str,
    adapter: str | None = None,
    start_engine: Callable[..., AbstractContextManager[Engine]] | None = None,
    dtype: str = "auto",
    limit: int | None = None,
    max_new_tokens: int = 64,
    prompt_length: str = "whole",
) -> dict[str, Any]:
    """Score a model in a folder on a data file; see `training.evaluate.evaluate`.

    Args:
        model: the backbone's folder.
        data: the file.
        metric: one of `METRICS`.
        adapter: an adapter's folder; None for the plain model.
        start_engine: given model, adapter, the longest row and the dtype, an engine for a `with`
            block, such as `integration.evaluate.start_engine`; None for transformers.
        dtype: one of `DTYPES`.
        limit: use the first rows only.
        max_new_tokens: of a free answer.
        prompt_length: one of `PROMPT_LENGTHS`, what is pooled of a chat.

    Raises:
        PedroError: unusable data, model or adapter.
    """
    rows = read_rows(data, limit, prompt_length)
    kind = str(choose_dtype(dtype)).removeprefix("torch.")
    began = time.monotonic()
    if start_engine is None:
        loaded, tokenizer = load_backbone(model, choose_dtype(dtype))
        if torch.cuda.is_available():
            loaded = loaded.to("cuda")
        if adapter is not None:
            loaded = PedroModel.from_pretrained(loaded, adapter)
        scores = evaluate(
            TransformersEngine(loaded, pad_token_id(tokenizer)),
            tokenizer,
            rows,
            metric,
            max_new_tokens,
        )
    else:
        tokenizer = load_tokenizer(model)
        longest = max(len(encode(tokenizer, row)) for row in rows)
        room = longest + max_new_tokens + 1
        with start_engine(model, adapter, room, kind) as served:
            scores = evaluate(served, tokenizer, rows, metric, max_new_tokens)
    return {
        "metric": metric,
        **scores,
        "model": model,
        "adapter": adapter,
        "data": data,
        "engine": "transformers" if start_engine is None else "vllm",
        "dtype": kind,
        "seconds": round(time.monotonic() - began, 1),
    }


def load_rows(
    model: str, adapter: str, data: str, limit: int | None
) -> tuple[PedroModel, list[Example]]:
    """A model with an adapter, in float32, and the tokenised rows of a data file.

    Raises:
        PedroError: unusable data, model or adapter.
    """
    backbone, tokenizer = load_backbone(model, torch.float32)
    rows = list(load_dataset(data, tokenizer, None, limit))
    return PedroModel.from_pretrained(backbone, adapter), rows


def _checkpoint(job: TrainingJob) -> str | None:
    folder = Path(job.output)
    last = get_last_checkpoint(job.output) if folder.is_dir() else None
    if job.resume:
        if last is None:
            raise PedroError(f"{job.output}: no checkpoint to resume from")
        return str(last)
    if last is not None:
        raise PedroError(
            f"{job.output} holds checkpoints of another training; --resume goes on with it, or "
            "choose another folder"
        )
    return None


def _step_of(checkpoint: str | None) -> int | None:
    return None if checkpoint is None else int(os.path.basename(checkpoint).rpartition("-")[2])


def _report(path: str, data: Dataset, max_length: int | None) -> None:
    tokens = sum(map(len, data.examples))
    text = f"{path}: {len(data):,} rows, {tokens:,} tokens"
    if data.too_long:
        text += f"; {data.too_long:,} rows of more than {max_length} tokens left out"
    _say(text)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
