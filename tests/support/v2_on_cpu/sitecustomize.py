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
            if mask.data.dtype != bool:
                mask = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
                args = (*args[:index], mask, *args[index + 1 :])
            return method(self, *args)

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
    hurry_operations(interpreter)
    # An addition is done twice otherwise, the second time in 64 bits.
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )


def hurry_operations(interpreter: Any) -> None:
    """Work out once what depends on types and shapes alone; a third of an operation's time."""
    import functools
    import math

    from triton.language import core

    np_dtype, init_block = interpreter._get_np_dtype, core.block_type.__init__
    by_name: dict[str, Any] = {}
    blocks: dict[tuple[Any, ...], Any] = {}
    nested = (core.block_type, core.pointer_type)

    def np_dtype_of(dtype: Any) -> Any:
        # It makes a table of all types in each call.
        scalar = dtype.element_ty if isinstance(dtype, core.block_type) else dtype
        if scalar.name not in by_name:
            by_name[scalar.name] = np_dtype(scalar)
        return by_name[scalar.name]

    @functools.cache
    def shape_and_size(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(n) for n in shape]), core.constexpr(math.prod(shape))

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_and_size(type.shape if type.is_block() else ())

    def make_block(self: Any, element: Any, shape: Any) -> None:
        key = (element.name, *shape)
        if key not in blocks:
            init_block(self, element, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element
        self.shape, self.numel, self.name = blocks[key]

    def is_equal(self: Any, other: Any) -> bool:
        other = other if isinstance(other, core.dtype) else core._unwrap_if_constexpr(other)
        return self is other or (isinstance(other, core.dtype) and self.name == other.name)

    def element_of(self: Any) -> Any:
        dtype = self.dtype
        while isinstance(dtype, nested):
            dtype = dtype.element_ty
        return dtype

    checked = core.builtin(lambda _semantic=None: None).__code__

    def patch_attribute(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        # Straight to the function, past the wrapper that asks for a `_semantic`.
        inner = member.__wrapped__ if getattr(member, "__code__", None) is checked else member

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return inner(*args, **kwargs)

        scope.set_attr(owner, name, call)

    interpreter._get_np_dtype, interpreter._patch_attr = np_dtype_of, patch_attribute
    interpreter.TensorHandle.get_element_ty = element_of
    core.tensor.__init__, core.block_type.__init__ = make_tensor, make_block
    of_name = core.dtype.__hash__
    core.dtype.__eq__, core.dtype.__hash__ = is_equal, of_name


if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    os.environ["TRITON_INTERPRET"] = "1"

    import triton.backends

    triton.backends.backends.setdefault("cpu", InterpretedBackend)
    mend_interpreter()
    hurry_interpreter()
