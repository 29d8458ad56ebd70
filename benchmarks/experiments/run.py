"""One table of the paper: methods x tasks x seeds, with the same trainer, data and metric.

A config file says what: a backbone, tasks (data files and a metric), methods, seeds, steps. A task
or a method may say otherwise for itself: what stands there goes before the config's own. Each run
is one line in the results file; runs that are there already are not repeated, so a killed
experiment goes on where it was, and several processes may share a results file: each takes the next
run that no other one has. `--table` prints medians and spread, `--against METHOD` the differences
from a method and whether they are more than noise, `--plot` draws scores over parameters.

    python benchmarks/experiments/run.py benchmarks/experiments/table1.json [--data DIR]
    python benchmarks/experiments/run.py benchmarks/experiments/table1.json --table
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parent))

from controlled import write_task
from public import fetch_task

from vllm_pedro import PedroConfig, get_pedro_model
from vllm_pedro.bench import tables
from vllm_pedro.bench.figures import Spread
from vllm_pedro.fetch import fetch_model
from vllm_pedro.training.collator import CompletionCollator
from vllm_pedro.training.data import Dataset, encode, load_dataset, read_rows
from vllm_pedro.training.evaluate import TransformersEngine, evaluate
from vllm_pedro.training.inspection import prompt_use, vectors_of_prompts
from vllm_pedro.training.run import choose_dtype, load_backbone, load_tokenizer, pad_token_id
from vllm_pedro.training.start import condition
from vllm_pedro.training.trainer import PedroTrainer, PedroTrainingArguments, TrainingDiverged


class _AdaLora(TrainerCallback):
    """AdaLoRA moves its budget between the gradients and their end."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step)


def add_method(backbone: Any, method: dict[str, Any], steps: int) -> tuple[Any, list[Any]]:
    """The backbone with a method's parameters on it, and the callbacks the method needs."""
    settings = dict(method["settings"])
    kind = method["kind"]
    if kind == "pedro":
        return get_pedro_model(backbone, PedroConfig(**settings)), []
    import peft

    if kind == "adalora":
        settings |= {"total_step": steps, "tinit": steps // 10, "tfinal": steps // 5}
    config_class = {
        "lora": peft.LoraConfig,
        "ia3": peft.IA3Config,
        "adalora": peft.AdaLoraConfig,
        # Backbones without biases have none that BitFit could train; the norms' weights are as few.
        "ln-tuning": peft.LNTuningConfig,
        "prompt-tuning": peft.PromptTuningConfig,
        "p-tuning": peft.PromptEncoderConfig,
    }[kind]
    model = peft.get_peft_model(backbone, config_class(task_type="CAUSAL_LM", **settings))
    return model, [_AdaLora()] if kind == "adalora" else []


@functools.cache
def training_data(folder: str, path: Path, longest: int | None, rows: int | None) -> Dataset:
    """A task's tokenised rows, which do not change from run to run."""
    return load_dataset(path, load_tokenizer(folder), longest, rows)


def run_one(
    config: dict[str, Any], task: dict[str, Any], method: dict[str, Any], seed: int, root: Path
) -> dict[str, Any]:
    """Train one method on one task with one seed, and score it."""
    config = config | task | method
    folder = config["model"] or str(fetch_model(progress=False))
    backbone, tokenizer = load_backbone(folder, choose_dtype(config.get("dtype", "auto")))
    if "attention" in config:
        backbone.set_attn_implementation(config["attention"])
    longest = config.get("max_length")
    data = training_data(folder, root / task["train"], longest, config.get("train_rows"))
    steps = config["max_steps"]
    set_seed(seed)
    model, callbacks = add_method(backbone, method, steps)
    collator = CompletionCollator(pad_token_id(tokenizer))
    if method.get("start") == "data":
        condition(model, data, collator)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        args = PedroTrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=config["batch_size"],
            learning_rate=method["learning_rate"],
            bilevel=method.get("bilevel", False),
            coefficient_learning_rate=method.get("coefficient_learning_rate"),
            coefficient_range=method.get("coefficient_range", 0.0),
            down_learning_rate=method.get("down_learning_rate"),
            fan_in_learning_rates=method.get("fan_in_learning_rates", False),
            lr_scheduler_type=config.get("lr_scheduler_type", "linear"),
            weight_decay=config.get("weight_decay", 0.0),
            train_sampling_strategy=config.get("train_sampling_strategy", "random"),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            logging_steps=steps,
        )
        trainer = PedroTrainer(
            model,
            args,
            train_dataset=data,
            data_collator=collator,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)  # standard output has the table alone
        found: dict[str, Any] = {
            "task": task["name"],
            "method": method["name"],
            "seed": seed,
            "trainable_parameters": trainable,
        }
        try:
            found["train_loss"] = trainer.train().training_loss
        except TrainingDiverged as error:
            return found | {"diverged": str(error)}
    trained = time.monotonic()
    rows = read_rows(root / task["dev"])
    longest = config.get("dev_max_length", longest)
    if longest is not None:  # as in training, long rows are left out
        rows = [row for row in rows if len(encode(tokenizer, row)) <= longest]
    rows = rows[: config.get("dev_rows")]
    engine = TransformersEngine(model, pad_token_id(tokenizer))
    found |= evaluate(engine, tokenizer, rows, task["metric"], config.get("max_new_tokens", 32))
    for_loss = rows[: config.get("loss_rows", len(rows))]
    if for_loss:
        found["dev_loss"] = evaluate(engine, tokenizer, for_loss, "loss")["loss"]
    if method["kind"] == "pedro" and method["settings"].get("r", 12) > 0:
        examples = [encode(tokenizer, row) for row in rows[: config.get("use_rows", 24)]]
        prompts = [example.prompt for example in examples]
        use = prompt_use(model, examples, vectors_of_prompts(model, prompts))
        found |= {"prompt_share": use.share, "swapped_loss": use.loss_swapped}
    return found | {
        "train_seconds": round(trained - began, 1),
        "eval_seconds": round(time.monotonic() - trained, 1),
    }


