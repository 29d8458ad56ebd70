"""A whole distillation: from a teacher's folder and prompts to an adapter and a report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from transformers import AutoConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapter import load_adapter
from ..adapter.hub import push
from ..backbone import check_model_folder
from ..errors import PedroError
from ..files import replace_file
from ..model import PedroModel
from ..training.data import Dataset, encode
from ..training.evaluate import Engine, TransformersEngine, evaluate
from ..training.progress import clock
from ..training.run import (
    RECORD_NAME,
    TrainingData,
    TrainingJob,
    choose_dtype,
    end_tokens,
    find_checkpoint,
    finished,
    load_tokenizer,
    pad_token_id,
    say,
    take_repository,
    train_adapter,
)
from ..training.trainer import PedroTrainingArguments
from .answers import ANSWERS_NAME, Answer, AnswerFile, bytes_per_token
from .engine import Question, Sampling, TransformersTeacher
from .lessons import DistillTrainer, Lesson, LessonCollator, lesson_of, lesson_of_label
from .prompts import Parts, part, read_prompts
from .report import (
    REPORT_NAME,
    ROWS_NAME,
    compare,
    describe,
    teacher_perplexity,
    way_of,
)
from .sampling import prompts_name, read_beginnings, sample_prompts, write_prompts
from .teachers import TeacherFolder, find_teacher, loaded_teacher

CHUNK: Final = 64
"""Prompts of one teacher that are asked together, and kept together."""
TOGETHER: Final = 8
"""Teachers that are asked together, where the engine can."""
SCORES_NAME: Final = "teacher.json"


class Teachers(Protocol):
    """An engine that serves teachers; `integration.distill.start_teachers` starts one."""

    def answer(self, questions: Sequence[Question], how: Sampling) -> list[list[Answer]]:
        """See `engine.Teacher`; the questions say whom they ask."""

    def engine_of(self, teacher: TeacherFolder) -> Engine:
        """What a metric needs of one teacher."""


class Server(Protocol):
    """What can serve teachers: the module `integration.distill`."""

    def why_not(self, teacher: TeacherFolder) -> str | None:
        """Why it cannot serve this one; None if it can."""

    def start_teachers(
        self,
        model: str,
        teachers: Sequence[TeacherFolder],
        max_model_len: int,
        dtype: str,
        top_k: int,
    ) -> AbstractContextManager[Teachers]:
        """An engine with some teachers, for a block."""


@dataclass(frozen=True)
class DistillJob:
    """What is to imitate whom.

    Attributes:
        training: the student's training: `train` are the prompts, `dev` and `test`, if given, more
            of them. `test_metric` scores rows that have completions.
        teacher: the teacher's folder.
        answers: how many to each prompt: the greedy one, and others sampled.
        sample_temperature: of the sampled ones.
        max_new_tokens: where answers are cut off.
        top_k: how many of the likeliest tokens are kept of each place.
        temperature: of the loss; see `divergence`.
        label_share: how much of the loss is cross-entropy on completions, of rows that have them.
        held_out: the part of the prompts to hold out for each of dev and test that is not given.
        answer_seed: of the sampled answers.
        answers_folder: where the teacher's answers are kept; None for the output folder.
        sample_prompts: how many prompts to sample from the teacher, in place of `train`; they are
            kept beside the answers.
        beginnings: a file of how they begin; None for the chat template.
    """

    training: TrainingJob
    teacher: str
    answers: int = 1
    sample_temperature: float = 1.0
    max_new_tokens: int = 128
    top_k: int = 32
    temperature: float = 1.0
    label_share: float = 0.0
    held_out: float = 0.1
    answer_seed: int = 0
    answers_folder: str | None = None
    sample_prompts: int = 0
    beginnings: str | None = None

    @property
    def folder(self) -> Path:
        """Where the teacher's answers are kept."""
        return Path(self.answers_folder or self.training.output)

    def check(self) -> None:
        """Raise a PedroError for a number that cannot be."""
        for name, value in (
            ("--answers", self.answers),
            ("--max-new-tokens", self.max_new_tokens),
            ("--top-k", self.top_k),
        ):
            if value < 1:
                raise PedroError(f"{name}: expected 1 or more, found {value}")
        for name, number in (
            ("--temperature", self.temperature),
            ("--sample-temperature", self.sample_temperature),
        ):
            if not 0 < number < math.inf:
                raise PedroError(f"{name}: expected a number above 0, found {number:g}")
        if not 0 <= self.label_share <= 1:
            raise PedroError(f"--label-share: expected 0 to 1, found {self.label_share:g}")
        if not 0 < self.held_out < 0.5:
            raise PedroError(f"--held-out-prompts: expected 0 to 0.5, found {self.held_out:g}")


