"""The package as it is imported: without vLLM, before it, after it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import vllm_pedro
from vllm_pedro.integration.import_hook import when_imported


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_it_works_where_vllm_is_not_installed():
    out = run(
        """
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "vllm":
                    raise ModuleNotFoundError(f"No module named {name!r}", name="vllm")

        sys.meta_path.insert(0, Absent())
        import vllm_pedro
        from vllm_pedro import PedroConfig, PedroModel, VectorGenerator, load_adapter
        import vllm_pedro.serving.runtime, vllm_pedro.ops, vllm_pedro.model.reference
        try:
            vllm_pedro.PedroRequest
        except ImportError as error:
            print(error)
        """
    )
    assert out == (
        "vllm_pedro.PedroRequest needs vLLM: pip install 'vllm-pedro[cuda]' on NVIDIA, "
        "'vllm-pedro[cpu]' elsewhere"
    )


def test_importing_it_loads_nothing_heavy():
    out = run("import sys, vllm_pedro; print({'torch', 'vllm', 'transformers'} & {*sys.modules})")
    assert out == "set()"


def test_every_public_name_is_there():
    for name in vllm_pedro.__all__:
        assert getattr(vllm_pedro, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vllm_pedro.nothing  # noqa: B018


def test_vllm_finds_the_plugin():
    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "vllm_pedro"]
    assert found.value == "vllm_pedro.integration.plugin:register"


def test_keywords_are_known_in_whichever_order_the_packages_are_imported(tmp_path):
    # A folder that is there: with HF_HUB_OFFLINE set, vLLM looks any other name up in the cache.
    model = str(tmp_path)
    check = f"EngineArgs(model={model!r}, enable_pedro=True, max_pedros=3).additional_config"
    first = f"import vllm_pedro; from vllm.engine.arg_utils import EngineArgs; print({check})"
    second = f"from vllm.engine.arg_utils import EngineArgs; import vllm_pedro; print({check})"
    assert "'max_pedros': 3" in run(first).splitlines()[-1]
    assert "'max_pedros': 3" in run(second).splitlines()[-1]


@pytest.mark.parametrize(
    "imports",
    [
        "from vllm import LLM; from vllm.engine.arg_utils import EngineArgs",
        "from vllm.engine.arg_utils import EngineArgs; from vllm import LLM",
    ],
)
def test_keywords_are_known_to_who_never_imports_the_package(imports, tmp_path):
    """Evaluation harnesses hand keywords on to vLLM's `LLM`."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    info = tmp_path / "found" / "entry_points_of_this_revision-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: entry_points\nVersion: 0\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))
    check = f"EngineArgs(model={str(tmp_path)!r}, enable_pedro=True).additional_config"
    path = os.pathsep.join([str(info.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    out = run(f"{imports}; print({check})", PYTHONPATH=path)
    assert "'max_pedro_rank': 32" in out.splitlines()[-1]


def test_hook_runs_once_after_the_module_and_leaves_no_trace(tmp_path, monkeypatch):
    (tmp_path / "some_module_for_the_hook.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[int] = []
    finders = list(sys.meta_path)

    def action() -> None:
        seen.append(sys.modules["some_module_for_the_hook"].value)

    when_imported("some_module_for_the_hook", action)
    # Looking for it, as transformers does for PEFT, is not importing it.
    assert importlib.util.find_spec("some_module_for_the_hook") is not None
    assert seen == []
    module = importlib.import_module("some_module_for_the_hook")
    assert seen == [1]
    assert sys.meta_path == finders
    assert module.__spec__.loader is module.__loader__
    assert type(module.__loader__).__module__ != "vllm_pedro.integration.import_hook"
    when_imported("some_module_for_the_hook", action)
    assert seen == [1, 1]


def test_hook_waits_for_a_module_that_is_being_executed(tmp_path, monkeypatch):
    first, second = "module_that_imports_another", "module_that_hooks_the_first"
    (tmp_path / f"{first}.py").write_text(f"import {second}\nvalue = 1\n")
    (tmp_path / f"{second}.py").write_text(
        "from vllm_pedro.integration.import_hook import when_imported\n"
        f"import sys\nseen = []\nm = sys.modules[{first!r}]\n"
        f"when_imported({first!r}, lambda: seen.append(m.value))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module(first)
    assert sys.modules[second].seen == [1]
    assert type(module.__spec__) is ModuleSpec
    assert not module.__spec__._initializing


def test_there_is_one_dialect() -> None:
    """Docstrings are Markdown with single backticks, without roles; imports are relative."""
    package = Path(vllm_pedro.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert "``" not in text, path
        assert not re.search(r":(class|func|meth|data|attr|mod):`", text), path
        assert not re.search(r"^\s*(from|import) vllm_pedro", text, re.MULTILINE), path
