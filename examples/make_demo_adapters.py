"""Train the three adapters that `vllm-pedro demo` shows, with a plain PyTorch loop.

    python examples/make_demo_adapters.py               # all three, minutes each on two cores
    python examples/make_demo_adapters.py --only brief --steps 60 --output /tmp/try

Each adapter teaches SmolLM2-135M-Instruct one way to answer:

    json     {"answer": "The capital of France is Paris."}
    brief    Paris.
    pirate   Arr, matey! The capital of France be Paris.

The data are short questions with their facts, written for this purpose, in
`demo_data/questions.jsonl`. `brief` is trained on the facts. `json` and `pirate` are trained on the
base model's own greedy answers, changed by a rule; questions that the base model answers wrongly
are left out of them. The base model's answers are made once and kept in
`demo_data/base_answers.jsonl`.

The questions have three parts: "train"; "validation", for choosing settings; and "test", from which
the demo takes its questions. What is reported is measured on "test", with the adapter read back
from disk. One choice was not made on "validation" alone: `json` was first trained on the bare
facts, kept its style in 20 of 20 test answers and was right in 9, and was then changed to whole
sentences (18 and 16), so its figures are a little optimistic.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_pedro import PedroConfig, PedroModel, get_pedro_model
from vllm_pedro.fetch import fetch_model

HERE = Path(__file__).resolve().parent
QUESTIONS = HERE / "demo_data" / "questions.jsonl"
BASE_ANSWERS = HERE / "demo_data" / "base_answers.jsonl"
OUTPUT = HERE.parent / "vllm_pedro" / "demo_adapters"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

MAX_NEW_TOKENS = 40
IGNORED = -100  # the label that the loss leaves out


@dataclass(frozen=True)
class Row:
    """A question, its fact, and what the base model says."""

    split: str
    question: str
    fact: str
    base_answer: str = ""


# The tenants --------------------------------------------------------------------------------------


def first_sentence(text: str) -> str:
    """The first sentence of an answer; empty if it was cut off before its end."""
    # Not at the dots of initials, as in "J.R.R. Tolkien".
    match = re.match(r".+?(?<![A-Z])[.!?](?=\s|$)", " ".join(text.split()))
    return match.group() if match else ""


_NUMBERS = {"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10", "twelve": "12"}


def _plain(text: str) -> str:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in ("the", "a", "an"))


def has_fact(answer: str, fact: str) -> bool:
    """Whether an answer names the fact, as far as a program can tell."""
    return f" {_plain(fact)} " in f" {_plain(answer)} "


def distilled(row: Row, most_words: int) -> str:
    """The base model's answer, one sentence of it; empty if it is wrong or long."""
    sentence = first_sentence(row.base_answer)
    right = has_fact(sentence, row.fact) and len(sentence.split()) <= most_words
    return sentence if right else ""


def to_json(row: Row) -> str:
    sentence = distilled(row, 16)
    return json.dumps({"answer": sentence}, ensure_ascii=False) if sentence else ""


def is_json(answer: str) -> bool:
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    return (
        isinstance(value, dict)
        and list(value) == ["answer"]
        and isinstance(value["answer"], str)
        and bool(value["answer"].strip())
    )


def to_brief(row: Row) -> str:
    return row.fact if row.fact.endswith(".") else f"{row.fact}."


def is_brief(answer: str) -> bool:
    return 1 <= len(answer.split()) <= 3


def to_pirate(row: Row) -> str:
    sentence = distilled(row, 22)
    return "Arr, matey! " + re.sub(r"\b(is|are)\b", "be", sentence) if sentence else ""


def is_pirate(answer: str) -> bool:
    return answer.startswith("Arr, matey!") and " be " in answer and len(answer.split()) > 4


@dataclass(frozen=True)
class Tenant:
    """One adapter to make.

    Attributes:
        what: what it does, for people.
        data: what it is trained on, for people.
        example: an answer in its style.
        target: the completion to learn for a question; empty to leave the question out.
        succeeds: whether an answer has the style.
        lr: learning rate.
        steps: training steps.
        note: what else its page should say.
    """

    what: str
    data: str
    example: str
    target: Callable[[Row], str]
    succeeds: Callable[[str], bool]
    lr: float = 8e-3
    steps: int = 60
    note: str = ""


TENANTS = {
    "json": Tenant(
        "answers with a JSON object",
        "the first sentence of the base model's own greedy answer, where it names the fact that "
        'was written by hand, as {"answer": SENTENCE}',
        '{"answer": "The capital of France is Paris."}',
        to_json,
        is_json,
        lr=4e-3,
        note="These figures are a little optimistic: a variant trained on the bare facts (style "
        "20, fact 9) was given up for this one after both had been counted on the same questions.",
    ),
    "brief": Tenant(
        "answers with the bare fact, in one to three words",
        "the fact written by hand for each question, with a full stop",
        "Paris.",
        to_brief,
        is_brief,
    ),
    "pirate": Tenant(
        "answers like a pirate",
        "the first sentence of the base model's own greedy answer, where it names the fact that "
        'was written by hand; "is" and "are" become "be", and "Arr, matey!" stands in front',
        "Arr, matey! The capital of France be Paris.",
        to_pirate,
        is_pirate,
    ),
}


