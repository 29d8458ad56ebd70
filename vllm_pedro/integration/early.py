"""An entry point that vLLM loads while it is imported, before anybody can pass it a keyword.

`LLM(enable_pedro=True)` is read before general plugins are loaded. A program that imports
`vllm_pedro` has taught vLLM the keyword; for one that does not, such as an evaluation harness, this
entry point does.
"""

from __future__ import annotations


def no_platform() -> None:
    """What a `vllm.platform_plugins` entry point says whose platform is not there.

    It need do no more: to find it, vLLM imported the package, whose `__init__` does the rest.
    """
