"""Adapter folders: what is accepted, what is refused, and how the refusal reads."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_pedro.adapter import (
    Adapter,
    header,
    init_adapter,
    inspect_adapter,
    load_adapter,
    read_adapter,
    reading,
    save_adapter,
    tensor_name,
    verify_adapter,
)
from vllm_pedro.adapter.values import widen
from vllm_pedro.backbone import TARGET_MODULES, BackboneShape
from vllm_pedro.config import ACTIVATIONS, PedroConfig
from vllm_pedro.errors import AdapterError, PedroError

WIDTHS = {"q_proj": 16, "k_proj": 8, "v_proj": 8, "gate_proj": 24, "up_proj": 24}
SHAPE = BackboneShape(2, 16, WIDTHS)
CONFIG = PedroConfig(r=3, rational_order=(3, 2))
ADAPTER = init_adapter(CONFIG, SHAPE, seed=1, scale=0.1)
DOWN = tensor_name(0, "down_proj.weight")
UP = tensor_name(0, "up_proj.weight")
BIAS = tensor_name(1, "up_proj.bias")


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write a folder, right or wrong, without this package's help."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@contextmanager
def good_folder() -> Iterator[Path]:
    """A valid adapter in a folder of its own; hypothesis forbids function-scoped fixtures."""
    with TemporaryDirectory() as name:
        yield write(Path(name), CONFIG.to_dict(), ADAPTER.tensors)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "adapter", CONFIG.to_dict(), ADAPTER.tensors)


def refused(path: Path | str, *said: str, shape: BackboneShape | None = SHAPE) -> None:
    with pytest.raises(AdapterError) as error:
        load_adapter(path, shape)
    for text in said:
        assert text in str(error.value)
    with pytest.raises(AdapterError) as verified:
        verify_adapter(path, shape)
    assert str(verified.value) == str(error.value)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ---- what is accepted


@pytest.mark.parametrize("shape", [SHAPE, None])
def test_load(folder: Path, shape: BackboneShape | None) -> None:
    loaded = load_adapter(folder, shape)
    assert loaded.config == CONFIG
    assert equal(loaded.tensors, ADAPTER.tensors)
    assert loaded.path == str(folder)
    assert loaded.num_layers == 2
    assert inspect_adapter(folder, shape) == CONFIG
    assert verify_adapter(folder, shape)[:2] == (CONFIG, loaded.digest)


def test_layer(folder: Path) -> None:
    adapter = load_adapter(folder)
    down, up, bias, numerator, denominator, down_bias = adapter.layer(1)
    name = "base_model.model.model.layers.1.vector_generator."
    assert down is adapter.tensors[name + "down_proj.weight"]
    assert up is adapter.tensors[name + "up_proj.weight"]
    assert bias is adapter.tensors[name + "up_proj.bias"]
    assert numerator is adapter.tensors[name + "activation.numerator"]
    assert denominator is adapter.tensors[name + "activation.denominator"]
    assert down_bias is None
    biased = init_adapter(PedroConfig(r=3, down_bias=True), SHAPE)
    assert biased.layer(1).down_bias is biased.tensors[name + "down_proj.bias"]
    with pytest.raises(IndexError):
        adapter.layer(2)
    static = init_adapter(PedroConfig(r=0), SHAPE)
    assert static.num_layers == 2
    assert static.layer(0)[:2] == (None, None)
    assert static.layer(0)[3:] == (None, None, None)


def test_which_tensors_an_adapter_has() -> None:
    config = PedroConfig(r=3, target_modules=["k_proj", "up_proj"], activation=["gelu", "rational"])
    prefix = "base_model.model.model.layers."
    adapter = init_adapter(config, SHAPE)
    assert {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()} == {
        prefix + "0.vector_generator.down_proj.weight": (3, 16),
        prefix + "0.vector_generator.up_proj.weight": (32, 3),
        prefix + "0.vector_generator.up_proj.bias": (32,),
        prefix + "1.vector_generator.down_proj.weight": (3, 16),
        prefix + "1.vector_generator.up_proj.weight": (32, 3),
        prefix + "1.vector_generator.up_proj.bias": (32,),
        prefix + "1.vector_generator.activation.numerator": (7,),
        prefix + "1.vector_generator.activation.denominator": (5,),
    }
    config.down_bias = True
    added = init_adapter(config, SHAPE).tensors.keys() - adapter.tensors.keys()
    assert added == {f"{prefix}{i}.vector_generator.down_proj.bias" for i in range(2)}
    static = PedroConfig(r=0, down_bias=True)
    assert len(init_adapter(static, SHAPE).tensors) == 2  # without meaning there
    with pytest.raises(PedroError, match="each of the 3 layers, found 2"):
        init_adapter(config, BackboneShape(3, 16, WIDTHS))


@settings(deadline=None, max_examples=40)
@given(
    r=st.integers(0, 4),
    modules=st.permutations(TARGET_MODULES).flatmap(
        lambda names: st.integers(1, 5).map(lambda n: list(names[:n]))
    ),
    activation=st.sampled_from(ACTIVATIONS)
    | st.lists(st.sampled_from(ACTIVATIONS), min_size=2, max_size=2),
    order=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    dtype=st.sampled_from([None, torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    down_bias=st.booleans(),
)
def test_save_and_load(
    r: int,
    modules: list[str],
    activation: str | list[str],
    order: tuple[int, int],
    dtype: torch.dtype | None,
    down_bias: bool,
) -> None:
    config = PedroConfig(
        r=r,
        target_modules=modules,
        activation=activation,
        rational_order=order,
        down_bias=down_bias,
    )
    adapter = init_adapter(config, SHAPE, seed=r, scale=0.3)
    assert config.num_parameters(SHAPE) == sum(t.numel() for t in adapter.tensors.values())
    with TemporaryDirectory() as name:
        digest = save_adapter(name, config, adapter.tensors, dtype)
        if dtype in (None, torch.float32):
            assert digest == adapter.digest
        loaded = load_adapter(name, SHAPE, expected_digest=digest)
        assert verify_adapter(name, SHAPE)[:2] == (config, digest)
    assert loaded.digest == digest
    assert loaded.config == config
    assert {tensor.dtype for tensor in loaded.tensors.values()} == {torch.float32}
    rounded = {
        key: tensor.to(dtype or torch.float32).float() for key, tensor in adapter.tensors.items()
    }
    assert equal(loaded.tensors, rounded)


def written_by_hand(folder: Path, config: PedroConfig, data: dict[str, tuple[str, Tensor]]) -> None:
    """Write a folder whose data lie as the entries of `data` do, each with its dtype's name."""
    header, blob = {}, b""
    for name, (dtype, tensor) in data.items():
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        place = [len(blob), len(blob) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": place}
        blob += content
    start = json.dumps(dict(sorted(header.items()))).encode()
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(config.to_json())
    (folder / "adapter_model.safetensors").write_bytes(
        len(start).to_bytes(8, "little") + start + blob
    )


DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@settings(deadline=None, max_examples=60)
@given(
    layers=st.integers(1, 23),
    r=st.integers(0, 3),
    dtypes=st.sampled_from([[name] for name in DTYPES] + [["F16", "BF16", "F64"]]),
    order=st.sampled_from(["sorted", "reversed", "shuffled"]),
    down_bias=st.booleans(),
    data=st.data(),
)
def test_blocks_are_the_layers_wherever_they_lie(
    layers: int, r: int, dtypes: list[str], order: str, down_bias: bool, data: st.DataObject
) -> None:
    shape = BackboneShape(layers, 4, dict.fromkeys(WIDTHS, 3))
    kinds = st.lists(st.sampled_from(ACTIVATIONS), min_size=layers, max_size=layers)
    activation = data.draw(st.sampled_from(ACTIVATIONS) | kinds)
    config = PedroConfig(r=r, activation=activation, rational_order=(3, 2), down_bias=down_bias)
    adapter = init_adapter(config, shape, seed=layers, scale=0.3)
    names = sorted(adapter.tensors, reverse=order == "reversed")
    if order == "shuffled":
        names = data.draw(st.permutations(names))
    content = {}
    for i, name in enumerate(names):
        dtype = dtypes[i % len(dtypes)]
        content[name] = (dtype, adapter.tensors[name].to(DTYPES[dtype]))
    with TemporaryDirectory() as parent:
        folder = Path(parent, "adapter")
        written_by_hand(folder, config, content)
        read, loaded = read_adapter(folder, shape), load_adapter(folder, shape)
        assert verify_adapter(folder, shape) == (config, read.digest, read.dtype)
    assert read.digest == loaded.digest
    assert equal(loaded.tensors, {name: tensor.float() for name, (_, tensor) in content.items()})
    found = set()
    for block, arrays in read.blocks():
        for row, layer in enumerate(range(layers)[block]):
            assert layer not in found
            found.add(layer)
            for array, tensor in zip(arrays, loaded.layer(layer), strict=True):
                assert (array is None) == (tensor is None)
                if array is not None and tensor is not None:
                    values = np.zeros(tensor.shape, np.float32)
                    widen(array[row], values)
                    assert np.array_equal(values, tensor.numpy())
    assert found == set(range(layers))


def test_blocks_are_few(tmp_path: Path) -> None:
    shape = BackboneShape(32, 4, dict.fromkeys(WIDTHS, 3))
    adapter = init_adapter(PedroConfig(r=2), shape, scale=0.1)
    save_adapter(tmp_path, adapter.config, adapter.tensors, torch.bfloat16)
    read = read_adapter(tmp_path, shape)
    assert read.values.dtype == np.uint16
    assert len(list(read.blocks())) < 8


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_value_of_16_bits_is_widened_or_refused(name: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    exact = torch.from_numpy(bits).view(DTYPES[name]).float().numpy()
    stored = header.STORED[name]
    finite = [
        reading.is_finite_bits(bits[i : i + 1].view(np.uint8), stored) for i in range(1 << 16)
    ]
    assert finite == np.isfinite(exact).tolist()
    values = np.ones(1 << 16, np.float32)
    widen(bits.view(stored.dtype), values)
    assert np.array_equal(values.view(np.uint32)[finite], exact.view(np.uint32)[finite])


@pytest.mark.parametrize("value", [0.0, -1e38, 3.4e38, -0.0, 1e-45, np.inf, -np.inf, np.nan])
def test_values_of_32_bits(value: float) -> None:
    for values in ([value], [-1.0, value, 1.0], [value, -2.0], [2.0, value]):
        data = np.array(values, np.float32)
        for bits in (data, -data):
            finite = reading.is_finite_bits(bits.view(np.uint8), header.STORED["F32"])
            assert finite == bool(np.isfinite(data).all())


def test_chunks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(folder, CONFIG, ADAPTER.tensors, torch.bfloat16)
    want, digest = load_adapter(folder).tensors, load_adapter(folder).digest
    size = sum(tensor.numel() for tensor in ADAPTER.tensors.values())
    for chunk in (2, 64, 2 * size - 2, 2 * size, 2 * size + 2):
        monkeypatch.setattr(reading, "CHUNK_BYTES", chunk)
        assert verify_adapter(folder, SHAPE)[:2] == (CONFIG, digest)
        assert equal(load_adapter(folder, SHAPE, digest).tensors, want)
        for name, row in ((sorted(want)[0], 0), (sorted(want)[-1], -1)):
            broken = {key: tensor.clone() for key, tensor in want.items()}
            broken[name].view(-1)[row] = -torch.inf
            write(folder, CONFIG.to_dict(), {k: t.bfloat16() for k, t in broken.items()})
            refused(folder, name, "0 NaN and 1 Inf")
        save_adapter(folder, CONFIG, ADAPTER.tensors, torch.bfloat16)


def test_verifying_keeps_no_weights(tmp_path: Path) -> None:
    config = PedroConfig(r=64)
    shape = BackboneShape(4, 2048, dict.fromkeys(WIDTHS, 2048))
    save_adapter(tmp_path, config, init_adapter(config, shape).tensors)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 8_000_000
    tracemalloc.start()
    try:
        verify_adapter(tmp_path, shape)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_same_header_in_another_folder_is_named_rightly(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, CONFIG.to_dict(), ADAPTER.tensors | {BIAS: torch.zeros(3)})
        refused(tmp_path / name, str(tmp_path / name), BIAS)
    path = tmp_path / "two" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    refused(tmp_path / "two", str(path), "something was appended")


def test_long_headers_are_not_cached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_adapter(folder)
    monkeypatch.setattr(header, "MAX_CACHED_HEADER_BYTES", 16)
    monkeypatch.setattr(header, "_parse_cached", lambda found: pytest.fail("cached"))
    assert equal(load_adapter(folder).tensors, ADAPTER.tensors)


@pytest.mark.parametrize("change", [-1, 1])
def test_file_that_changes_while_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: int
) -> None:
    path = folder / "adapter_model.safetensors"
    size = path.stat().st_size
    original = reading.read_header

    def changed_behind(file: Any, source: str) -> Any:
        found = original(file, source)
        os.truncate(path, size + change)
        return found

    # What a reader has buffered is not what changes, so the data have to be longer than that.
    config = PedroConfig(r=64)
    adapter = init_adapter(config, BackboneShape(2, 2048, WIDTHS))
    write(folder, config.to_dict(), adapter.tensors)
    size = path.stat().st_size
    monkeypatch.setattr(reading, "read_header", changed_behind)
    for call in (load_adapter, verify_adapter):
        with pytest.raises(AdapterError, match="changed while it was read"):
            call(folder)
        os.truncate(path, size)


def test_bytes_are_deterministic(tmp_path: Path) -> None:
    shuffled = dict(reversed(ADAPTER.tensors.items()))
    first = save_adapter(tmp_path / "one", CONFIG, ADAPTER.tensors)
    second = save_adapter(tmp_path / "two", CONFIG, shuffled)
    assert first == second
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "one")) == sorted(
        ["adapter_config.json", "adapter_model.safetensors"]
    )


