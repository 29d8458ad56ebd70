"""A whole training: from files and settings to an adapter folder."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    GenerationConfig,
    PrinterCallback,
    ProgressCallback,
    set_seed,
)
from transformers.trainer import (
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging as transformers_logging

from ..adapter import verify_adapter
from ..adapter.hub import push
from ..backbone import check_model_folder
from ..config import CONFIG_NAME, PedroConfig
from ..errors import PedroError, first_line
from ..files import replace_file
from ..model import PedroModel, get_pedro_model
from .choices import DTYPES
from .collator import CompletionCollator, PackedCollator
from .data import Dataset, Example, Row, encode, load_dataset, read_rows
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
        bits: 4 or 8 for a backbone that bitsandbytes quantises.
        max_length: rows with more tokens are left out.
        limit: use this many rows of the training data; None for all.
        dev_limit: the same for the dev data.
        prompt_length: one of `PROMPT_LENGTHS`, what is pooled of a chat.
        all_turns: learn every turn of the assistant in a chat.
        chat_template_kwargs: what the chat template is given; rows have the last word.
        packing: pack the sequences of a batch into one row.
        patience: stop after so many evaluations without a better dev loss; None for never.
        resume: go on from the last whole checkpoint in `output`.
        adapter: an adapter to start from, in place of a fresh one; its config goes before `config`.
        force: replace the adapter and the checkpoints that `output` holds.
        held_out: data for the coefficients' turn of a bi-level training, in place of a part of the
            training data.
        test: data that the finished adapter is scored on.
        test_metric: one of `METRICS`.
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
    bits: int | None = None
    max_length: int | None = None
    limit: int | None = None
    dev_limit: int | None = None
    prompt_length: str = "whole"
    all_turns: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    packing: bool = False
    patience: int | None = None
    resume: bool = False
    adapter: str | None = None
    force: bool = False
    held_out: str | None = None
    test: str | None = None
    test_metric: str = "loss"
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


def load_backbone(folder: str, dtype: torch.dtype, bits: int | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer from a folder; nothing is downloaded.

    Args:
        folder: the folder.
        dtype: the weights', or what quantised ones are computed in.
        bits: 4 or 8 for weights that bitsandbytes quantises; None for weights as they are.

    Raises:
        PedroError: the folder is not there, or holds no causal language model and tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    return load_model(folder, dtype, bits), tokenizer


def load_model(folder: str, dtype: torch.dtype, bits: int | None = None) -> Any:
    """`load_backbone`'s model alone, of a folder that may have no tokenizer."""
    check_model_folder(folder)
    how: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if bits is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise PedroError(f"{bits} bits need bitsandbytes: pip install 'vllm-pedro[quantized]'")
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    with _naming(folder, "model"), quiet():
        return AutoModelForCausalLM.from_pretrained(folder, **how)


