"""PedroConfig and BackboneShape."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pedro.backbone import TARGET_MODULES, BackboneShape
from vllm_pedro.config import (
    ACTIVATIONS,
    INPUT_NORMS,
    MAX_CONFIG_BYTES,
    POOLINGS,
    PedroConfig,
    peft_type_of,
)
from vllm_pedro.errors import AdapterError, PedroError

LLAMA_2_7B = BackboneShape(
    32, 4096, dict(zip(TARGET_MODULES, (4096, 4096, 4096, 11008, 11008), strict=True))
)

SUBSETS = [list(names) for n in range(1, 6) for names in itertools.combinations(TARGET_MODULES, n)]


def test_defaults_are_the_papers() -> None:
    assert PedroConfig().to_dict() == {
        "peft_type": "PEDRO",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": 12,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "pooling": "last",
        "input_norm": None,
        "down_bias": False,
        "scope": "sequence",
        "activation": "rational",
        "rational_order": [6, 5],
        "inference_mode": False,
    }


@pytest.mark.parametrize(
    ("r", "modules", "count"),
    [
        (12, ["q_proj", "v_proj", "up_proj"], 8_945_664),
        (8, list(TARGET_MODULES), 9_830_400),
        (24, ["q_proj", "v_proj"], 9_437_184),
    ],
)
def test_parameter_counts_of_the_paper(r: int, modules: list[str], count: int) -> None:
    config = PedroConfig(r=r, target_modules=modules)
    assert config.num_parameters(LLAMA_2_7B, paper=True) == count
    width = sum(LLAMA_2_7B.split_widths(modules))
    assert config.num_parameters(LLAMA_2_7B) == count + 32 * (width + 7 + 5)


def test_parameter_count_without_generators_or_coefficients() -> None:
    width = 4096 + 4096 + 11008
    assert PedroConfig(r=0).num_parameters(LLAMA_2_7B) == 32 * width
    assert PedroConfig(r=0).num_parameters(LLAMA_2_7B, paper=True) == 0
    mixed = PedroConfig(activation=["rational"] * 3 + ["gelu"] * 29)
    assert mixed.num_parameters(LLAMA_2_7B) == 8_945_664 + 32 * width + 3 * 12
    biased = PedroConfig(activation="gelu", down_bias=True)
    assert biased.num_parameters(LLAMA_2_7B) == 8_945_664 + 32 * (width + 12)
    assert biased.num_parameters(LLAMA_2_7B, paper=True) == 8_945_664


@given(
    r=st.integers(0, 64),
    modules=st.permutations(TARGET_MODULES).flatmap(
        lambda names: st.integers(1, 5).map(lambda n: list(names[:n]))
    ),
    pooling=st.sampled_from(POOLINGS),
    input_norm=st.sampled_from(INPUT_NORMS),
    activation=st.sampled_from(ACTIVATIONS) | st.lists(st.sampled_from(ACTIVATIONS), min_size=1),
    order=st.tuples(st.integers(1, 32), st.integers(1, 32)),
    inference_mode=st.booleans(),
    down_bias=st.booleans(),
)
def test_dict_round_trip(
    r: int,
    modules: list[str],
    pooling: str,
    input_norm: str | None,
    activation: str | list[str],
    order: tuple[int, int],
    inference_mode: bool,
    down_bias: bool,
) -> None:
    config = PedroConfig(
        r=r,
        target_modules=modules,
        pooling=pooling,
        input_norm=input_norm,
        activation=activation,
        rational_order=order,
        inference_mode=inference_mode,
        down_bias=down_bias,
    )
    assert PedroConfig.from_dict(json.loads(config.to_json())) == config
    assert config.target_modules == modules  # the order is the order of the split


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("r", True, "r: expected an int"),
        ("r", 1.0, "r: expected an int"),
        ("r", -1, "-1"),
        ("r", "12", "'12'"),
        ("r", None, "None"),
        ("target_modules", [], "one or more"),
        ("target_modules", "q_proj", "a list"),
        ("target_modules", ["q_proj", "q_proj"], "twice"),
        ("target_modules", ["q_proj", "o_proj", "down_proj"], "'o_proj', 'down_proj'; allowed"),
        ("target_modules", ["q_proj", 1], "a list"),
        ("target_modules", None, "a list"),
        ("pooling", "first", "'last', 'mean', 'max'"),
        ("pooling", ["last"], "'last', 'mean', 'max'"),
        ("input_norm", "layer", "'rms'"),
        ("input_norm", False, "'rms'"),
        ("down_bias", None, "true or false"),
        ("down_bias", 1, "true or false"),
        ("activation", "silu", "'rational', 'gelu', 'relu'"),
        ("activation", [], "one a layer"),
        ("activation", ["gelu", None], "one a layer"),
        ("activation", {"0": "gelu"}, "one a layer"),
        ("rational_order", [6], "two ints"),
        ("rational_order", [6, 5, 4], "two ints"),
        ("rational_order", [6, 0], "two ints"),
        ("rational_order", [6, 33], "between 1 and 32"),
        ("rational_order", [6.0, 5], "two ints"),
        ("rational_order", [True, 5], "two ints"),
        ("rational_order", 6, "two ints"),
        ("inference_mode", 1, "true or false"),
        ("inference_mode", None, "true or false"),
        ("task_type", "SEQ_CLS", "'CAUSAL_LM'"),
        ("base_model_name_or_path", 1, "a string"),
    ],
)
def test_invalid_values_name_the_key(key: str, value: Any, said: str) -> None:
    with pytest.raises(PedroError) as error:
        PedroConfig(**{key: value})
    assert key in str(error.value)
    assert said in str(error.value)
    with pytest.raises(AdapterError, match=r"^somewhere: "):
        PedroConfig.from_dict({"peft_type": "PEDRO", key: value}, source="somewhere")


def test_wrong_kind_and_unknown_keys() -> None:
    with pytest.raises(
        AdapterError, match=r"'PEDRO', found 'LORA'; vLLM serves it with --enable-lora"
    ):
        PedroConfig.from_dict({"peft_type": "LORA", "lora_alpha": 16})
    with pytest.raises(AdapterError, match="found no such key"):
        PedroConfig.from_dict({"r": 12})
    with pytest.raises(AdapterError, match=r"here: unknown keys 'alpha', 'poling'; known are"):
        PedroConfig.from_dict({"peft_type": "PEDRO", "poling": "mean", "alpha": 1}, "here")


def test_activation_list() -> None:
    config = PedroConfig(activation=["gelu", "rational"])
    assert [config.activation_of(0), config.activation_of(1)] == ["gelu", "rational"]
    with pytest.raises(PedroError, match="none for layer 2"):
        config.activation_of(2)
    with pytest.raises(PedroError, match="none for layer -1"):
        config.activation_of(-1)
    config.validate(2)
    with pytest.raises(PedroError, match="each of the 3 layers, found 2"):
        config.validate(3)
    PedroConfig(r=0, activation=["gelu", "rational"]).validate(3)  # static: without meaning
    assert PedroConfig(activation="relu").activation_of(1000) == "relu"


def test_callers_list_is_copied() -> None:
    modules = ["q_proj"]
    config = PedroConfig(target_modules=modules)
    modules.append("nonsense")
    assert config.target_modules == ["q_proj"]


def test_save_and_load(tmp_path: Path) -> None:
    config = PedroConfig(r=3, base_model_name_or_path="Modèle", input_norm="rms")
    config.save_pretrained(tmp_path / "a" / "b")
    assert PedroConfig.from_pretrained(tmp_path / "a" / "b") == config
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["adapter_config.json"]
    config.r = -1
    with pytest.raises(PedroError):
        config.save_pretrained(tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "invalid JSON"),
        (b"{", "invalid JSON"),
        (b"[]", "of type list"),
        (b"null", "of type NoneType"),
        (b'"PEDRO"', "of type str"),
        (b'{"peft_type": "PEDRO", "r": 1, "r": 2}', "duplicate keys 'r'"),
        (b'{"peft_type": "PEDRO", "r": NaN}', "NaN is not JSON"),
        (b'{"peft_type": "PEDRO", "r": -Infinity}', "-Infinity is not JSON"),
        (b'{"peft_type": "PEDRO", "pooling": "\xff"}', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b'{"peft_type": "PEDRO"}' + b" " * MAX_CONFIG_BYTES, "at most 1048576 bytes"),
    ],
)
def test_broken_files(tmp_path: Path, data: bytes, said: str) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_bytes(data)
    with pytest.raises(AdapterError) as error:
        PedroConfig.from_pretrained(tmp_path)
    assert said in str(error.value)
    assert str(file) in str(error.value)


def test_what_a_folder_says_it_is(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    assert peft_type_of(tmp_path) is None
    for data, kind in (
        (b'{"peft_type": "LORA", "r": 8}', "LORA"),
        (PedroConfig().to_json(), "PEDRO"),
        (b'{"peft_type": 1}', None),
        (b"[]", None),
        (b"[" * 100_000, None),
        (b" " * (MAX_CONFIG_BYTES + 1) + b'{"peft_type": "LORA"}', None),
    ):
        file.write_bytes(data)
        assert peft_type_of(tmp_path) == kind
    file.unlink()
    os.mkfifo(file)
    found: list[str | None] = ["it hangs"]
    thread = threading.Thread(target=lambda: found.append(peft_type_of(tmp_path)), daemon=True)
    thread.start()
    thread.join(10)
    assert found[-1] is None


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="found no such file"):
        PedroConfig.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(AdapterError, match="found a folder"):
        PedroConfig.from_pretrained(tmp_path)


def test_import_is_light() -> None:
    code = (
        "import sys, vllm_pedro.config; "
        "print([m for m in ('transformers', 'torch') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