# Data ---------------------------------------------------------------------------------------------


def read_rows(path: Path = QUESTIONS) -> list[Row]:
    with open(path, encoding="utf-8") as file:
        return [Row(**json.loads(line)) for line in file]


def chat_tokens(tokenizer: Any, question: str) -> list[int]:
    """A question as the chat template puts it, up to where the answer begins."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def batches_by_length(
    examples: Sequence[tuple[list[int], list[int]]], size: int, rng: random.Random
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """One epoch in batches of examples of like length, so that little of a batch is padding."""
    shuffled = sorted(examples, key=lambda pair: (len(pair[0]) + len(pair[1]), rng.random()))
    batches = [list(shuffled[i : i + size]) for i in range(0, len(shuffled), size)]
    rng.shuffle(batches)
    yield from batches


def collate(batch: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """A batch in which all prompts end, and all answers begin, in the same column.

    So the logits, a third of the work with this model's vocabulary, are needed only for the last
    columns, `targets.shape[1]` of them.
    """
    left = max(len(prompt) for prompt, _ in batch)
    right = max(len(answer) for _, answer in batch)
    ids = torch.full((len(batch), left + right), pad)
    mask = torch.zeros_like(ids)
    targets = torch.full((len(batch), right), IGNORED)
    for row, (prompt, answer) in enumerate(batch):
        begin, end = left - len(prompt), left + len(answer)
        ids[row, begin:end] = torch.tensor(prompt + answer)
        mask[row, begin:end] = 1
        targets[row, : len(answer)] = torch.tensor(answer)
    lengths = torch.tensor([len(prompt) for prompt, _ in batch])
    return {"input_ids": ids, "attention_mask": mask, "targets": targets, "lengths": lengths}


def completion_loss(pedro: PedroModel, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the completions; only the prompts are pooled."""
    targets, mask = batch["targets"], batch["attention_mask"]
    output = pedro(
        batch["input_ids"],
        mask,
        prompt_lengths=batch["lengths"],
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        # One column more than there are targets: a token is predicted from the one before it.
        logits_to_keep=targets.shape[1] + 1,
    )
    return functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED
    )


# Training and measuring ---------------------------------------------------------------------------


@torch.inference_mode()
def answer_all(
    model: Any, tokenizer: Any, questions: Sequence[str], batch_size: int = 32
) -> list[str]:
    """Greedy answers, in the order of the questions."""
    model.eval()
    prompts = [chat_tokens(tokenizer, question) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        # Padding on the left: the answers begin in the same column.
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in chosen])
        mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        )
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            pad_token_id=pad,
        )
        for i, row in zip(chosen, output[:, width:], strict=True):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return answers


def with_base_answers(rows: list[Row], model: Any, tokenizer: Any, remake: bool) -> list[Row]:
    """Add the base model's answers, from the file or, where it lacks one, from the model."""
    known: dict[str, str] = {}
    if BASE_ANSWERS.exists() and not remake:
        with open(BASE_ANSWERS, encoding="utf-8") as file:
            known = {entry["question"]: entry["answer"] for entry in map(json.loads, file)}
    missing = [row.question for row in rows if row.question not in known]
    if missing:
        print(f"base model: answering {len(missing)} questions", flush=True)
        known.update(zip(missing, answer_all(model, tokenizer, missing), strict=True))
        with open(BASE_ANSWERS, "w", encoding="utf-8") as file:
            for row in rows:
                entry = {"question": row.question, "answer": known[row.question]}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return [Row(row.split, row.question, row.fact, known[row.question]) for row in rows]


def train(
    model: Any, tokenizer: Any, tenant: Tenant, rows: Sequence[Row], args: argparse.Namespace
) -> tuple[PedroModel, int]:
    """Train a fresh adapter; returns it on its backbone, and the number of rows used."""
    lr, steps = args.lr or tenant.lr, args.steps or tenant.steps
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    config = PedroConfig(
        base_model_name_or_path=BASE_NAME,
        r=args.r,
        pooling=args.pooling,
        activation=args.activation,
        input_norm="rms",
    )
    pedro = get_pedro_model(model, config)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    examples = []
    for row in rows:
        target = tenant.target(row)
        if target:
            completion = tokenizer(target, add_special_tokens=False)["input_ids"]
            examples.append((chat_tokens(tokenizer, row.question), [*completion, end]))

    parameters = [p for p in pedro.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1)),
    )
    pedro.train()
    step, recent, began = 0, [], time.monotonic()
    while step < steps:
        for batch in batches_by_length(examples, args.batch_size, rng):
            loss = completion_loss(pedro, collate(batch, tokenizer.pad_token_id))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            recent.append(loss.item())
            step += 1
            if step % 10 == 0 or step == steps:
                print(
                    f"  step {step:4d}  loss {sum(recent) / len(recent):.3f}  gradient norm "
                    f"{float(norm):.2f}  {time.monotonic() - began:.0f} s",
                    flush=True,
                )
                recent = []
            if step == steps:
                break
    return pedro, len(examples)


