"""What README and docs name is there: commands, flags, files, imports; their code blocks run."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_pedro.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text() for page in PAGES}

# Where a path that a page names may begin.
PLACES = (".", "vllm_pedro", "docs", "tests/integration", "tests")


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Lines of code and code in sentences that begin with a command of ours."""
    text = re.sub(r" *\\\n\s*", " ", text)  # lines that go on
    found = re.findall(r"^\s*(?:[A-Z_]+=\S+ )*((?:vllm-pedro|python3? \S+\.py)[^\n`]*)", text, re.M)
    found += re.findall(r"`(?:[A-Z_]+=\S+\s)*((?:vllm-pedro|python3?\s\S+\.py)[^`]*)`", text)
    return [shlex.split(line.replace("\n", " "), comments=True) for line in found]


def help_of(*command: str) -> str:
    """What a command of `vllm-pedro` says with `--help`."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert not ended.value.code, command
    return output.getvalue()


def flags_of(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if re.fullmatch(r"--[a-z][\w-]*(=.*)?", word)}


ALL = [(page, line) for page, text in TEXTS.items() for line in commands(text)]
OURS = [(p, line) for p, line in ALL if line[0] == "vllm-pedro" and line[1:]]
SCRIPTS = [(p, line) for p, line in ALL if line[0].startswith("python")]


def test_the_pages_are_read():
    assert len(OURS) > 15
    assert len(SCRIPTS) > 20


@pytest.mark.parametrize(("page", "line"), OURS, ids=lambda value: str(value)[:60])
def test_commands_take_the_flags_that_pages_give_them(page, line):
    command = [word for word in line[1:3] if re.fullmatch(r"[a-z][a-z-]*", word)]
    if command[0] == "serve":
        return  # below
    if command[0] != "bench" or command[1:2] not in (["offline"], ["serving"], ["report"]):
        command = command[:1]
    shown = help_of(*command)
    taken = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", shown))
    missing = flags_of(line) - taken
    if command[0] == "train":  # takes all of transformers' arguments, and lists the common ones
        from vllm_pedro.training import PedroTrainingArguments

        names = PedroTrainingArguments.__dataclass_fields__
        missing -= {f"--{name.replace('_', '-')}" for name in names}
    assert not missing, f"{page}: {' '.join(line)}"


def test_the_servers_flags_are_those_of_the_pages():
    flags = pytest.importorskip("vllm_pedro.integration.frontend.flags")
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    ours = {
        o for a in parser._actions for o in a.option_strings if "pedro" in o and "--no-" not in o
    }
    named = set()
    for text in TEXTS.values():
        named |= set(re.findall(r"(?<![\w-])--(?:enable-|max-|max-cpu-)?pedros?[\w-]*", text))
    assert named == ours


@pytest.mark.parametrize(("page", "line"), SCRIPTS, ids=lambda value: str(value)[:60])
def test_scripts_are_there(page, line):
    script = ROOT / line[1]
    assert script.is_file(), page
    if script.name != "run.py":
        source = script.read_text() + "".join(p.read_text() for p in script.parent.glob("*.py"))
        for flag in flags_of(line[2:]):
            assert f'"{flag}"' in source, f"{page}: {script.name} has no {flag}"


@pytest.mark.parametrize("page", TEXTS)
def test_files_are_there(page):
    named = set(
        re.findall(r"`([\w./-]+/[\w.-]*\.(?:py|md|sh|h|cpp|cu|jsonl?|safetensors))`", TEXTS[page])
    )
    named |= set(re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", TEXTS[page]))
    own = (ROOT / "docs") if page != "README.md" else ROOT
    for path in named - {"results/results.jsonl"}:
        places = [own, *(ROOT / place for place in PLACES)]
        assert any((place / path).exists() for place in places), path


@pytest.mark.parametrize("page", TEXTS)
def test_links_into_pages_meet_a_heading(page):
    for path, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", TEXTS[page]):
        text = TEXTS[Path(path).name] if path else TEXTS[page]
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
        assert anchor in slugs, f"{path}#{anchor}"


BLOCKS = [(page, block) for page, text in TEXTS.items() for block in code_blocks(text, "python")]


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=lambda value: str(value)[:40])
def test_imports_in_code_blocks_work(page, block):
    if "vllm" in block and "from vllm import" in block:
        pytest.importorskip("vllm")
    imports = [n for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Import | ast.ImportFrom)]
    ours = [n for n in imports if not (isinstance(n, ast.ImportFrom) and n.module == "openai")]
    exec(compile(ast.Module(ours, []), page, "exec"), {})


def test_the_training_page_trains(tmp_path, monkeypatch):
    """Its code, with a tiny model, two steps and two rows."""
    from tiny_task import make_folder, make_rows, write_rows

    block = next(b for b in code_blocks(TEXTS["training.md"], "python") if "PedroTrainer(" in b)
    model = make_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    write_rows(Path("train.jsonl"), make_rows(8))
    exec(block.replace("max_steps=300", "max_steps=2"), {"MODEL": str(model)})
    assert Path("my-adapter/adapter_model.safetensors").is_file()


@pytest.mark.engine
def test_the_readmes_batch_is_served(tmp_path):
    block = next(b for b in code_blocks(TEXTS["README.md"], "python") if "LLM(" in b)
    script = tmp_path / "batch.py"
    script.write_text(block)
    run = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    answers = run.stdout.strip().splitlines()
    assert '{"answer": "The capital of France is Paris."}' in answers
    assert "Paris." in answers


def test_the_tests_that_pages_name_are_there():
    """In the form `test_file.py::test_name`."""
    found = [m for text in TEXTS.values() for m in re.findall(r"`(test_\w+\.py)::(\w+)`", text)]
    assert len(found) > 5
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert not [(file, name) for file, name in found if f"def {name}(" not in sources[file]]