@dataclass(frozen=True)
class Work:
    """A job whose teacher and prompts are known to be usable.

    Attributes:
        job: the job.
        teacher: its teacher.
        parts: its prompts.
        file: the teacher's answers so far, to all of `parts`.
        questions: what it is asked, one for each prompt.
        checkpoint: where the student's training goes on from.
        tokenizer: the backbone's.
        vocabulary: the number of its tokens.
    """

    job: DistillJob
    teacher: TeacherFolder
    parts: Parts
    file: AnswerFile
    questions: list[Question]
    checkpoint: str | None
    tokenizer: Any
    vocabulary: int

    @property
    def how(self) -> Sampling:
        """How it is asked."""
        job = self.job
        return Sampling(job.max_new_tokens, job.sample_temperature, job.top_k)

    @property
    def folder(self) -> Path:
        """Where the answers are kept."""
        return self.job.folder


def distill(
    job: DistillJob,
    args: PedroTrainingArguments,
    load: Callable[[], Any],
    server: Server | None = None,
) -> dict[str, Any]:
    """Ask a teacher, train a student on its answers, and compare the two.

    Args:
        job: who is to imitate whom.
        args: see `training.run.train`.
        load: gives the backbone for the student; it is called once the teacher is done.
        server: what to ask the teacher with, if it can serve it; None for transformers.

    Returns:
        The report, which is also saved as `report.json` in the output folder.

    Raises:
        PedroError: unusable teacher, prompts, model or settings; the training diverged.
    """
    work = prepare(job, args, server)
    answer_all([work], server)
    return learn(work, args, load())