def load_tokenizer(folder: str) -> Any:
    """A model's tokenizer from its folder.

    Raises:
        PedroError: the folder is not there, or holds no tokenizer.
    """
    check_model_folder(folder)
    with _naming(folder, "tokenizer"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def end_tokens(folder: str) -> list[int]:
    """What ends a model's generation, by its generation config; empty where it has none."""
    try:
        found = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except OSError:
        return []
    return list(found) if isinstance(found, list) else [] if found is None else [found]


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


@dataclass(frozen=True)
class TrainingData:
    """Tokenised rows.

    Attributes:
        train: what to learn.
        dev: what to evaluate on; None for nothing.
        held_out: for the coefficients' turn of a bi-level training; None for a part of `train`.
    """

    train: Dataset
    dev: Dataset | None = None
    held_out: Dataset | None = None


def train(job: TrainingJob, args: PedroTrainingArguments) -> dict[str, Any]:
    """Train an adapter and save it, the one with the best dev loss if there are dev data.

    Args:
        job: what to train.
        args: how; evaluation and checkpoints follow its `eval_steps` and `save_steps`.

    Returns:
        The record that is also saved as `training.json` in the output folder; of several processes
        the first one saves it.

    Raises:
        PedroError: unusable data, model or settings; the training diverged.
    """
    checkpoint = find_checkpoint(job, args)
    if checkpoint is not None and (done := finished(job, args, checkpoint)) is not None:
        return done
    if job.adapter is not None:
        verify_adapter(job.adapter)
    model, tokenizer = load_backbone(job.model, choose_dtype(job.dtype, args.use_cpu), job.bits)
    longest = getattr(model.config, "max_position_embeddings", None)
    max_length = job.max_length if job.max_length is not None else longest
    how: dict[str, Any] = {
        "prompt_length": job.prompt_length,
        "all_turns": job.all_turns,
        "options": job.chat_template_kwargs,
        "end_tokens": end_tokens(job.model),
    }
    data = load_dataset(job.train, tokenizer, max_length, job.limit, **how)
    dev = None
    if job.dev is not None:
        dev = load_dataset(job.dev, tokenizer, max_length, job.dev_limit, **how)
    held_out = None
    if job.held_out is not None:
        held_out = load_dataset(job.held_out, tokenizer, max_length, **how)
    test = None if job.test is None else _short(read_rows(job.test, **how), tokenizer, longest)
    for path, rows in ((job.train, data), (job.dev, dev), (job.held_out, held_out)):
        if rows is not None:
            _report(str(path), rows, max_length)

    repository = take_repository(job, args)
    pad = pad_token_id(tokenizer)
    pedro, record = train_adapter(
        job, args, model, pad, TrainingData(data, dev, held_out), checkpoint
    )
    if args.process_index != 0:
        return record
    if test is not None:
        record["test"] = evaluate(TransformersEngine(pedro, pad), tokenizer, test, job.test_metric)
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    replace_file(Path(job.output) / RECORD_NAME, text.encode())
    if repository is not None:
        record["pushed"] = push(
            job.output, repository, private=args.hub_private_repo, token=args.hub_token
        )
    return record


def take_repository(job: TrainingJob, args: PedroTrainingArguments) -> str | None:
    """Where to push the finished adapter, which Trainer is then no longer told.

    It would push checkpoints too, and the state of the optimizer.
    """
    repository = (args.hub_model_id or Path(job.output).name) if args.push_to_hub else None
    args.push_to_hub = False
    return repository


def train_adapter(
    job: TrainingJob,
    args: PedroTrainingArguments,
    model: Any,
    pad: int,
    data: TrainingData,
    checkpoint: str | None = None,
    trainer_class: type[PedroTrainer] = PedroTrainer,
    wrap: Callable[[Any], Any] = lambda collator: collator,
) -> tuple[PedroModel, dict[str, Any]]:
    """Train an adapter on rows that are tokenised already, and save it.

    Args:
        job: what to train; its files are not read.
        args: see `train`.
        model: the backbone.
        pad: what to pad with.
        data: the rows.
        checkpoint: to go on from; see `find_checkpoint`.
        trainer_class: `PedroTrainer`, or one with another loss.
        wrap: given the collator, the one to make batches with.

    Returns:
        The model with the adapter, and the record of the training.

    Raises:
        PedroError: unusable settings; the training diverged.
    """
    plain = CompletionCollator(pad)
    set_seed(args.seed)  # the generators are drawn from it
    if job.adapter is not None:
        pedro = PedroModel.from_pretrained(model, job.adapter, is_trainable=True)
    else:
        pedro = get_pedro_model(model, job.config)
        if job.start == "data" and job.config.r > 0 and checkpoint is None:
            condition(pedro, data.train, plain)
    callbacks = []
    if job.patience is not None:
        if data.dev is None:
            raise PedroError("patience needs dev data, whose loss it watches")
        callbacks.append(EarlyStoppingCallback(job.patience))
    # Without an accelerator there is nothing to pin memory for, and torch would say so.
    args.dataloader_pin_memory &= torch.accelerator.is_available()
    with _naming_settings():
        trainer = trainer_class(
            model=pedro,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.dev,
            held_out_dataset=data.held_out,
            data_collator=wrap(PackedCollator() if job.packing else plain),
            callbacks=callbacks,
        )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress(trainer))
    trainable, total = pedro.get_nb_trainable_parameters()
    if args.process_index == 0:
        say(f"{trainable:,} trainable parameters beside {total - trainable:,} of the model")

    began = time.monotonic()
    with _naming_settings():
        result = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - began
    digest = None
    if args.process_index == 0:
        digest = pedro.save_pretrained(job.output, dtype=getattr(torch, job.save_dtype))
    use = None
    if pedro.pedro_configs[str(pedro.active_adapter)].r > 0:
        rows = (data.train if data.dev is None else data.dev)[:USE_ROWS]
        if len(rows) > 1:
            vectors = vectors_of_prompts(pedro, [row.prompt[: row.prompt_length] for row in rows])
            use = prompt_use(pedro, rows, vectors)
            if args.process_index == 0:
                say(describe_use(use))
                if not use.matters:
                    say(f"warning: {WARNING}")
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    dev = data.dev
    record = {
        "command": shlex.join(job.command) if job.command else None,
        "steps": trainer.state.global_step,
        "train_loss": result.training_loss,
        "dev_losses": {str(entry["step"]): entry["eval_loss"] for entry in history},
        "best_step": _step_of(trainer.state.best_model_checkpoint),
        "rows": {"train": len(data.train), "dev": 0 if dev is None else len(dev)},
        "rows_too_long": {"train": data.train.too_long, "dev": 0 if dev is None else dev.too_long},
        "trainable_parameters": trainable,
        "seconds": round(seconds, 1),
        "tokens": trainer.tokens_seen,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bits": job.bits,
        "prompt_length": job.prompt_length,
        "start": job.start if job.config.r > 0 and job.adapter is None else None,
        "prompt_use": None if use is None else dataclasses.asdict(use),
        "digest": digest,
    }
    if checkpoint is not None:
        record["resumed_from_step"] = _step_of(checkpoint)
    return pedro, record


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
    all_turns: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    beams: int = 1,
    output: str | None = None,
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
        prompt_length: see `TrainingJob`, as for the next two.
        all_turns: score every turn.
        chat_template_kwargs: what the chat template is given.
        beams: of a free answer; 1 for the greedy one. The paper has 3.
        output: a JSONL file for what each row was answered and scored.

    Raises:
        PedroError: unusable data, model or adapter.
    """
    for name, number in (("--max-new-tokens", max_new_tokens), ("--beams", beams)):
        if number < 1:
            raise PedroError(f"{name}: expected 1 or more, found {number}")
    if beams > 1 and start_engine is not None:
        raise PedroError("--beams: only with --engine transformers")
    check_model_folder(model)
    details: list[dict[str, Any]] = []
    rows = read_rows(data, limit, prompt_length, all_turns, chat_template_kwargs, end_tokens(model))
    tokenizer = load_tokenizer(model)
    shape = AutoConfig.from_pretrained(model).get_text_config()
    positions = getattr(shape, "max_position_embeddings", None)
    number = len(rows)
    rows = _short(rows, tokenizer, positions)
    kind = str(choose_dtype(dtype)).removeprefix("torch.")
    began = time.monotonic()
    if start_engine is None:
        loaded, _ = load_backbone(model, choose_dtype(dtype))
        if torch.cuda.is_available():
            loaded = loaded.to("cuda")
        if adapter is not None:
            loaded = PedroModel.from_pretrained(loaded, adapter)
        scores = evaluate(
            TransformersEngine(loaded, pad_token_id(tokenizer), beams=beams),
            tokenizer,
            rows,
            metric,
            max_new_tokens,
            details,
        )
    else:
        longest = max(len(encode(tokenizer, row)) for row in rows)
        room = min(longest + max_new_tokens + 1, positions or sys.maxsize)
        with start_engine(model, adapter, room, kind) as served:
            scores = evaluate(served, tokenizer, rows, metric, max_new_tokens, details)
    if output is not None:
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in details]
        try:
            replace_file(Path(output), "".join(lines).encode())
        except OSError as error:
            raise PedroError(f"cannot write {output}: {error.strerror}") from error
    return {
        "metric": metric,
        **scores,
        "model": model,
        "adapter": adapter,
        "data": data,
        "engine": "transformers" if start_engine is None else "vllm",
        "dtype": kind,
        "rows_too_long": number - len(rows),
        "seconds": round(time.monotonic() - began, 1),
    }


def load_rows(
    model: str,
    adapter: str,
    data: str,
    limit: int | None,
    prompt_length: str = "whole",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[PedroModel, list[Example]]:
    """A model with an adapter, in float32, and the tokenised rows of a data file.

    Raises:
        PedroError: unusable data, model or adapter.
    """
    backbone, tokenizer = load_backbone(model, torch.float32)
    rows = load_dataset(
        data, tokenizer, None, limit, prompt_length, options=chat_template_kwargs
    ).examples
    return PedroModel.from_pretrained(backbone, adapter), rows


def find_checkpoint(job: TrainingJob, args: PedroTrainingArguments) -> str | None:
    """The checkpoint to go on from, once nothing stands in the way; makes the output folder."""
    folder = Path(job.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PedroError(f"{folder}: cannot make a folder there: {error.strerror}") from error
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _number(path) >= 0]
    found.sort(key=_number, reverse=True)
    if job.resume:
        for path in found:
            if (fault := _fault(path)) is None:
                return str(path)
            say(f"{path}: not whole, passed over: {fault}")
        raise PedroError(f"{folder}: no checkpoint to resume from")
    if job.force:
        # Several processes come here at once.
        for path in found if args.process_index == 0 else ():
            shutil.rmtree(path)
        return None
    for path, what in ((folder / CONFIG_NAME, "an adapter"), *((p, "checkpoints") for p in found)):
        if path.exists():
            raise PedroError(
                f"{folder} holds {what} of another training; --resume goes on with it, --adapter "
                "starts from its adapter into another folder, --force replaces it"
            )
    return None


def _number(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() and path.is_dir() else -1


def _fault(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being resumed from, such as a crash while it was written."""
    try:
        verify_adapter(checkpoint)
        json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
        for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
            torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: zip, pickle, JSON, files
        return first_line(error)
    return None