def test_init_adapter() -> None:
    state = torch.get_rng_state()
    fresh = init_adapter(CONFIG, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    assert not fresh.layer(0).up.any()  # type: ignore[union-attr]  # r > 0
    assert bool((fresh.layer(0).bias == 1).all())
    assert equal(fresh.tensors, init_adapter(CONFIG, SHAPE).tensors)
    assert not torch.equal(fresh.tensors[DOWN], init_adapter(CONFIG, SHAPE, seed=1).tensors[DOWN])
    wild = init_adapter(CONFIG, BackboneShape(1, 16, dict.fromkeys(WIDTHS, 4000)), scale=0.5)
    assert wild.layer(0).up.std().item() == pytest.approx(0.5, rel=0.05)  # type: ignore[union-attr]
    assert wild.layer(0).bias.mean().item() == pytest.approx(1.0, abs=0.05)
    assert wild.layer(0).bias.std().item() == pytest.approx(0.5, rel=0.05)
    assert wild.digest != fresh.digest


def test_digest_is_over_both_files_with_their_lengths(folder: Path) -> None:
    config = (folder / "adapter_config.json").read_bytes()
    weights = (folder / "adapter_model.safetensors").read_bytes()
    want = hashlib.sha256()
    for data in (config, weights):
        want.update(len(data).to_bytes(8, "little") + data)
    assert verify_adapter(folder)[1] == want.hexdigest() == load_adapter(folder).digest


def test_changed_files(folder: Path) -> None:
    digest = load_adapter(folder).digest
    load_adapter(folder, SHAPE, digest)
    changed = {name: tensor + 1e-3 for name, tensor in ADAPTER.tensors.items()}
    write(folder, CONFIG.to_dict(), changed)
    with pytest.raises(AdapterError, match="changed since the adapter was registered"):
        load_adapter(folder, SHAPE, digest)
    write(folder, CONFIG.to_dict() | {"pooling": "mean"}, ADAPTER.tensors)
    with pytest.raises(AdapterError, match="changed since the adapter was registered"):
        load_adapter(folder, SHAPE, digest)


def test_inspect_reads_no_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = dict(ADAPTER.tensors)
    tensors[DOWN] = torch.full_like(tensors[DOWN], torch.nan)
    write(folder, CONFIG.to_dict(), tensors)
    monkeypatch.setattr(safetensors.torch, "load", lambda data: pytest.fail("tensors were read"))
    assert inspect_adapter(folder, SHAPE) == CONFIG


# ---- what is refused: tensors


def test_nan_and_inf(folder: Path) -> None:
    for value, said in ((torch.nan, "1 NaN and 0 Inf"), (-torch.inf, "0 NaN and 1 Inf")):
        tensors = {name: tensor.clone() for name, tensor in ADAPTER.tensors.items()}
        tensors[UP][7, 1] = value
        write(folder, CONFIG.to_dict(), tensors)
        refused(folder, UP, said, "adapter_model.safetensors")


def test_float64_beyond_float32(folder: Path) -> None:
    tensors = ADAPTER.tensors | {BIAS: torch.full((48,), 1e300, dtype=torch.float64)}
    refused(write(folder, CONFIG.to_dict(), tensors), BIAS, "48 Inf", "in float32")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int64, "I64"),
        (torch.int8, "I8"),
        (torch.bool, "BOOL"),
    ],
)
def test_dtypes_that_are_no_floats(folder: Path, dtype: torch.dtype, name: str) -> None:
    write(folder, CONFIG.to_dict(), ADAPTER.tensors | {DOWN: torch.zeros(3, 16).to(dtype)})
    refused(folder, DOWN, "'F16', 'BF16', 'F32', 'F64'", repr(name))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats(folder: Path, dtype: torch.dtype) -> None:
    narrow = ADAPTER.tensors[DOWN].to(dtype)
    loaded = load_adapter(write(folder, CONFIG.to_dict(), ADAPTER.tensors | {DOWN: narrow}), SHAPE)
    assert torch.equal(loaded.tensors[DOWN], narrow.float())
    broken = narrow.clone()
    broken.view(torch.uint8)[0, 0] = 0x7F  # NaN in both
    refused(write(folder, CONFIG.to_dict(), ADAPTER.tensors | {DOWN: broken}), DOWN, "1 NaN")


