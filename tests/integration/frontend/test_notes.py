"""What is told of a folder beside its weights."""

from __future__ import annotations

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
from tiny_task import make_tokenizer

from vllm_pedro.integration.frontend.notes import MOST_TOLD, FolderNotes


@pytest.fixture
def said():
    """What was logged, wherever vLLM's log goes."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    log = logging.getLogger("vllm.vllm_pedro")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lambda: [(record.levelname, record.getMessage()) for record in records]
    log.removeHandler(handler)
    log.setLevel(level)


SERVED = ["/models/SmolLM2-135M-Instruct", "base"]


def notes(names=SERVED, tokenizer=None):
    return FolderNotes(names, lambda: tokenizer)


@pytest.mark.parametrize(
    "named",
    [
        None,
        "",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "/elsewhere/smollm2-135m-instruct/",
        "/cache/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/0123abc",
        "base",
    ],
)
def test_the_model_under_another_roof_is_the_same(named, said):
    notes().base_model(named, "/a")
    assert said() == []


def test_a_model_in_the_hubs_cache_is_known_by_its_name(said):
    cached = "/cache/models--org--Other/snapshots/0123abc"
    notes([cached]).base_model("org/other", "/a")
    notes([cached]).base_model("org/another", "/a")
    assert len(said()) == 1


def test_another_base_model_is_warned_of_once(said):
    telling = notes()
    for folder in ("/a", "/b", "/a"):
        telling.base_model("org/Other-7B", folder)
    ((level, text),) = said()
    assert level == "WARNING"
    assert text.startswith("PEDRO: /a names 'org/Other-7B' as its base model, and this engine's is")
    assert SERVED[0] in text


def test_many_tenants_do_not_fill_the_log(said):
    telling = notes()
    for number in range(100):
        telling.base_model(f"org/{number}", "/a")
    assert len(said()) == MOST_TOLD


def told(said, folder, tokenizer):
    """Of which kinds a folder is told, and no more when it is read again."""
    telling, before = notes(tokenizer=tokenizer), len(said())
    for _ in range(2):
        telling.files(str(folder))
    new = said()[before:]
    assert all(level == "INFO" and f"PEDRO: {folder} has a" in text for level, text in new)
    return [text.partition(" has a ")[2].partition(" that differs")[0] for _, text in new]


def test_a_folder_with_the_models_own_files_is_as_one_without(said, tmp_path):
    """As trainers save them."""
    tokenizer = make_tokenizer()
    assert told(said, tmp_path, tokenizer) == []
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    assert told(said, tmp_path, tokenizer) == []


def test_a_chat_template_of_its_own_is_told_of_once(said, tmp_path):
    tokenizer = make_tokenizer()
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert told(said, tmp_path, tokenizer) == ["chat template"]
    (tmp_path / "chat_template.jinja").write_text(tokenizer.chat_template + "\n")
    assert told(said, tmp_path, tokenizer) == []
    (tmp_path / "chat_template.jinja").unlink()
    config = {"chat_template": "{{ messages }}"}  # where it was before transformers 4.43
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert told(said, tmp_path, tokenizer) == ["chat template"]


def test_a_tokenizer_of_its_own_is_told_of_once(said, tmp_path):
    tokenizer = make_tokenizer()
    other = make_tokenizer()
    other.add_tokens(["<tool>"])
    other.save_pretrained(tmp_path)
    assert told(said, tmp_path, tokenizer) == ["tokenizer"]


def test_what_cannot_be_read_is_passed_over(said, tmp_path):
    tokenizer = make_tokenizer()
    for data in (b"[]", b"\xff", b"{", b"[" * 100_000, b'{"model": 1, "added_tokens": 2}'):
        (tmp_path / "tokenizer.json").write_bytes(data)
        (tmp_path / "tokenizer_config.json").write_bytes(data)
        assert told(said, tmp_path, tokenizer) == []
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    assert told(said, tmp_path, tokenizer) == []
    shutil.rmtree(tmp_path / "tokenizer.json")
    make_tokenizer().save_pretrained(tmp_path)
    assert told(said, tmp_path, None) == []  # skip_tokenizer_init
    assert told(said, tmp_path, SimpleNamespace(chat_template=None)) == []  # of another kind


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_disk_that_fails_is_passed_over(said, tmp_path, monkeypatch, name):
    """A link to where this process may not look, say."""
    original = type(tmp_path).exists

    def exists(path):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(type(tmp_path), "exists", exists)
    assert told(said, tmp_path, make_tokenizer()) == []


def test_tenants_files_are_parsed_once(said, tmp_path):
    """They are mostly the same, and Python does nothing else meanwhile."""
    asked, tokenizer = [], make_tokenizer()
    telling = FolderNotes(SERVED, lambda: asked.append(1) or tokenizer)
    other = make_tokenizer()
    other.add_tokens(["<tool>"])
    for number in range(30):
        (tokenizer if number % 2 else other).save_pretrained(tmp_path / str(number))
        telling.files(str(tmp_path / str(number)))
    assert len(asked) == 3  # a chat template, two tokenizers
    assert len(said()) == 15


def test_a_folder_is_read_with_its_notes(said, tmp_path):
    from banks import LIMITS, write

    from vllm_pedro.integration.frontend.registry import AdapterRegistry

    spec = write(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/Other-7B"
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    registry = AdapterRegistry(LIMITS, notes=notes(tokenizer=make_tokenizer()))
    registry.inspect(spec.path)
    assert [level for level, _ in said()] == ["WARNING"]
    registry.read(spec.path)
    assert [level for level, _ in said()] == ["WARNING", "INFO"]
