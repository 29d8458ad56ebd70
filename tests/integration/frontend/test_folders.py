"""Names and folders from outside."""

from __future__ import annotations

import pytest

from vllm_pedro.adapter import load_adapter
from vllm_pedro.errors import AdapterError, PedroError
from vllm_pedro.integration.frontend.folders import (
    MAX_NAME_LENGTH,
    MAX_REASON_LENGTH,
    check_name,
    public_reason,
    resolve_folder,
)


@pytest.mark.parametrize("name", ["a", "tenant-1", "Größe", "a b", "x" * MAX_NAME_LENGTH, "..."])
def test_names(name):
    check_name(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "1 to 200 characters"),
        ("x" * (MAX_NAME_LENGTH + 1), "found 201"),
        ("/b", "separators"),
        ("a//b", "separators"),
        ("a/../b", "separators"),
        ("a\\b", "separators"),
        ("..", "separators"),
        (".", "separators"),
        ("a\nb", "control characters"),
        ("a\x00b", "control characters"),
        ("a\u202eb", "control characters"),
        ("a\ud800b", "control characters"),
        (" a", "spaces"),
    ],
)
def test_names_that_are_refused(name, message):
    with pytest.raises(PedroError, match=message):
        check_name(name)


def test_a_name_that_has_a_path_may_be_as_those_of_the_hub():
    check_name("org/adapter")
    with pytest.raises(PedroError, match="separators"):
        check_name("org/adapter", is_folder=True)


@pytest.fixture
def root(tmp_path):
    inside = tmp_path / "root"
    (inside / "good").mkdir(parents=True)
    (inside / "good" / "adapter_config.json").write_text("{}")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "adapter_config.json").write_text("{}")
    return inside


def test_folders_inside_the_root(root):
    good = str(root / "good")
    (root / "link").symlink_to("good")
    for path in ("good", good, "link", "./good/../link", f"{root}/missing/../good"):
        assert resolve_folder(path, root) == good
    # What is not there is for the loader to say.
    assert resolve_folder("missing", root) == str(root / "missing")


def test_folders_outside_the_root(root, tmp_path):
    (root / "sly").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to("loop")
    sly = root / "sly-file"
    sly.mkdir()
    (sly / "adapter_config.json").symlink_to(tmp_path / "outside" / "adapter_config.json")
    (tmp_path / "root-too").mkdir()
    paths = ["..", "../outside", str(tmp_path / "outside"), "good/../../outside", "sly", "sly-file"]
    paths += ["/", ".", str(root), str(tmp_path / "root-too"), "/etc", "../nothing-there"]
    for path in paths:
        with pytest.raises(PedroError, match=r"--pedro-root") as caught:
            resolve_folder(path, root)
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("path", ["x" * 5000, "ü" * 3000, "a\0b", "a\ud800b"])
def test_no_paths(root, path):
    for place in (root, None):
        with pytest.raises(PedroError, match="not a valid path"):
            resolve_folder(path, place)


def test_without_a_root_any_folder_goes(root):
    assert resolve_folder(str(root / "good" / ".." / "good"), None) == str(root / "good")


@pytest.mark.parametrize("kind", ["missing", "no weights", "bad JSON", "pickled", "a file"])
def test_reasons_name_no_folder(tmp_path, kind):
    folder = tmp_path / "quite a 'secret' place" / "x"
    if kind == "a file":
        folder.parent.mkdir()
        folder.write_text("x")
    elif kind != "missing":
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(
            "{" if kind == "bad JSON" else '{"peft_type": "PEDRO"}'
        )
        if kind == "pickled":
            (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(AdapterError) as caught:
        load_adapter(str(folder))
    assert "secret" in str(caught.value)
    reason = public_reason(caught.value, str(folder))
    assert "secret" not in reason
    assert str(tmp_path) not in reason
    assert "expected" in reason or "never loaded" in reason


def test_what_cannot_be_made_public_is_left_out(tmp_path):
    assert public_reason(PedroError("it has to do with no folder"), None).startswith("it has")
    error = PedroError(f"{tmp_path}/elsewhere: bad")
    assert "server's log" in public_reason(error, str(tmp_path / "x"))
    long = public_reason(PedroError("y" * 9999), str(tmp_path / "x"))
    assert len(long) < MAX_REASON_LENGTH + 10