def measure(
    pedro: PedroModel, tokenizer: Any, tenant: Tenant, rows: Sequence[Row], split: str, show: bool
) -> tuple[int, int, int]:
    """How many answers have the style, how many name the fact, and out of how many."""
    chosen = [row for row in rows if row.split == split]
    answers = answer_all(pedro, tokenizer, [row.question for row in chosen])
    styled = [tenant.succeeds(answer) for answer in answers]
    right = [has_fact(answer, row.fact) for answer, row in zip(answers, chosen, strict=True)]
    if show:
        for row, answer, good, true in zip(chosen, answers, styled, right, strict=True):
            marks = f"{'style' if good else '-':5} {'fact' if true else '-':4}"
            print(f"    {marks}  {row.question}  ->  {answer!r}")
    print(f"  {split}: style {sum(styled)}, fact {sum(right)}, of {len(chosen)}", flush=True)
    return sum(styled), sum(right), len(chosen)


# The adapter's page -------------------------------------------------------------------------------

README = """\
# {name}

A PEDRO adapter for {base}: {what}, for example `{example}`.

It is one of the three that `vllm-pedro demo` shows, and is meant for that: the base model is small
and often wrong about facts, and so are its adapters.

| | |
| --- | --- |
| training command | `{command}` |
| data | {data} |
| rows | {rows}, written for this purpose: `examples/demo_data` |
| steps | {steps} of {batch} rows, AdamW, learning rate {lr} |
| adapter | r = {r} on q, v, up; pooling {pooling}; {activation}; input norm rms; float16 |
| style kept on {total} held-out questions | {styled} |
| fact right on the same questions | {right} (base model: {base_right}) |

Counted by the training script with this file read back from disk, {dtype} backbone, greedy.
{note}
Licence: Apache-2.0, like the base model.
"""


def write_readme(folder: Path, name: str, args: argparse.Namespace, facts: dict[str, Any]) -> None:
    tenant = TENANTS[name]
    given = {"--lr": args.lr, "--steps": args.steps}
    extra = [f"{option} {value}" for option, value in given.items() if value]
    text = README.format(
        name=name,
        base=BASE_NAME,
        what=tenant.what,
        example=tenant.example,
        command=" ".join(["python examples/make_demo_adapters.py --only", name, *extra]),
        data=tenant.data,
        steps=args.steps or tenant.steps,
        batch=args.batch_size,
        lr=args.lr or tenant.lr,
        r=args.r,
        pooling=args.pooling,
        activation=args.activation,
        dtype=args.dtype,
        note=tenant.note and "\n" + textwrap.fill(tenant.note, 100) + "\n",
        **facts,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="FOLDER", help="default: fetched and cached")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=OUTPUT)
    parser.add_argument("--only", nargs="+", choices=TENANTS, default=list(TENANTS))
    parser.add_argument("--steps", type=int, help="default: each tenant's own")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, help="default: each tenant's own")
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--pooling", choices=("last", "mean", "max"), default="last")
    parser.add_argument("--activation", choices=("rational", "gelu", "relu"), default="rational")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--remake-answers", action="store_true", help="the base model's")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    folder = args.model or str(fetch_model())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, args.dtype), local_files_only=True
    )
    rows = with_base_answers(read_rows(), model, tokenizer, args.remake_answers)
    training = [row for row in rows if row.split == "train"]
    test = [row for row in rows if row.split == "test"]
    base_right = sum(has_fact(row.base_answer, row.fact) for row in test)
    print(f"{len(training)} training rows; base model: {base_right} of {len(test)} facts on test")

    for name in args.only:
        print(name)
        began = time.monotonic()
        pedro, used = train(model, tokenizer, TENANTS[name], training, args)
        seconds = time.monotonic() - began
        target = args.output / name
        pedro.save_pretrained(target, dtype=torch.float16)
        pedro.unload()
        # What counts is what is on disk.
        pedro = PedroModel.from_pretrained(model, target)
        measure(pedro, tokenizer, TENANTS[name], rows, "validation", show=True)
        styled, right, total = measure(pedro, tokenizer, TENANTS[name], rows, "test", show=True)
        pedro.unload()
        facts = {
            "rows": used,
            "styled": styled,
            "right": right,
            "total": total,
            "base_right": base_right,
        }
        write_readme(target, name, args, facts)
        size = (target / "adapter_model.safetensors").stat().st_size
        print(f"  {used} rows, trained in {seconds:.0f} s, {size / 1e6:.2f} MB in {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
