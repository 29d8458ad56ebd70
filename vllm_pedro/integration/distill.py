"""The part of `vllm-pedro distill` that runs vLLM: all teachers in one engine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..config import CONFIG_NAME
from ..distill.answers import LEAST, Answer
from ..errors import PedroError, first_line
from .evaluate import KV_CACHE_BYTES, MAX_ROWS, VllmEngine
from .llm import start_llm

if TYPE_CHECKING:
    from ..distill.engine import Question, Sampling
    from ..distill.teachers import TeacherFolder

# What vLLM's models have LoRA layers for, whatever the architecture.
_MODULES: Final = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)
_MAX_LORAS: Final = 8


def why_not(teacher: TeacherFolder) -> str | None:
    """Why vLLM cannot serve a teacher; None if it can."""
    if teacher.kind != "peft":
        return None
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    values = json.loads((Path(teacher.folder) / CONFIG_NAME).read_bytes())
    if values.get("peft_type") != "LORA":
        return f"it serves no {values.get('peft_type')}"
    weights = Path(teacher.folder) / "adapter_model.safetensors"
    if not weights.is_file():
        return "its weights are no safetensors"
    try:
        helper = PEFTHelper.from_local_dir(teacher.folder, None)
        helper.validate_legal(LoRAConfig(max_lora_rank=512))
    except (ValueError, TypeError, KeyError) as error:
        return first_line(error)
    if values.get("target_parameters") or values.get("trainable_token_indices"):
        return "it has more than LoRA's two matrices a module"
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no dictionary
            module, _, kind = name.removesuffix(".weight").rpartition(".")
            if kind not in ("lora_A", "lora_B") or module.rpartition(".")[2] not in _MODULES:
                return f"it has {name}"
    return None


class VllmTeachers:
    """A vLLM engine with some teachers; see `distill.run.Teachers`."""

    def __init__(self, llm: Any, teachers: Sequence[TeacherFolder]) -> None:
        self._llm = llm
        self._numbers = {teacher.folder: i for i, teacher in enumerate(teachers, 1)}
        self._kinds = {teacher.folder: teacher.kind for teacher in teachers}

    def request(self, folder: str, prompt_length: int) -> Any:
        """What asks a teacher."""
        from vllm.lora.request import LoRARequest

        from .request import PedroRequest

        number = self._numbers[folder]
        if self._kinds[folder] == "model":
            return None
        if self._kinds[folder] == "peft":
            return LoRARequest(f"teacher-{number}", number, folder)
        return PedroRequest(f"teacher-{number}", number, folder, prompt_length=prompt_length)

    def engine_of(self, teacher: TeacherFolder) -> VllmEngine:
        return _OneTeacher(self, teacher.folder, self._llm)

    def answer(self, questions: Sequence[Question], how: Sampling) -> list[list[Answer]]:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        common: dict[str, Any] = {"max_tokens": how.max_new_tokens, "logprobs": how.top_k}
        asked = [(i, False) for i in range(len(questions))]
        asked += [(i, True) for i, question in enumerate(questions) if question.number > 1]
        inputs, params, requests = [], [], []
        for i, is_sampled in asked:
            question = questions[i]
            own = {"temperature": 0.0}
            if is_sampled:
                own = {
                    "temperature": how.temperature,
                    "n": question.number - 1,
                    "seed": question.seed,
                }
            inputs.append({"prompt_token_ids": question.prompt})
            params.append(SamplingParams(**common, **own))
            requests.append(self.request(question.teacher, question.pooled))
        try:
            outputs = self._llm.generate(inputs, params, lora_request=requests, use_tqdm=False)
        except (ValueError, VLLMClientError) as error:
            raise PedroError(f"vLLM: {first_line(error)}") from error
        answers: list[list[Answer]] = [[] for _ in questions]
        for (i, _), output in zip(asked, outputs, strict=True):
            for found in output.outputs:
                if found.finish_reason == "error":
                    raise PedroError(f"vLLM: {questions[i].teacher}: the request failed")
                answers[i].append(_answer(found, how.top_k))
        return answers


class _OneTeacher(VllmEngine):
    """What a metric asks one teacher."""

    def __init__(self, teachers: VllmTeachers, folder: str, llm: Any) -> None:
        super().__init__(llm, folder)
        self._teachers, self._folder = teachers, folder

    def _requests(self, lengths: Sequence[int]) -> Any:
        return [self._teachers.request(self._folder, length) for length in lengths]


def _answer(found: Any, top_k: int) -> Answer:
    """From a `CompletionOutput`, whose log probabilities are those of the model itself."""
    ids = np.empty((len(found.token_ids), top_k), np.int32)
    bins = np.empty((len(found.token_ids), top_k + 1), np.float32)
    for place, entries in enumerate(found.logprobs):
        # The chosen token is there too, whatever its rank.
        best = sorted(entries.items(), key=lambda entry: -entry[1].logprob)[:top_k]
        ids[place] = [token for token, _ in best]
        bins[place, :top_k] = [entry.logprob for _, entry in best]
        rest = 1.0 - float(np.exp(bins[place, :top_k].astype(np.float64)).sum())
        bins[place, top_k] = np.log(rest) if rest > 0 else LEAST
    return Answer(list(found.token_ids), ids, bins)


@contextlib.contextmanager
def start_teachers(
    model: str,
    teachers: Sequence[TeacherFolder],
    max_model_len: int,
    dtype: str = "float32",
    top_k: int = 32,
) -> Iterator[VllmTeachers]:
    """Start vLLM in this process with some teachers; at the end nothing of it is left running.

    Args:
        model: The backbone's folder.
        teachers: Adapters of the backbone, of one kind, or one whole model.
        max_model_len: Most tokens of a prompt and its answer.
        dtype: The backbone's.
        top_k: How many log probabilities are asked for at most.

    Raises:
        PedroError: vLLM does not start.
        ModuleNotFoundError: vLLM is not installed.
    """
    adapters = [teacher.folder for teacher in teachers if teacher.kind == "pedro"]
    loras = [teacher for teacher in teachers if teacher.kind == "peft"]
    settings: dict[str, Any] = {}
    if loras:
        settings = {
            "enable_lora": True,
            "max_loras": min(_MAX_LORAS, len(loras)),
            "max_lora_rank": _rank(loras),
        }
    if any(teacher.kind == "model" for teacher in teachers):
        # It may have no tokenizer of its own.
        settings = {"tokenizer": model}
        (model,) = [teacher.folder for teacher in teachers]
    with start_llm(
        model,
        adapters or None,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=MAX_ROWS,
        max_num_batched_tokens=max(4096, max_model_len),
        max_logprobs=top_k,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        **settings,
    ) as llm:
        yield VllmTeachers(llm, teachers)


def _rank(teachers: Sequence[TeacherFolder]) -> int:
    """The least of the ranks that vLLM has buffers for which holds all."""
    from typing import get_args

    from safetensors import safe_open
    from vllm.config.lora import MaxLoRARanks

    largest = 1
    for teacher in teachers:
        with safe_open(Path(teacher.folder) / "adapter_model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if ".lora_A." in name:
                    largest = max(largest, file.get_slice(name).get_shape()[0])
    return min(rank for rank in get_args(MaxLoRARanks) if rank >= largest)