@settings(deadline=None, max_examples=30)
@given(name=st.sampled_from(sorted(ADAPTER.tensors)), shape=st.sampled_from([SHAPE, None]))
def test_missing_tensor(name: str, shape: BackboneShape | None) -> None:
    with good_folder() as folder:
        tensors = {key: value for key, value in ADAPTER.tensors.items() if key != name}
        write(folder, CONFIG.to_dict(), tensors)
        refused(folder, "missing tensors", name, shape=shape)


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(
        [
            "lm_head.weight",
            tensor_name(0, "down_proj.bias"),
            tensor_name(0, "vectors"),
            tensor_name(1, "down_proj.weight").replace("layers.1", "layers.01"),
            tensor_name(1, "down_proj.weight").replace("layers.1", "layers.-1"),
            tensor_name(1, "down_proj.weight").replace("layers.1", "layers.١"),
            tensor_name(1, "down_proj.weight") + "\n",
            tensor_name(1, "down_proj.weight")[len("base_model.model.") :],
        ]
    ),
    shape=st.sampled_from([SHAPE, None]),
)
def test_extra_tensor(name: str, shape: BackboneShape | None) -> None:
    with good_folder() as folder:
        write(folder, CONFIG.to_dict(), ADAPTER.tensors | {name: torch.zeros(3, 16)})
        refused(folder, "unexpected tensors", repr(name), shape=shape)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(ADAPTER.tensors)),
    change=st.sampled_from(["grow", "shrink", "unsqueeze", "flatten", "transpose", "empty"]),
    shape=st.sampled_from([SHAPE, None]),
)
def test_wrong_shape(name: str, change: str, shape: BackboneShape | None) -> None:
    tensor = ADAPTER.tensors[name]
    wrong = {
        "grow": torch.cat([tensor, tensor]),
        "shrink": tensor[:-1],
        "unsqueeze": tensor[None],
        "flatten": tensor.flatten()[None],
        "transpose": tensor.T if tensor.dim() == 2 else tensor[:, None],
        "empty": tensor[:0],
    }[change]
    with good_folder() as folder:
        write(folder, CONFIG.to_dict(), ADAPTER.tensors | {name: wrong})
        # Without a backbone layer 0 is believed, and the others contradict it.
        said = [name, str(list(wrong.shape)), str(list(tensor.shape))] if shape else []
        refused(folder, "expected shape", *said, shape=shape)


