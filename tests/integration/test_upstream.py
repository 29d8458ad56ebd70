"""Fails when a function of vLLM that is wrapped or overridden is no longer the one it was.

Then read the new one, adapt the patch or the override if need be, and write the new value into
`vllm_pedro/integration/upstream.py`.
"""

from __future__ import annotations

import pytest
import vllm

from vllm_pedro.integration.plugin import PATCHES
from vllm_pedro.integration.upstream import READ, changed, digest_of, known_digests

KNOWN = known_digests(vllm.__version__) or {}


@pytest.mark.parametrize("target", KNOWN)
def test_function_is_the_known_one(target):
    assert digest_of(target) == KNOWN[target]


def test_what_changed_is_named(monkeypatch):
    assert changed(vllm.__version__) == []
    target = "vllm.v1.engine.core:EngineCore.preprocess_add_request"
    monkeypatch.setitem(READ["0.32"], target, "other")
    monkeypatch.setitem(READ["0.32"], "vllm.v1.engine.core:EngineCore.gone", "one")
    assert changed(vllm.__version__) == [target, "vllm.v1.engine.core:EngineCore.gone"]
    assert known_digests("0.31.0") is None


def test_every_patched_function_is_held():
    """But for the constructors that a dataclass writes itself."""
    for patch in PATCHES:
        assert patch.target in KNOWN or patch.target.endswith("EngineArgs.__init__")


def test_later_versions_have_no_target_of_their_own():
    first, *later = READ.values()
    for digests in later:
        assert digests.keys() <= first.keys()