def finished(
    job: TrainingJob, args: PedroTrainingArguments, checkpoint: str
) -> dict[str, Any] | None:
    """The record of a training that has taken all its steps; None if there are steps to take."""
    state = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_bytes())
    record = Path(job.output) / RECORD_NAME
    asked = args.max_steps if args.max_steps > 0 else state["max_steps"]
    more = args.max_steps <= 0 and args.num_train_epochs > state["num_train_epochs"]
    done = state["global_step"] >= asked and not more
    if not done or not record.is_file():
        return None
    say(f"{job.output}: all {asked} steps are done")
    return dict(json.loads(record.read_bytes()))


@contextlib.contextmanager
def _naming_settings() -> Iterator[None]:
    """Turn what a setting of Trainer's needs and does not find into one line."""
    try:
        yield
    except ImportError as error:
        raise PedroError(f"a setting asks for what is not installed: {error}") from error
    except RuntimeError as error:
        if "requires" not in str(error) or "install" not in str(error):
            raise
        raise PedroError(f"a setting asks for what is not installed: {error}") from error


def _short(rows: list[Row], tokenizer: Any, longest: int | None) -> list[Row]:
    """The rows that the model can take; the others are left out, as in training."""
    kept = [row for row in rows if longest is None or len(encode(tokenizer, row)) <= longest]
    if not kept:
        raise PedroError(f"all {len(rows)} rows have more than {longest} tokens")
    if len(kept) < len(rows):
        say(f"{len(rows) - len(kept):,} rows of more than {longest} tokens left out")
    return kept


def _step_of(checkpoint: str | None) -> int | None:
    return None if checkpoint is None else int(os.path.basename(checkpoint).rpartition("-")[2])


def _report(path: str, data: Dataset, max_length: int | None) -> None:
    tokens = sum(map(len, data.examples))
    text = f"{path}: {len(data):,} rows, {tokens:,} tokens"
    if data.too_long:
        text += f"; {data.too_long:,} rows of more than {max_length} tokens left out"
    say(text)


def say(text: str) -> None:
    """A line of progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