def test_layers_that_differ(folder: Path) -> None:
    """Each layer has tensors of its own D, and those without any of the modules have none."""
    other = WIDTHS | {"q_proj": 4, "up_proj": 0}
    shape = BackboneShape.of_layers(
        16, [WIDTHS, WIDTHS, other, dict.fromkeys(WIDTHS, 0), other, other]
    )
    config = PedroConfig(r=3, target_modules=["up_proj", "q_proj"], activation=["gelu"] * 6)
    made = init_adapter(config, shape, seed=3, scale=0.5)
    save_adapter(folder, config, made.tensors)
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers."
    wide, narrow = WIDTHS["up_proj"] + WIDTHS["q_proj"], 4
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        f"{prefix}{layer}.vector_generator.{name}": shape
        for layer, width in ((0, wide), (1, wide), (2, narrow), (4, narrow), (5, narrow))
        for name, shape in (
            ("down_proj.weight", [3, 16]),
            ("up_proj.weight", [width, 3]),
            ("up_proj.bias", [width]),
        )
    }
    assert config.num_parameters(shape) == sum(t.numel() for t in made.tensors.values())
    for against in (shape, None):
        loaded = load_adapter(folder, against)
        assert loaded.num_layers == 6
        assert loaded.layer(3).down is None
        assert not len(loaded.layer(3).bias)
        for layer in (0, 1, 2, 4, 5):
            found, wanted = loaded.layer(layer), made.layer(layer)
            assert all(a is b or torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    even = BackboneShape(6, 16, WIDTHS)
    refused(folder, "the 6 layers", "found 5 layers", "missing 3", shape=even)
    with_q_in_all = BackboneShape.of_layers(16, [WIDTHS] * 3 + [other] * 3)
    refused(folder, "missing 3", shape=with_q_in_all)
    no_up = BackboneShape(6, 16, WIDTHS | {"up_proj": 0})
    refused(folder, "no layer of this backbone has up_proj, only q_proj, k_proj", shape=no_up)
    with pytest.raises(PedroError, match="no layer of this backbone has up_proj"):
        init_adapter(config, no_up)


def test_layers_that_have_no_tensors(folder: Path) -> None:
    """The backbone says whether it may be so; with its modules in every layer it may not."""
    tensors = {name.replace("layers.1.", "layers.2."): t for name, t in ADAPTER.tensors.items()}
    write(folder, CONFIG.to_dict(), tensors)
    assert load_adapter(folder).num_layers == 3
    refused(folder, "2 layers", "missing 1, unexpected 2")


def test_no_tensors(folder: Path) -> None:
    write(folder, CONFIG.to_dict(), {})
    refused(folder, "found none", shape=None)
    refused(folder, "missing tensors")


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (BackboneShape(3, 16, WIDTHS), ["the 3 layers of this backbone", "found 2 layers"]),
        (BackboneShape(1, 16, WIDTHS), ["the 1 layers of this backbone", "found 2 layers"]),
        (
            BackboneShape(2, 24, WIDTHS),
            [DOWN, "[3, 24] for this backbone (hidden_size 24), found [3, 16]"],
        ),
        (
            BackboneShape(2, 16, WIDTHS | {"q_proj": 32}),
            [UP, "[64, 3] for this backbone (q_proj 32, v_proj 8, up_proj 24), found [48, 3]"],
        ),
        (BackboneShape(2, 16, WIDTHS | {"v_proj": 4}), [UP, "[44, 3]", "found [48, 3]"]),
    ],
)
def test_wrong_backbone(folder: Path, shape: BackboneShape, said: list[str]) -> None:
    refused(folder, *said, "the adapter was made for another backbone", shape=shape)
    with pytest.raises(AdapterError):
        inspect_adapter(folder, shape)


