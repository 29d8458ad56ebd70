"""Make the three adapters that `vllm-pedro demo` shows: data, `vllm-pedro train`, and a count.

    python examples/make_demo_adapters.py               # all three, minutes each on two cores
    python examples/make_demo_adapters.py --only brief --output /tmp/try
    python examples/make_demo_adapters.py --data        # write the data again, train nothing

Each adapter teaches SmolLM2-135M-Instruct one way to answer:

    json     {"answer": "The capital of France is Paris."}
    brief    Paris.
    pirate   Arr, matey! The capital of France be Paris.

Where the data come from: short questions with their facts, written for this purpose, in
`demo_data/questions.jsonl`. `brief` is trained on the facts. `json` and `pirate` are trained on the
base model's own greedy answers (`demo_data/base_answers.jsonl`), changed by a rule; questions that
the base model answers wrongly are left out of them. What `vllm-pedro train` reads, chats, is
written to `demo_data/NAME/train.jsonl` and `dev.jsonl`.

The questions marked "test", from which the demo takes its own, are in neither file; every sixth of
the others is in the dev data, which choose the checkpoint. The counts on the adapters' pages are
made on "test", with the adapter read back from disk. Settings were chosen on other questions, but
for one thing: `json` was once trained on bare facts, and given up for whole sentences after both
had been counted on "test".
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_pedro import PedroModel
from vllm_pedro.fetch import fetch_model
from vllm_pedro.training.data import Row, prompt_tokens
from vllm_pedro.training.evaluate import TransformersEngine
from vllm_pedro.training.run import RECORD_NAME, load_backbone, pad_token_id

HERE = Path(__file__).resolve().parent
DATA = HERE / "demo_data"
QUESTIONS = DATA / "questions.jsonl"
BASE_ANSWERS = DATA / "base_answers.jsonl"
OUTPUT = HERE.parent / "vllm_pedro" / "demo_adapters"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

MAX_NEW_TOKENS = 40
DEV_EVERY = 6
SHIPPED = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Question:
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


def distilled(question: Question, most_words: int) -> str:
    """The base model's answer, one sentence of it; empty if it is wrong or long."""
    sentence = first_sentence(question.base_answer)
    right = has_fact(sentence, question.fact) and len(sentence.split()) <= most_words
    return sentence if right else ""


def to_json(question: Question) -> str:
    sentence = distilled(question, 16)
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


def to_brief(question: Question) -> str:
    return question.fact if question.fact.endswith(".") else f"{question.fact}."


def is_brief(answer: str) -> bool:
    return 1 <= len(answer.split()) <= 3


def to_pirate(question: Question) -> str:
    sentence = distilled(question, 22)
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
        learning_rate: of its training.
        steps: of its training.
    """

    what: str
    data: str
    example: str
    target: Callable[[Question], str]
    succeeds: Callable[[str], bool]
    learning_rate: float = 1e-2
    steps: int = 40


TENANTS = {
    "json": Tenant(
        "answers with a JSON object",
        "the first sentence of the base model's own greedy answer, where it names the fact that "
        'was written by hand, as {"answer": SENTENCE}',
        '{"answer": "The capital of France is Paris."}',
        to_json,
        is_json,
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


def read_questions() -> list[Question]:
    with open(QUESTIONS, encoding="utf-8") as file:
        questions = [Question(**json.loads(line)) for line in file]
    with open(BASE_ANSWERS, encoding="utf-8") as file:
        known = {entry["question"]: entry["answer"] for entry in map(json.loads, file)}
    return [replace(q, base_answer=known[q.question]) for q in questions]


def answer_all(engine: TransformersEngine, tokenizer: Any, questions: Sequence[str]) -> list[str]:
    """Greedy answers, in the order of the questions."""
    prompts = [
        prompt_tokens(tokenizer, Row("", [{"role": "user", "content": question}], ""))
        for question in questions
    ]
    return [
        tokenizer.decode(tokens, skip_special_tokens=True).strip()
        for tokens in engine.generate(prompts, MAX_NEW_TOKENS)
    ]


def data_files(name: str) -> dict[str, Path]:
    return {kind: DATA / name / f"{kind}.jsonl" for kind in ("train", "dev")}


def write_data(questions: Sequence[Question]) -> None:
    """Each tenant's questions and answers as chats."""
    for name, tenant in TENANTS.items():
        rows = []
        for question in questions:
            target = tenant.target(question) if question.split != "test" else ""
            if target:
                turns = (("user", question.question), ("assistant", target))
                messages = [{"role": role, "content": text} for role, text in turns]
                rows.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        files = data_files(name)
        files["dev"].parent.mkdir(exist_ok=True)
        files["dev"].write_text("".join(rows[::DEV_EVERY]), encoding="utf-8")
        train = [row for number, row in enumerate(rows) if number % DEV_EVERY]
        files["train"].write_text("".join(train), encoding="utf-8")


# Training and counting ----------------------------------------------------------------------------