def prepare(job: DistillJob, args: PedroTrainingArguments, server: Server | None = None) -> Work:
    """Check a job before anything heavy is started; but its teacher makes up prompts, if it is to.

    Raises:
        PedroError: see `distill`.
    """
    job.check()
    training = job.training
    if args.world_size > 1:
        raise PedroError("distill runs in one process; start it without torchrun")
    check_model_folder(training.model)
    tokenizer = load_tokenizer(training.model)
    teacher = find_teacher(job.teacher, training.model, tokenizer)
    config = AutoConfig.from_pretrained(training.model, local_files_only=True).get_text_config()
    vocabulary = int(config.vocab_size)
    if job.top_k >= vocabulary:
        raise PedroError(f"--top-k: expected less than the {vocabulary} tokens that there are")
    longest = training.max_length or getattr(config, "max_position_embeddings", None)
    room = None if longest is None else longest - job.max_new_tokens
    how: dict[str, Any] = {
        "prompt_length": training.prompt_length,
        "all_turns": training.all_turns,
        "options": training.chat_template_kwargs,
        "end_tokens": end_tokens(training.model),
    }
    if job.sample_prompts > 0:
        training = dataclasses.replace(training, train=_sample(job, teacher, tokenizer, server))
        job = dataclasses.replace(job, training=training)
    prompts, dev, test = (
        None if path is None else read_prompts(path, tokenizer, room, limit, how)
        for path, limit in (
            (training.train, training.limit),
            (training.dev, training.dev_limit),
            (training.test, None),
        )
    )
    assert prompts is not None
    parts = part(prompts, dev, test, job.held_out)
    has_checkpoint = any(Path(training.output).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    resuming = dataclasses.replace(training, resume=training.resume and has_checkpoint)
    checkpoint = find_checkpoint(resuming, args)
    questions = [
        Question(
            prompt.example.prompt,
            prompt.example.prompt_length,
            # The report compares greedy answers.
            job.answers if number < len(parts.train) + len(parts.dev) else 1,
            job.answer_seed + number,
            teacher.folder,
        )
        for number, prompt in enumerate(parts.all)
    ]
    header = {
        "teacher": teacher.digest,
        "prompts": parts.digest(),
        "answers": job.answers,
        "sample_temperature": job.sample_temperature,
        "max_new_tokens": job.max_new_tokens,
        "top_k": job.top_k,
        "answer_seed": job.answer_seed,
    }
    folder = job.folder
    if training.force and not _same_header(folder / ANSWERS_NAME, header):
        for name in (ANSWERS_NAME, SCORES_NAME):
            (folder / name).unlink(missing_ok=True)
    file = AnswerFile(folder / ANSWERS_NAME, header, len(questions), CHUNK)
    if training.force:
        (Path(training.output) / REPORT_NAME).unlink(missing_ok=True)
    return Work(job, teacher, parts, file, questions, checkpoint, tokenizer, vocabulary)


def _same_header(path: Path, header: dict[str, Any]) -> bool:
    try:
        with open(path, "rb") as file:
            return bool(json.loads(file.readline()) == header)
    except (OSError, ValueError):
        return False


def _sample(job: DistillJob, teacher: TeacherFolder, tokenizer: Any, server: Server | None) -> str:
    """Have the teacher make up prompts, unless they are there; the file that has them."""
    beginnings = read_beginnings(job.beginnings, tokenizer)
    training, dtype = job.training, choose_dtype(job.training.dtype)
    how = Sampling(job.max_new_tokens, job.sample_temperature, 1)
    name = prompts_name(teacher.digest, beginnings, job.sample_prompts, how, job.answer_seed)
    path = job.folder / name
    if path.exists():
        return str(path)
    asks = (teacher.folder, tokenizer, beginnings, job.sample_prompts, how, job.answer_seed)
    if server is not None and server.why_not(teacher) is None:
        longest = max(len(tokenizer(b.text)["input_ids"]) for b in beginnings)
        longest += job.max_new_tokens + 1
        kind = str(dtype).removeprefix("torch.")
        with server.start_teachers(training.model, [teacher], longest, kind, 1) as teachers:
            rows = sample_prompts(teachers.answer, *asks)
    else:
        with loaded_teacher(teacher, training.model, dtype, training.bits) as model:
            ends = _ends(training.model, tokenizer)
            engine = TransformersTeacher(model, pad_token_id(tokenizer), ends)
            rows = sample_prompts(engine.answer, *asks)
    write_prompts(path, rows)
    return str(path)


# The teacher -------------------------------------------------------------------------------------


def answer_all(works: Sequence[Work], server: Server | None = None) -> None:
    """Have teachers answer what they have not answered yet, and score them.

    Args:
        works: the jobs, of one backbone.
        server: what to ask those teachers with that it can serve, all adapters of a kind in one
            engine; transformers has the others.

    Raises:
        PedroError: a teacher cannot be loaded, or fails.
    """
    waiting = [work for work in works if not work.file.is_whole or not _scored(work)]
    for work in waiting:
        _say_size(work)
    served: list[Work] = []
    for work in waiting if server is not None else ():
        assert server is not None
        if (reason := server.why_not(work.teacher)) is None:
            served.append(work)
        else:
            say(f"{work.job.teacher}: transformers answers, as vLLM cannot: {reason}")
    # Not LoRA and PEDRO in one engine: where all of its slots are taken, vLLM's LoRA kernels for
    # the CPU give other rows the weights of the last one.
    groups = [[w for w in served if w.teacher.kind == kind] for kind in ("peft", "pedro")]
    for group in (*groups, *([work] for work in served if work.teacher.kind == "model")):
        if server is not None and group:
            _ask_served(group, server)
    for work in waiting:
        if work in served:
            continue
        training = work.job.training
        dtype = choose_dtype(training.dtype)
        with loaded_teacher(work.teacher, training.model, dtype, training.bits) as model:
            ends = _ends(training.model, work.tokenizer)
            engine = TransformersTeacher(model, pad_token_id(work.tokenizer), ends)
            _ask([work], engine.answer)
            _score(work, engine)


def _ask_served(works: Sequence[Work], server: Server) -> None:
    training = works[0].job.training
    needs = [
        max(len(question.prompt) for question in work.questions) + work.job.max_new_tokens + 1
        for work in works
    ]
    longest = min([max(needs), *filter(None, map(_positions, works))])
    folders = [work.teacher for work in works]
    kind = str(choose_dtype(training.dtype)).removeprefix("torch.")
    top_k = max(work.job.top_k for work in works)
    threads = torch.get_num_threads()
    try:
        with server.start_teachers(training.model, folders, longest, kind, top_k) as teachers:
            _ask(works, teachers.answer)
            for work in works:
                _score(work, teachers.engine_of(work.teacher))
    finally:
        torch.set_num_threads(threads)


def _positions(work: Work) -> int | None:
    config = AutoConfig.from_pretrained(work.job.training.model, local_files_only=True)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _ends(model: str, tokenizer: Any) -> list[int]:
    """What ends an answer, as in training: of the generation config and the tokenizer."""
    found = end_tokens(model)
    eos = tokenizer.eos_token_id
    return sorted({*found, *([] if eos is None else [eos])})


def _say_size(work: Work) -> None:
    left = work.questions[len(work.file.answers) :]
    if not left:
        return
    number = sum(question.number for question in left)
    most = number * work.job.max_new_tokens * bytes_per_token(work.job.top_k)
    say(
        f"{work.job.teacher}: {len(left):,} prompts to answer, {number:,} answers of up to "
        f"{work.job.max_new_tokens} tokens: {most / 1e6:,.1f} MB at most in {work.folder}"
    )


def _ask(
    works: Sequence[Work], answer: Callable[[Sequence[Question], Sampling], list[list[Answer]]]
) -> None:
    total = sum(len(work.questions) - len(work.file.answers) for work in works)
    began, done, spoken = time.monotonic(), 0, 0.0
    took = dict.fromkeys((str(work.folder) for work in works), 0.0)
    while waiting := [work for work in works if not work.file.is_whole]:
        how = waiting[0].how
        chosen = [work for work in waiting if work.how == how][:TOGETHER]
        places = [work.file.next_chunk for work in chosen]
        questions = [w.questions[i] for w, chunk in zip(chosen, places, strict=True) for i in chunk]
        started = time.monotonic()
        found = iter(answer(questions, how))
        for work, chunk in zip(chosen, places, strict=True):
            work.file.append([next(found) for _ in chunk])
            took[str(work.folder)] += (time.monotonic() - started) / len(chosen)
        done += len(questions)
        seconds = time.monotonic() - began
        if seconds - spoken > 5 or done == total:
            spoken = seconds
            left = clock(seconds / done * (total - done))
            say(f"teacher: {done:,}/{total:,} prompts, {done / seconds:.1f} a second, {left} left")
    for work in works:
        earlier = _scores(work).get("seconds", 0.0)
        _keep(work, seconds=earlier + took[str(work.folder)])


def _scores(work: Work) -> dict[str, Any]:
    try:
        return dict(json.loads((work.folder / SCORES_NAME).read_bytes()))
    except (OSError, ValueError):
        return {}


def _scored(work: Work) -> bool:
    return not _labelled(work) or work.job.training.test_metric in _scores(work)


def _score(work: Work, engine: Engine) -> None:
    """Score the teacher on the rows of the report that have completions, and keep it."""
    if _scored(work):
        return
    _keep(work, **{work.job.training.test_metric: _metric(work, engine)})


def _keep(work: Work, **values: Any) -> None:
    text = json.dumps(_scores(work) | values, indent=1) + "\n"
    replace_file(work.folder / SCORES_NAME, text.encode())


def _labelled(work: Work) -> list[Any]:
    return [prompt.row for prompt in work.parts.test if prompt.row.is_labelled]


def _metric(work: Work, engine: Engine) -> dict[str, Any]:
    training = work.job.training
    found: dict[str, Any] = evaluate(
        engine, work.tokenizer, _labelled(work), training.test_metric, work.job.max_new_tokens
    )
    del found["rows"]
    if training.test_metric == "loss":
        del found["tokens"]
        return {"label_perplexity": math.exp(min(found["loss"], 700.0))}
    return found


# The student -------------------------------------------------------------------------------------


def lessons_of(work: Work) -> tuple[list[Lesson], list[Lesson], list[Lesson]]:
    """What to train on, to choose the checkpoint by, and to compare on."""
    job = work.job
    found: list[list[Lesson]] = []
    answers = iter(work.file.answers)
    for prompts in (work.parts.train, work.parts.dev, work.parts.test):
        mine: list[Lesson] = []
        learns = not found
        for prompt in prompts:
            has_label = learns and prompt.row.is_labelled and job.label_share > 0
            weight = 1.0 - job.label_share if has_label else 1.0
            mine += [
                lesson_of(prompt.example, answer, weight, job.temperature)
                for answer in next(answers)
                if weight > 0
            ]
            if has_label:
                example = encode(work.tokenizer, prompt.row)
                mine.append(lesson_of_label(example, job.top_k, work.vocabulary, job.label_share))
        found.append(mine)
    return found[0], found[1], found[2]


def learn(work: Work, args: PedroTrainingArguments, model: Any) -> dict[str, Any]:
    """Train the student and write the report.

    Args:
        work: the job; its teacher has answered.
        args: see `training.run.train`.
        model: the backbone; it is given back bare.

    Returns:
        See `distill`.
    """
    job, training = work.job, work.job.training
    train, dev, test = lessons_of(work)
    pad = pad_token_id(work.tokenizer)
    repository = take_repository(training, args)
    record = None if work.checkpoint is None else finished(training, args, work.checkpoint)
    if record is not None:
        pedro = PedroModel.from_pretrained(model, training.output)
    else:
        pedro, record = train_adapter(
            training,
            args,
            model,
            pad,
            TrainingData(Dataset(list(train)), Dataset(list(dev))),
            work.checkpoint,
            DistillTrainer,
            LessonCollator,
        )
        # What is compared is what was saved, in its own dtype.
        saved = load_adapter(training.output)
        pedro.fill_adapter(str(pedro.active_adapter), saved.tensors)
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        replace_file(Path(training.output) / RECORD_NAME, text.encode())
    began = time.monotonic()
    ends = _ends(training.model, work.tokenizer)
    engine = TransformersTeacher(pedro, pad, ends)
    with pedro.disable_adapter():
        base = compare(engine, test)
        base_scores = _metric(work, engine) if _labelled(work) else {}
    student = compare(engine, test)
    scores = _metric(work, engine) if _labelled(work) else {}
    other = [i for i, same in enumerate(student.same) if not same]
    own = TransformersEngine(pedro, pad).generate(
        [test[i].prompt for i in other],
        [test[i].prompt_length for i in other],
        job.max_new_tokens,
    )
    report_seconds = time.monotonic() - began
    pedro.unload()
    answers = [[t for t in lesson.completion if t not in ends] for lesson in test]
    said = dict(enumerate(answers)) | dict(zip(other, own, strict=True))
    rows = [
        {
            "row": lesson.source,
            "kl": student.kls[i],
            "teacher": work.tokenizer.decode(answers[i]),
            "student": work.tokenizer.decode(said[i]),
            "teacher_tokens": answers[i],
            "student_tokens": said[i],
        }
        for i, lesson in enumerate(test)
    ]
    use = record["prompt_use"]
    report: dict[str, Any] = {
        "command": shlex.join(training.command) if training.command else None,
        "way": way_of(base.likeness, student.likeness),
        "backbone": dataclasses.asdict(base.likeness) | base_scores,
        "teacher": {
            "kl": 0.0,
            "top_token": 1.0,
            "whole_answer": 1.0,
            "perplexity": teacher_perplexity(test),
            **(_scores(work).get(training.test_metric, {}) if _labelled(work) else {}),
        },
        "student": dataclasses.asdict(student.likeness) | scores,
        "prompts": {
            "train": len(work.parts.train),
            "dev": len(work.parts.dev),
            "test": len(work.parts.test),
        },
        "answers": {
            "number": sum(map(len, work.file.answers)),
            "tokens": sum(len(a.tokens) for row in work.file.answers for a in row),
            "cut_off": sum(a.tokens[-1] not in ends for row in work.file.answers for a in row),
        },
        "prompt_share": None if use is None else use["share"],
        "prompt_use": use,
        "seconds": {
            "teacher": round(_scores(work).get("seconds", 0.0), 1),
            "student": record["seconds"],
            "report": round(report_seconds, 1),
        },
        "bytes": {
            "answers": (work.folder / ANSWERS_NAME).stat().st_size,
            "teacher": work.teacher.nbytes,
            "student": os.path.getsize(Path(training.output) / "adapter_model.safetensors"),
        },
        "teacher_folder": job.teacher,
        "teacher_digest": work.teacher.digest,
        "kind": work.teacher.kind,
        "digest": record["digest"],
        "training": {key: record[key] for key in ("steps", "best_step", "dev_losses", "seed")},
        "trainable_parameters": record["trainable_parameters"],
    }
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(Path(training.output) / ROWS_NAME, lines.encode())
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    replace_file(Path(training.output) / REPORT_NAME, text.encode())
    say(describe(report))
    if repository is not None:
        report["pushed"] = push(
            training.output, repository, private=args.hub_private_repo, token=args.hub_token
        )
    return report