def test_width_of_a_projection_that_is_not_adapted_does_not_matter(folder: Path) -> None:
    load_adapter(folder, BackboneShape(2, 16, WIDTHS | {"gate_proj": 99, "k_proj": 99}))


# ---- what is refused: the config


@settings(deadline=None, max_examples=40)
@given(
    change=st.sampled_from(
        [
            {"r": 4},
            {"r": 0},
            {"r": -1},
            {"r": "3"},
            {"target_modules": ["o_proj"]},
            {"activation": "gelu"},
            {"activation": ["rational", "gelu"]},
            {"activation": ["rational"]},
            {"activation": ["rational"] * 3},
            {"rational_order": [4, 2]},
            {"rational_order": [3, 3]},
            {"peft_type": "LORA"},
            {"pooling": "none"},
            {"input_norm": "none"},
            {"down_bias": True},
            {"down_bias": "true"},
            {"vector_scale": 1.0},
        ]
    ),
    shape=st.sampled_from([SHAPE, None]),
)
def test_config_that_does_not_fit(change: dict[str, Any], shape: BackboneShape | None) -> None:
    if change == {"activation": ["rational"] * 3}:
        shape = SHAPE  # by itself the third layer may have none of the modules
    with good_folder() as folder:
        write(folder, CONFIG.to_dict() | change, ADAPTER.tensors)
        refused(folder, str(folder), shape=shape)
        with pytest.raises(AdapterError):
            inspect_adapter(folder, shape)


