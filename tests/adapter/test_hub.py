"""Adapters from a hub: a real HTTP server, and huggingface_hub's own cache."""

from __future__ import annotations

import json
import os

import pytest
from banks import LIMITS, SHAPE, write
from hub import TOKEN, fake_hub, use_hub

from vllm_pedro.adapter import fetch_adapter, load_adapter, repository_of
from vllm_pedro.errors import AdapterError

FILES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fake_hub() as it:
        use_hub(monkeypatch, it.url, tmp_path / "cache")
        yield it


def fetch(path):
    return fetch_adapter(repository_of(path), SHAPE, LIMITS.check_config)


def test_what_names_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert repository_of("org/name") == ("org/name", "main")
    assert repository_of("org/na.me-2@refs/pr/1") == ("org/na.me-2", "refs/pr/1")
    for path in (
        "/org/name",
        "~/name",
        "./name",
        "../name",
        "name",
        "a/b/c",
        "org/n@",
        "org/n@../x",
    ):
        assert repository_of(path) is None, path
    os.makedirs("org/name")
    assert repository_of("org/name") is None


def test_only_the_two_files_are_downloaded_and_once(hub, tmp_path):
    spec = write(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("x")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"a pickle")
    commit = hub.commit("org/a", tmp_path / "a")
    folder = fetch("org/a")
    assert folder.name == commit
    assert sorted(os.listdir(folder)) == FILES
    assert load_adapter(folder, SHAPE).digest == spec.digest
    assert fetch("org/a") == folder
    assert sorted(hub.downloads()) == FILES


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, tmp_path):
    old, new = write(tmp_path / "a", seed=0), write(tmp_path / "b", seed=1)
    commit = hub.commit("org/a", tmp_path / "a", "main", "v1")
    assert load_adapter(fetch("org/a"), SHAPE).digest == old.digest
    hub.commit("org/a", tmp_path / "b", "main")
    assert load_adapter(fetch("org/a"), SHAPE).digest == new.digest
    for revision in ("v1", commit):
        assert load_adapter(fetch(f"org/a@{revision}"), SHAPE).digest == old.digest


def test_what_is_in_the_cache_serves_without_the_hub(hub, tmp_path, monkeypatch):
    spec = write(tmp_path / "a")
    hub.commit("org/a", tmp_path / "a")
    folder = fetch("org/a")
    hub.asked.clear()
    hub.is_down = True
    assert fetch("org/a") == folder
    use_hub(monkeypatch, hub.url, tmp_path / "cache", offline=True)
    hub.asked.clear()
    assert load_adapter(fetch("org/a"), SHAPE).digest == spec.digest
    with pytest.raises(AdapterError, match=r"org/b: no such folder; of a repository .*OFFLINE"):
        fetch("org/b")
    assert not hub.asked


def test_a_private_repository_needs_the_token(hub, tmp_path, monkeypatch):
    spec = write(tmp_path / "a")
    hub.commit("org/a", tmp_path / "a")
    hub.private.add("org/a")
    with pytest.raises(AdapterError, match="neither a folder here nor a repository of http://127"):
        fetch("org/a")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load_adapter(fetch("org/a"), SHAPE).digest == spec.digest


def test_what_is_wrong_is_said(hub, tmp_path, monkeypatch):
    write(tmp_path / "a")
    hub.commit("org/a", tmp_path / "a")
    with pytest.raises(AdapterError, match=r"^org/a@v9: the repository has no such revision$"):
        fetch("org/a@v9")
    (tmp_path / "a" / FILES[1]).rename(tmp_path / "a" / "adapter_model.bin")
    hub.commit("org/a", tmp_path / "a", "pickled")
    with pytest.raises(AdapterError, match=r"org/a@\w{40}: the repository has no adapter_model\.s"):
        fetch("org/a@pickled")
    hub.gated.add("org/a")
    with pytest.raises(AdapterError, match="access to the repository is restricted"):
        fetch("org/a")
    with pytest.raises(AdapterError, match="'a--b/c'"):
        fetch("a--b/c")


def test_sizes_are_bounded_before_anything_is_downloaded(hub, tmp_path):
    write(tmp_path / "a")
    hub.commit("org/a", tmp_path / "a")
    hub.sizes[FILES[0]] = 2 << 20
    with pytest.raises(
        AdapterError, match=r"org/a: adapter_config\.json: expected at most 1048576 "
    ):
        fetch("org/a")
    assert not hub.downloads()
    del hub.sizes[FILES[0]]
    hub.sizes[FILES[1]] = 64 << 20
    with pytest.raises(AdapterError, match=r"safetensors: expected at most \d+ bytes .* 67108864$"):
        fetch("org/a")
    assert hub.downloads() == FILES[:1]


def test_weights_of_an_unwanted_config_are_not_downloaded(hub, tmp_path):
    write(tmp_path / "a")
    config = json.loads((tmp_path / "a" / FILES[0]).read_text())
    (tmp_path / "a" / FILES[0]).write_text(json.dumps(config | {"r": 99}))
    hub.commit("org/a", tmp_path / "a")
    with pytest.raises(AdapterError, match="org/a: r is 99, but this engine takes at most 4"):
        fetch("org/a")
    assert hub.downloads() == FILES[:1]