def make_task(task: dict[str, Any], folder: Path) -> None:
    """Write a controlled task's files below `folder`, unless they are there."""
    for kind, (seed, rows) in task["controlled"].items():
        if not (folder / task[kind]).exists():
            write_task(task["name"], folder / task[kind], seed, rows)


def small_form(config: dict[str, Any]) -> dict[str, Any]:
    """The config with what its `small` and its tasks' `small` say put in place of its own."""
    small = dict(config["small"])
    names = small.pop("tasks", [task["name"] for task in config["tasks"]])
    tasks = [task | task.get("small", {}) for task in config["tasks"] if task["name"] in names]
    return config | small | {"tasks": tasks}


Key = tuple[str, str, int]


def key_of(run: dict[str, Any]) -> Key:
    """What no two runs of a results file share: task, method, seed."""
    return run["task"], run["method"], run["seed"]


def read_results(path: Path) -> list[dict[str, Any]]:
    """The runs that are there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


class Claims:
    """Which runs are being made, by whatever process: one lock in a file beside the results each.

    The system frees what a process holds when it ends, however it does.
    """

    def __init__(self, results: Path) -> None:
        self._file = results.with_name(results.name + ".lock").open("w")

    def take(self, key: Key) -> bool:
        """Whether the run is this process's from now on."""
        try:
            fcntl.lockf(
                self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, zlib.crc32(repr(key).encode())
            )
        except BlockingIOError:
            return False
        return True


# Student's t, two-sided, 5 %, by degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def differences(
    config: dict[str, Any], results: list[dict[str, Any]], against: str, key: str
) -> str:
    """Mean differences of each method from one, seed by seed, as a Markdown table.

    A paired t-test over the seeds that both have; `*` marks a difference whose 95 % confidence
    interval leaves out zero. No correction is made for the number of tests.
    """
    rows = []
    for method in config["methods"]:
        cells = []
        for task in config["tasks"]:
            values = {
                (r["method"], r["seed"]): r[key]
                for r in results
                if r["task"] == task["name"] and key in r
            }
            pairs = [
                value - values[against, seed]
                for (name, seed), value in values.items()
                if name == method["name"] and (against, seed) in values
            ]
            if method["name"] == against or not pairs:
                cells.append("-")
                continue
            text = f"{statistics.fmean(pairs):+.3f}"
            if len(pairs) > 1:
                error = statistics.stdev(pairs) / len(pairs) ** 0.5
                half = T_95[min(len(pairs) - 1, len(T_95)) - 1] * error
                text += f" ± {half:.3f}" + (" *" if abs(statistics.fmean(pairs)) > half else "")
            cells.append(f"{text} ({len(pairs)})")
        rows.append([method.get("label", method["name"]), *cells])
    names = [f"{task['name']}, {key}" for task in config["tasks"]]
    return tables.table([f"less {against}", *names], rows)