def test_other_target_modules_need_the_backbone_to_be_noticed(folder: Path) -> None:
    write(folder, CONFIG.to_dict() | {"target_modules": ["q_proj", "v_proj"]}, ADAPTER.tensors)
    refused(folder, "expected shape [24, 3]", "(q_proj 16, v_proj 8)", "found [48, 3]")


def test_unknown_key(folder: Path) -> None:
    write(folder, CONFIG.to_dict() | {"vector_scale": 1.0}, ADAPTER.tensors)
    refused(folder, "adapter_config.json", "unknown keys 'vector_scale'")


def test_a_down_bias_is_there_if_and_only_if_the_config_says_so(folder: Path) -> None:
    name = tensor_name(0, "down_proj.bias")
    config = CONFIG.to_dict() | {"down_bias": True}
    write(folder, config, ADAPTER.tensors)
    refused(folder, "missing tensors", name)
    biases = {tensor_name(i, "down_proj.bias"): torch.randn(3) for i in range(2)}
    write(folder, CONFIG.to_dict(), ADAPTER.tensors | biases)
    refused(folder, "unexpected tensors", name, "down_bias false")
    write(folder, config, ADAPTER.tensors | biases)
    assert equal(load_adapter(folder, SHAPE).tensors, ADAPTER.tensors | biases)
    write(folder, config, ADAPTER.tensors | biases | {name: torch.randn(4)})
    refused(folder, f"{name}: expected shape [3] for this backbone (r 3), found [4]")
    write(folder, config, ADAPTER.tensors | biases | {name: torch.tensor([0, torch.nan, 0])})
    refused(folder, f"{name}: expected finite values, found 1 NaN")


