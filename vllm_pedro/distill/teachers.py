"""Which kind of teacher a folder holds, whether it fits the backbone, and loading it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..adapter import verify_adapter
from ..backbone import BackboneShape
from ..config import CONFIG_NAME, PEFT_TYPE
from ..errors import PedroError, first_line
from ..files import open_regular, parse_json_object, shorten
from ..model import PedroModel
from ..training.run import load_model, quiet, say

_ENDS: Final = 1 << 16  # of each file so many first and last bytes are looked at


@dataclass(frozen=True)
class TeacherFolder:
    """A teacher on disk.

    Attributes:
        folder: where it is.
        kind: an adapter of PEFT's, one of ours, or a whole model.
        digest: changes with its content.
        nbytes: what it takes on disk.
    """

    folder: str
    kind: Literal["peft", "pedro", "model"]
    digest: str
    nbytes: int


def find_teacher(folder: str, model: str, tokenizer: Any) -> TeacherFolder:
    """Say what a folder holds, once it is known to fit the backbone.

    Nothing heavy is read of a teacher of PEFT's or a whole model: names and shapes are compared.

    Args:
        folder: the teacher's.
        model: the backbone's.
        tokenizer: the backbone's.

    Raises:
        PedroError: there is no teacher, it is broken, or of another backbone or tokenizer.
    """
    path = Path(folder)
    kind: Literal["peft", "pedro", "model"]
    if (path / CONFIG_NAME).is_file():
        with open_regular(path / CONFIG_NAME, "an adapter's config") as file:
            values = parse_json_object(file.read(), str(path / CONFIG_NAME))
        kind = "pedro" if values.get("peft_type") == PEFT_TYPE else "peft"
    elif (path / "config.json").is_file():
        kind = "model"
    else:
        raise PedroError(
            f"{folder}: expected a teacher, a folder with {CONFIG_NAME} (an adapter) or "
            "config.json (a fine-tuned model), found neither"
        )
    backbone = AutoConfig.from_pretrained(model, local_files_only=True)
    if kind == "pedro":
        _, digest, _ = verify_adapter(path, BackboneShape.from_hf_config(backbone))
    else:
        digest = _digest(path)
        if kind == "peft":
            _check_peft(folder, backbone)
        else:
            _check_model(folder, backbone)
    _check_tokenizer(path, tokenizer)
    nbytes = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return TeacherFolder(os.path.abspath(folder), kind, digest, nbytes)


def _digest(folder: Path) -> str:
    """Of names, sizes and both ends of the files: whole models are large."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".bin") or not path.is_file():
            continue
        size = path.stat().st_size
        with open(path, "rb") as file:
            found.update(f"{path.name}:{size}:".encode() + file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            found.update(file.read(_ENDS))
    return found.hexdigest()


def _check_peft(folder: str, backbone: Any) -> None:
    """Load the adapter onto a backbone without values."""
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(backbone)
    load_peft(model, folder, low_cpu_mem_usage=True)


def load_peft(model: Any, folder: str, **how: Any) -> Any:
    """A PEFT model from a backbone and an adapter's folder.

    Raises:
        PedroError: PEFT is not installed, or does not find in the folder all that it looks for.
    """
    if importlib.util.find_spec("peft") is None:
        raise PedroError("a teacher of PEFT's needs peft: pip install 'vllm-pedro[compare]'")
    import peft

    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        try:
            loaded = peft.PeftModel.from_pretrained(model, folder, local_files_only=True, **how)
        except Exception as error:  # of many kinds: files, shapes, names, settings
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            mismatch = next((line for line in lines if "mismatch for" in line), None)
            text = mismatch or first_line(error)
            raise PedroError(
                f"{folder}: PEFT cannot load this teacher onto the backbone; is it another "
                f"backbone's? {text[:300]}"
            ) from error
    for complaint in complaints:
        if "missing adapter keys" in str(complaint.message):
            raise PedroError(f"{folder}: broken teacher: {str(complaint.message)[:300]}")
    return loaded


def _check_model(folder: str, backbone: Any) -> None:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        ours, theirs = (BackboneShape.from_hf_config(c) for c in (backbone, config))
    except (OSError, ValueError, KeyError) as error:
        raise PedroError(f"{folder}: cannot read this teacher: {first_line(error)}") from error
    sizes = [c.get_text_config().vocab_size for c in (backbone, config)]
    if config.model_type != backbone.model_type or ours != theirs or sizes[0] != sizes[1]:
        found = [
            f"{c.model_type}, {s.num_layers} layers of {s.hidden_size}, vocabulary of {size:,}"
            for c, s, size in zip((backbone, config), (ours, theirs), sizes, strict=True)
        ]
        raise PedroError(
            f"{folder}: expected a fine-tuned copy of the backbone ({found[0]}), found another "
            f"model ({found[1]})"
        )
    if not any(Path(folder).glob("*.safetensors")) and not any(Path(folder).glob("*.bin")):
        raise PedroError(f"{folder}: expected a model's weights, found none")


def _check_tokenizer(folder: Path, tokenizer: Any) -> None:
    """A teacher that has a tokenizer has the backbone's."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        # Adapters have configs of tokenizers without a tokenizer, too.
        say(f"warning: {folder}: cannot load its tokenizer to compare it: {first_line(error)}")
        return
    ours, found = tokenizer.get_vocab(), theirs.get_vocab()
    if ours != found:
        other = sorted(t for t in ours.keys() | found.keys() if ours.get(t) != found.get(t))
        raise PedroError(
            f"{folder}: the teacher's tokenizer differs from the backbone's in {len(other):,} "
            f"tokens: {shorten(other, 3)}. A PEDRO adapter is served with the backbone's and "
            "cannot learn new tokens"
        )
    if theirs.chat_template and theirs.chat_template != tokenizer.chat_template:
        say(
            f"warning: {folder} has a chat template of its own, which a server of the backbone "
            "does not use; chats are rendered with the backbone's"
        )


@contextlib.contextmanager
def loaded_teacher(
    teacher: TeacherFolder, model: str, dtype: torch.dtype, bits: int | None
) -> Iterator[Any]:
    """A teacher in transformers, for a block; on the GPU, if there is one.

    A backbone of its own is loaded for it: what PEFT puts in may change the backbone's weights.
    """
    loaded = load_model(teacher.folder if teacher.kind == "model" else model, dtype, bits)
    if torch.cuda.is_available() and bits is None:
        loaded = loaded.to("cuda")
    if teacher.kind == "peft":
        loaded = load_peft(loaded, teacher.folder)
    elif teacher.kind == "pedro":
        loaded = PedroModel.from_pretrained(loaded, teacher.folder)
    yield loaded
    del loaded
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def read_teachers(path: str) -> list[dict[str, Any]]:
    """A fleet: the folders with a teacher in a folder, or the lines of a file.

    Each line is a folder, or an object of JSON with `teacher`, and of `name`, `prompts`, `dev`
    and `test` those that are the teacher's own.

    Raises:
        PedroError: there is none, or two have one name.
    """
    found: list[dict[str, Any]] = []
    place = Path(path)
    if place.is_dir():
        for folder in sorted(place.iterdir()):
            if (folder / CONFIG_NAME).is_file() or (folder / "config.json").is_file():
                found.append({"teacher": str(folder)})
    else:
        try:
            lines = place.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PedroError(f"{path}: expected a folder or file of teachers, {error}") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                found.append(_line(f"{path}, line {number}", line.strip()))
    names = [_name(values) for values in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PedroError(f"{path}: teachers of one name: {shorten(twice)}; give each a 'name'")
    if not found:
        raise PedroError(f"{path}: expected teachers, found none")
    return [values | {"name": name} for values, name in zip(found, names, strict=True)]


def _line(source: str, line: str) -> dict[str, Any]:
    if not line.startswith("{"):
        return {"teacher": line}
    values = parse_json_object(line.encode(), source)
    wrong = [
        key
        for key, value in values.items()
        if key not in ("teacher", "name", "prompts", "dev", "test") or not isinstance(value, str)
    ]
    if wrong or "teacher" not in values:
        raise PedroError(
            f"{source}: expected texts 'teacher', 'name', 'prompts', 'dev', 'test', found "
            f"{json.dumps(values)[:80]}"
        )
    return values


def _name(values: dict[str, Any]) -> str:
    name = values.get("name") or Path(values["teacher"]).resolve().name
    if name in ("", ".", "..") or "/" in name:
        raise PedroError(f"teacher's name {name!r}: expected the name of a folder")
    return str(name)
