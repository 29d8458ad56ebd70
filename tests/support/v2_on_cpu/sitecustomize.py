"""Let vLLM's V2 model runner start on a CPU: with this folder on PYTHONPATH, in every process.

Upstream: the V2 runner's CPU worker asks for a Triton with a "cpu" backend, which only a fork of
Triton has. In its place Triton's interpreter (TRITON_INTERPRET=1) runs vLLM's kernels, so a backend
only has to be announced.
"""

import dataclasses
import os
from typing import Any


class InterpretedDriver:
    """What vLLM and Inductor ask of a Triton backend's driver."""

    @staticmethod
    def is_active() -> bool:
        return True

    @staticmethod
    def get_current_target() -> Any:
        raise RuntimeError("Triton's interpreter compiles for no target")


class InterpretedBackend:
    """Stands for Triton's interpreter in the table of backends."""

    driver = InterpretedDriver
    compiler = None


def mend_interpreter() -> None:
    """Two places in which Triton 3.9's interpreter differs from a GPU."""
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert, builder = interpreter._convert_float, interpreter.InterpreterBuilder

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        # It cuts float32 off to bfloat16, where a GPU rounds to the nearest.
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
        return convert(data, source, target, mode)

    def with_boolean_mask(method: Any, index: int) -> Any:
        # A mask computed from scalars is of another type, which its loads and stores refuse.
        def call(self: Any, *args: Any) -> Any:
            mask = args[index]
            mask = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
            return method(self, *args[:index], mask, *args[index + 1 :])

        return call

    interpreter._convert_float = rounded
    builder.create_masked_load = with_boolean_mask(builder.create_masked_load, 1)
    builder.create_masked_store = with_boolean_mask(builder.create_masked_store, 2)


def hurry_interpreter() -> None:
    """Leave out what the interpreter does again for each launch; half of its time goes there."""
    import contextlib
    import functools

    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    class NothingToRestore:
        restore = staticmethod(contextlib.nullcontext)

    @functools.cache
    def patch_once(function: Any) -> type[NothingToRestore]:
        # It replaces functions of triton.language, and puts them back after each launch.
        patch(function)
        return NothingToRestore

    interpreter._patch_lang = patch_once
    # An addition is done twice otherwise, the second time in 64 bits.
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )


if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    os.environ["TRITON_INTERPRET"] = "1"

    import triton.backends

    triton.backends.backends.setdefault("cpu", InterpretedBackend)
    mend_interpreter()
    hurry_interpreter()