def test_an_adapter_from_before_down_biases_is_read_as_it_was(folder: Path) -> None:
    """Without the key there is none, and the bytes and their digest are the file's own."""
    config = CONFIG.to_dict()
    del config["down_bias"]
    write(folder, config, ADAPTER.tensors)
    loaded = load_adapter(folder, SHAPE)
    assert loaded.config == CONFIG
    assert equal(loaded.tensors, ADAPTER.tensors)
    config_bytes = (folder / "adapter_config.json").read_bytes()
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert loaded.digest == reading.digest_of(config_bytes, weights)
    assert loaded.digest != ADAPTER.digest


def test_wrong_rank_is_not_blamed_on_the_backbone(folder: Path) -> None:
    write(folder, CONFIG.to_dict() | {"r": 4}, ADAPTER.tensors)
    with pytest.raises(AdapterError) as error:
        load_adapter(folder, SHAPE)
    assert "expected shape [4, 16]" in str(error.value)
    assert "another backbone" not in str(error.value)


# ---- what is refused: files


def test_missing_folder_and_files(folder: Path) -> None:
    refused(folder / "nowhere", "nowhere", "expected an adapter folder", "found nothing")
    refused("", "expected an adapter folder")
    refused("nul\0byte", "expected an adapter folder")
    refused(folder / "adapter_config.json", "found something that is not a folder")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "adapter_model.safetensors", "found no such file")
    (folder / "adapter_model.safetensors").mkdir()
    refused(folder, "adapter_model.safetensors", "found a folder")
    shutil.rmtree(folder)
    folder.mkdir()
    refused(folder, "adapter_config.json", "found no such file")


def test_fifo_does_not_hang(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.unlink()
    os.mkfifo(path)
    thread = threading.Thread(target=refused, args=(folder, "not a regular file"), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


class _Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickled_file_beside_or_instead(folder: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(_Bomb()))
    refused(folder, name, "beside adapter_model.safetensors", "never loaded")
    with pytest.raises(AdapterError, match="never loaded"):
        save_adapter(folder, CONFIG, ADAPTER.tensors)
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, name, "instead of adapter_model.safetensors", "never loaded")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_with_the_right_name(folder: Path, protocol: int) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(pickle.dumps(_Bomb(), protocol))
    refused(folder, "found a pickled PyTorch file")


@pytest.mark.parametrize("new_format", [True, False])
def test_torch_save_with_the_right_name(folder: Path, new_format: bool) -> None:
    path = folder / "adapter_model.safetensors"
    torch.save(ADAPTER.tensors, path, _use_new_zipfile_serialization=new_format)
    refused(folder, "found a pickled PyTorch file")


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_header_length_that_begins_like_a_pickle(tmp_path: Path, length: int) -> None:
    config = PedroConfig(r=0)
    write(tmp_path, config.to_dict(), init_adapter(config, SHAPE).tensors)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    padded = whole[8:header].ljust(length)
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + whole[header:])
    assert path.read_bytes()[0] == 0x80
    load_adapter(tmp_path, SHAPE)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_truncated_anywhere(data: st.DataObject) -> None:
    with good_folder() as folder:
        path = folder / "adapter_model.safetensors"
        whole = path.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        # Half of them in the header, which is the smaller part.
        length = data.draw(st.integers(0, header) | st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:length])
        refused(folder, str(path))
        with pytest.raises(AdapterError):
            inspect_adapter(folder, SHAPE)