def table(config: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Medians over seeds, with the range, as a Markdown table."""
    columns = [(task, task["score"], 100, task["name"]) for task in config["tasks"]]
    for task in reversed(config["tasks"]):
        if any(r["task"] == task["name"] and "dev_loss" in r for r in results):
            place = next(i for i, column in enumerate(columns) if column[0] is task)
            columns.insert(place + 1, (task, "dev_loss", 1, f"{task['name']}, dev loss"))
    rows = []
    for method in config["methods"]:
        mine = [r for r in results if r["method"] == method["name"]]
        count = f"{mine[0]['trainable_parameters']:,}" if mine else ""
        cells = []
        for task, key, scale, _ in columns:
            runs = [r for r in mine if r["task"] == task["name"]]
            values = [scale * r[key] for r in runs if key in r]
            digits = 1 if scale == 100 else 3
            text = "-"
            if values:
                text = f"{values[0]:.{digits}f}"
            if len(values) > 1:
                text = Spread.of(values).format(digits)
            diverged = sum("diverged" in r for r in runs)
            cells.append(text + (f", {diverged} diverged" if diverged and scale == 100 else ""))
        rows.append([method.get("label", method["name"]), count, *cells])
    return tables.table(["method", "parameters", *(column[3] for column in columns)], rows)


def plot(config: dict[str, Any], results: list[dict[str, Any]], path: Path) -> None:
    """Scores and dev loss over the number of parameters, one line for each kind of method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = config["tasks"]
    kinds = list(dict.fromkeys(method["kind"] for method in config["methods"]))
    looks = dict(
        zip(kinds, (("o", "-", "0.0"), ("s", "--", "0.45"), ("^", ":", "0.6")), strict=False)
    )
    figure, axes = pyplot.subplots(
        len(tasks), 2, figsize=(8.0, 3.0 * len(tasks)), squeeze=False, layout="constrained"
    )
    for row, task in zip(axes, tasks, strict=True):
        for axis, key, scale in ((row[0], task["score"], 100), (row[1], "dev_loss", 1)):
            for kind in kinds:
                points = []
                for method in config["methods"]:
                    runs = [
                        r
                        for r in results
                        if (r["method"], r["task"]) == (method["name"], task["name"]) and key in r
                    ]
                    if method["kind"] == kind and runs:
                        spread = Spread.of(scale * r[key] for r in runs)
                        ends = (spread.median - spread.low, spread.high - spread.median)
                        points.append((runs[0]["trainable_parameters"], spread.median, *ends))
                marker, line, grey = looks[kind]
                x, y, below, above = zip(*sorted(points), strict=True)
                axis.errorbar(
                    x,
                    y,
                    yerr=(below, above),
                    marker=marker,
                    linestyle=line,
                    color=grey,
                    capsize=3,
                    label="PEDRO" if kind == "pedro" else "LoRA" if kind == "lora" else kind,
                )
            axis.set_xscale("log")
            axis.set_ylim(bottom=0, top=100 if scale == 100 else None)
            axis.set_xlabel("trainable parameters")
            axis.set_ylabel(f"{key}, %" if scale == 100 else "dev loss, nats a token")
            axis.set_title(task["name"])
            axis.grid(alpha=0.3)
        row[0].legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of the data files; default: public data sets, fetched through `datasets`",
    )
    parser.add_argument("--results", type=Path, help="default: beside the config, .full.jsonl")
    parser.add_argument(
        "--small", action="store_true", help="the config's small form, for machines without a GPU"
    )
    parser.add_argument("--only", nargs="+", metavar="METHOD")
    parser.add_argument("--tasks", nargs="+", metavar="TASK")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="of the config's")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="default: the config's; name other --results for it"
    )
    parser.add_argument("--model", metavar="FOLDER", help="the backbone; default: the config's")
    parser.add_argument("--table", action="store_true", help="print what there is; run nothing")
    parser.add_argument(
        "--against", metavar="METHOD", help="print differences from this method; run nothing"
    )
    parser.add_argument("--score", default="dev_loss", help="of --against (dev_loss)")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw scores over parameters; run nothing"
    )
    args = parser.parse_args()
    config = json.loads(args.config.read_text())
    if args.small:
        config = small_form(config)
    if args.model is not None:
        config["model"] = args.model
    if args.steps is not None:
        config["tasks"] = [task | {"max_steps": args.steps} for task in config["tasks"]]
    path = args.results or args.config.with_suffix(".small.jsonl" if args.small else ".full.jsonl")
    results = read_results(path)
    if args.plot is not None:
        plot(config, results, args.plot)
    elif args.against is not None:
        print(differences(config, results, args.against, args.score))
        return 0
    elif not args.table:
        fetches = args.data is None
        if fetches:
            args.data = args.config.parent / "data"
        for task in config["tasks"]:
            if "controlled" in task:
                make_task(task, args.data)
            elif fetches:
                fetch_task(task, args.data)
        seeds = config["seeds"] if args.seeds is None else args.seeds
        claims = Claims(path)
        for seed, task, method in itertools.product(seeds, config["tasks"], config["methods"]):
            key = (task["name"], method["name"], seed)
            if args.only and method["name"] not in args.only:
                continue
            if (args.tasks and task["name"] not in args.tasks) or not claims.take(key):
                continue
            if key in map(key_of, read_results(path)):  # by now
                continue
            found = run_one(config, task, method, seed, args.data)
            with path.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), file=sys.stderr, flush=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        results = read_results(path)
    print(table(config, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
