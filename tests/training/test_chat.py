"""What vLLM hands to a chat template; token for token it is compared in `test_server.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_task import make_tokenizer

from vllm_pedro.training.chat import DataError, _reads_parts, check_messages, render_chat


def test_templates_get_parts_where_vllm_gives_them_parts() -> None:
    """vLLM looks into the template's syntax, here it is tried: the same, of real templates."""
    trl = pytest.importorskip("trl", reason="TRL has the templates")
    from vllm.renderers.hf import _detect_content_format

    tokenizer = make_tokenizer()
    found = {}
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        template = path.read_text()
        found[path.stem] = _reads_parts(tokenizer, template)
        reads = _detect_content_format(template, default="string") == "openai"
        assert found[path.stem] == reads, path.stem
    assert set(found.values()) == {False, True}


def test_a_role_that_the_template_does_not_know_is_refused() -> None:
    chat = check_messages("here", [{"role": "developer", "content": "be brief"}])
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match=r"here: role 'developer'.*use 'system'"):
        render_chat(tokenizer, "here", chat)
    tokenizer.chat_template = "{% if messages[0].role == 'developer' %}known{% endif %}"
    assert render_chat(tokenizer, "here", chat) == "known"