@settings(deadline=None, max_examples=20)
@given(tail=st.binary(min_size=1, max_size=64))
def test_something_appended(tail: bytes) -> None:
    with good_folder() as folder:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes() + tail)
        refused(folder, "something was appended")


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_bit_flips_in_the_header(data: st.DataObject) -> None:
    with good_folder() as folder:
        path = folder / "adapter_model.safetensors"
        whole = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(whole[:8], "little")
        for _ in range(data.draw(st.integers(1, 3))):
            whole[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(whole)
        try:
            loaded = load_adapter(folder, SHAPE)
        except AdapterError:
            return
        # Some flips change nothing that counts. Two can swap tensors of the same shape, which
        # nothing could notice, so only the form is compared.
        shapes = {name: tensor.shape for name, tensor in loaded.tensors.items()}
        assert shapes == {name: tensor.shape for name, tensor in ADAPTER.tensors.items()}


@settings(deadline=None, max_examples=100)
@given(weights=st.binary(max_size=300), config=st.none() | st.binary(max_size=300))
def test_random_bytes(weights: bytes, config: bytes | None) -> None:
    with good_folder() as folder:
        (folder / "adapter_model.safetensors").write_bytes(weights)
        if config is not None:
            (folder / "adapter_config.json").write_bytes(config)
        refused(folder, str(folder))


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"x": ENTRY | {"data_offsets": [0, 8]}}, "does not fill the bytes 0 to 8"),
        ({"x": ENTRY | {"data_offsets": [4, 0]}}, "does not fill the bytes 4 to 0"),
        ({"x": ENTRY | {"data_offsets": [-4, 0]}}, "data_offsets [-4, 0]"),
        ({"x": ENTRY | {"data_offsets": [0]}}, "data_offsets [0]"),
        ({"x": ENTRY | {"shape": [-1]}}, "shape [-1]"),
        ({"x": ENTRY | {"shape": [True]}}, "shape [True]"),
        ({"x": ENTRY | {"shape": [1] * 9}}, "shape [1, 1"),
        ({"x": ENTRY | {"shape": [2**62, 2**62]}}, "does not fill"),
        ({"x": ENTRY | {"dtype": 7}}, "'7'"),
        ({"x": ENTRY | {"more": 1}}, "expected dtype, shape and data_offsets"),
        ({"x": {"dtype": "F32"}}, "expected dtype, shape and data_offsets"),
        ({"x": [1]}, "expected dtype, shape and data_offsets"),
        ({"x": ENTRY, "y": ENTRY}, "begin at byte 0, expected 4"),
        ({"x": ENTRY | {"data_offsets": [4, 8]}}, "begin at byte 4, expected 0"),
        ({"x": ENTRY, "__metadata__": {"a": 1}}, "__metadata__"),
        ({"x": ENTRY, "__metadata__": []}, "__metadata__"),
        ([], "expected a JSON object"),
    ],
)
def test_broken_headers(folder: Path, header: Any, said: str) -> None:
    data = json.dumps(header).encode()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(4))
    refused(folder, said, str(path))


def test_tensor_given_twice(folder: Path) -> None:
    entry = json.dumps(ENTRY)
    data = f'{{"x": {entry}, "x": {entry}}}'.encode()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(4))
    refused(folder, "duplicate keys 'x'")


def test_huge_files_are_not_read(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    with open(path, "wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate((1 << 30) + 8)  # sparse: takes no space
    refused(folder, "header of at most")
    with open(path, "wb") as file:
        file.truncate(header.MAX_WEIGHTS_BYTES + 1)
    refused(folder, f"at most {header.MAX_WEIGHTS_BYTES} bytes")


# ---- saving


def test_save_refuses_before_it_writes(tmp_path: Path) -> None:
    target = tmp_path / "adapter"

    def fails(said: str, tensors: dict[str, Tensor], **more: Any) -> None:
        with pytest.raises(PedroError) as error:
            save_adapter(target, CONFIG, tensors, **more)
        assert said in str(error.value)
        assert not target.exists()

    good = ADAPTER.tensors
    fails("missing tensors", {k: v for k, v in good.items() if k != DOWN})
    fails("unexpected tensors", good | {"x": torch.zeros(1)})
    fails("expected shape", good | {DOWN: torch.zeros(4, 16)})
    fails("1 NaN", good | {BIAS: torch.tensor([torch.nan] + [1.0] * 47)})
    fails("torch.int64", good | {BIAS: torch.ones(48, dtype=torch.int64)})
    fails("48 Inf", good | {BIAS: torch.full((48,), 1e6)}, dtype=torch.float16)
    fails("torch.int8", good, dtype=torch.int8)


def test_save_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(AdapterError, match="expected a folder, found a file"):
            save_adapter(path, CONFIG, ADAPTER.tensors)


def test_failed_save_leaves_the_old_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = load_adapter(folder).digest

    def no_space(source: object, target: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="no space"):
        save_adapter(folder, CONFIG, init_adapter(CONFIG, SHAPE, seed=9).tensors)
    assert load_adapter(folder).digest == digest
    assert len(os.listdir(folder)) == 2


def test_save_takes_views_and_parameters(tmp_path: Path) -> None:
    tensors = dict(ADAPTER.tensors)
    tensors[DOWN] = torch.nn.Parameter(tensors[DOWN])
    tensors[UP] = tensors[UP].T.contiguous().T
    tensors[BIAS] = tensors[tensor_name(0, "up_proj.bias")]
    save_adapter(tmp_path, CONFIG, tensors)
    loaded: Adapter = load_adapter(tmp_path, SHAPE)
    assert equal(loaded.tensors, {name: t.detach() for name, t in tensors.items()})