def training_command(name: str, model: str, output: str) -> list[str]:
    """The command line that trains an adapter."""
    tenant, files = TENANTS[name], data_files(name)
    words = f"vllm-pedro train --model {model} --train TRAIN --dev DEV --output {output}"
    words += f" --base-model-name {BASE_NAME} --r 4 --max-steps {tenant.steps} --eval-steps 10"
    words += f" --per-device-train-batch-size 8 --learning-rate {tenant.learning_rate:g}"
    words += " --down-learning-rate 1e-4 --coefficient-learning-rate 1e-3 --seed 0"
    words += " --dtype bfloat16 --save-dtype float16"
    paths = {"TRAIN": files["train"], "DEV": files["dev"]}
    root = HERE.parent
    return [str(paths[w].relative_to(root)) if w in paths else w for w in words.split()]


def train(name: str, model: str, target: Path) -> dict[str, Any]:
    """Train an adapter and keep the files that ship; returns the training's record."""
    with tempfile.TemporaryDirectory() as scratch:
        command = training_command(name, model, scratch)
        # Of this environment, whether it is active or not.
        command[0] = str(Path(sys.executable).with_name(command[0]))
        subprocess.run(command, check=True, cwd=HERE.parent, stdout=subprocess.DEVNULL)
        target.mkdir(parents=True, exist_ok=True)
        for file in SHIPPED:
            (target / file).write_bytes(Path(scratch, file).read_bytes())
        record: dict[str, Any] = json.loads(Path(scratch, RECORD_NAME).read_text())
    return record


def count(
    model: Any, tokenizer: Any, tenant: Tenant, questions: Sequence[Question]
) -> dict[str, int]:
    """How many test answers have the style, how many name the fact, and out of how many."""
    chosen = [q for q in questions if q.split == "test"]
    engine = TransformersEngine(model, pad_token_id(tokenizer))
    answers = answer_all(engine, tokenizer, [q.question for q in chosen])
    styled = [tenant.succeeds(answer) for answer in answers]
    right = [has_fact(answer, q.fact) for answer, q in zip(answers, chosen, strict=True)]
    for q, answer, good, true in zip(chosen, answers, styled, right, strict=True):
        marks = f"{'style' if good else '-':5} {'fact' if true else '-':4}"
        print(f"    {marks}  {q.question}  ->  {answer!r}")
    base_right = sum(has_fact(q.base_answer, q.fact) for q in chosen)
    print(f"  style {sum(styled)}, fact {sum(right)} (base {base_right}), of {len(chosen)}")
    return {
        "styled": sum(styled),
        "right": sum(right),
        "base_right": base_right,
        "total": len(chosen),
    }


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
| rows | {rows} to train and {dev_rows} dev rows, written for this purpose: `examples/demo_data` |
| adapter | r = 4 on q, v, up; pooling last; rational; input norm rms; float16 |
| dev loss | {dev_losses}; step {best_step} is kept |
| style kept on {total} held-out questions | {styled} |
| fact right on the same questions | {right} (base model: {base_right}) |

`python examples/make_demo_adapters.py --only {name}` makes it again, data and count included. The
count is of greedy answers with this file read back from disk, bfloat16 backbone.

Licence: Apache-2.0, like the base model.
"""


def write_readme(folder: Path, name: str, record: dict[str, Any], counts: dict[str, int]) -> None:
    tenant = TENANTS[name]
    losses = ", ".join(f"{loss:.3f} (step {n})" for n, loss in record["dev_losses"].items())
    text = README.format(
        name=name,
        base=BASE_NAME,
        what=tenant.what,
        example=tenant.example,
        command=shlex.join(training_command(name, "MODEL", name)),
        data=tenant.data,
        rows=record["rows"]["train"],
        dev_rows=record["rows"]["dev"],
        dev_losses=losses,
        best_step=record["best_step"],
        **counts,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="FOLDER", help="default: fetched and cached")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=OUTPUT)
    parser.add_argument("--only", nargs="+", choices=TENANTS, default=list(TENANTS))
    parser.add_argument("--data", action="store_true", help="write the data and stop")
    parser.add_argument("--remake-answers", action="store_true", help="the base model's")
    args = parser.parse_args(argv)
    folder = args.model or str(fetch_model())
    model, tokenizer = load_backbone(folder, torch.bfloat16)
    questions = read_questions()
    if args.remake_answers:
        engine = TransformersEngine(model, pad_token_id(tokenizer))
        answers = answer_all(engine, tokenizer, [q.question for q in questions])
        with open(BASE_ANSWERS, "w", encoding="utf-8") as file:
            for q, answer in zip(questions, answers, strict=True):
                entry = {"question": q.question, "answer": answer}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        questions = read_questions()
    write_data(questions)
    if args.data:
        return 0
    for name in args.only:
        print(name, flush=True)
        target = args.output / name
        record = train(name, folder, target)
        # What counts is what is on disk.
        pedro = PedroModel.from_pretrained(model, target)
        write_readme(target, name, record, count(pedro, tokenizer, TENANTS[name], questions))
        pedro.unload()
    return 0


if __name__ == "__main__":
    sys.exit(main())
