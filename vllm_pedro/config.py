"""`PedroConfig`, the contents of an adapter's `adapter_config.json`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from .architectures import MODULES
from .backbone import TARGET_MODULES as TARGET_MODULES
from .backbone import BackboneShape as BackboneShape
from .errors import AdapterError, PedroError
from .files import is_int, open_regular, parse_json_object, replace_file, shorten

CONFIG_NAME: Final = "adapter_config.json"
PEFT_TYPE: Final = "PEDRO"
TASK_TYPE: Final = "CAUSAL_LM"
POOLINGS: Final = ("last", "mean", "max")
"""How hidden states become one vector; the places are their codes in `ops.layout`."""
ACTIVATIONS: Final = ("rational", "gelu", "relu")
"""The generators' activations; their codes are in `ops.layout`."""
INPUT_NORMS: Final = (None, "rms")
"""What is done to hidden states before they are pooled."""
SCOPES: Final = ("sequence", "answer")
"""Which tokens are scaled: all, or the pooled one and those after it."""
MAX_RATIONAL_DEGREE: Final = 32
"""Highest degree of a rational activation's polynomials."""
MAX_CONFIG_BYTES: Final = 1 << 20
"""Longest config file that is read; a real one is below 1 KiB, or a few with many activations."""


def read_config_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a config file once, at most `MAX_CONFIG_BYTES` long."""
    expected = "a JSON file with the adapter's config"
    with open_regular(path, expected) as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterError(
            f"{path}: expected {expected} of at most {MAX_CONFIG_BYTES} bytes, found a longer one"
        )
    return data


def peft_type_of(folder: str | os.PathLike[str]) -> str | None:
    """What an adapter's folder says it is, "PEDRO" or "LORA"; None where it cannot be read."""
    path = os.path.join(os.path.expanduser(folder), CONFIG_NAME)
    try:
        content = json.loads(read_config_bytes(path))
    except (AdapterError, OSError, ValueError, RecursionError):
        return None
    kind = content.get("peft_type") if isinstance(content, dict) else None
    return kind if isinstance(kind, str) else None


class _Base:
    """A place for `peft.PeftConfig` among the bases, once PEFT is imported; see `vllm_pedro.peft`.

    Python lets no class change its bases that has none but `object`.
    """


@dataclass
class PedroConfig(_Base):
    """The contents of `adapter_config.json`.

    Attributes:
        peft_type: always "PEDRO".
        task_type: always "CAUSAL_LM".
        base_model_name_or_path: the backbone the adapter was made for; a note, not checked.
        r: inner width of the vector generators; 0 means static vectors, which are (IA)^3.
        target_modules: the scaled projections; their order is the order of the split of l.
        pooling: how the prompt's hidden states become one vector: "last", "mean" or "max".
        input_norm: None (the paper: raw hidden states) or "rms".
        down_bias: whether the generators have b_down, `g(p @ W_down + b_down)` (the paper: no).
            Without meaning when `r` is 0.
        scope: "sequence" (the paper: every token is scaled) or "answer": only the pooled token
            P - 1 and those after it, so that earlier ones are the plain backbone's and their KV
            cache is shared with everybody. "answer" needs the pooling "last".
        activation: "rational", "gelu" or "relu", or a list of these, one a layer. Without
            meaning when `r` is 0.
        rational_order: degrees (m, n) of the rational activation's numerator and denominator.
        inference_mode: True for an adapter that is not to be trained further.

    Raises:
        PedroError: a value of the wrong type or outside what is listed here.
    """

    peft_type: str = PEFT_TYPE
    task_type: str = TASK_TYPE
    base_model_name_or_path: str | None = None
    r: int = 12
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj", "up_proj"])
    pooling: str = "last"
    input_norm: str | None = None
    down_bias: bool = False
    scope: str = "sequence"
    activation: str | list[str] = "rational"
    rational_order: tuple[int, int] = (6, 5)
    inference_mode: bool = False

    def __post_init__(self) -> None:
        # JSON knows no tuples, and the caller's own lists must not change under the config.
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = list(self.target_modules)
        if isinstance(self.activation, (list, tuple)):
            self.activation = list(self.activation)
        if isinstance(self.rational_order, (list, tuple)):
            # Two entries or not is for validate to say.
            self.rational_order = cast(tuple[int, int], tuple(self.rational_order))
        self.validate()

    def validate(self, num_layers: int | None = None) -> None:
        """Check every field, and the length of a per-layer `activation` if `num_layers` is given.

        Raises:
            PedroError: names the field, what it may be and what it is.
        """

        def require(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise PedroError(f"{name}: expected {expected}, found {getattr(self, name)!r}")

        require(self.peft_type == PEFT_TYPE, "peft_type", repr(PEFT_TYPE))
        require(self.task_type == TASK_TYPE, "task_type", repr(TASK_TYPE))
        name = self.base_model_name_or_path
        require(name is None or isinstance(name, str), "base_model_name_or_path", "a string")
        require(is_int(self.r) and self.r >= 0, "r", "an int, 0 (static vectors) or more")
        require(isinstance(self.inference_mode, bool), "inference_mode", "true or false")
        require(isinstance(self.down_bias, bool), "down_bias", "true or false")

        modules = self.target_modules
        require(
            isinstance(modules, list)
            and len(modules) > 0
            and all(isinstance(entry, str) for entry in modules),
            "target_modules",
            f"a list with one or more of {list(MODULES)}",
        )
        unknown = [entry for entry in modules if entry not in MODULES]
        if unknown:
            raise PedroError(
                f"target_modules: unknown {shorten(unknown)}; allowed are {list(MODULES)}"
            )
        require(len(set(modules)) == len(modules), "target_modules", "no module twice")

        require(self.pooling in POOLINGS, "pooling", f"one of {list(POOLINGS)}")
        require(self.input_norm in INPUT_NORMS, "input_norm", f"one of {list(INPUT_NORMS)}")
        require(self.scope in SCOPES, "scope", f"one of {list(SCOPES)}")
        if self.scope == "answer" and self.pooling != "last":
            raise PedroError(
                f"scope: 'answer' needs the pooling 'last', found {self.pooling!r}: tokens before "
                "the last one of the prompt are computed without the adapter"
            )

        kinds = self.activation if isinstance(self.activation, list) else [self.activation]
        require(
            len(kinds) > 0 and all(isinstance(k, str) and k in ACTIVATIONS for k in kinds),
            "activation",
            f"one of {list(ACTIVATIONS)}, or a list of these, one a layer",
        )
        per_layer = self.r > 0 and isinstance(self.activation, list)
        if num_layers is not None and per_layer and len(kinds) != num_layers:
            raise PedroError(
                f"activation: expected one entry for each of the {num_layers} layers, "
                f"found {len(kinds)}"
            )

        order = self.rational_order
        require(
            isinstance(order, tuple)
            and len(order) == 2
            and all(is_int(degree) and 1 <= degree <= MAX_RATIONAL_DEGREE for degree in order),
            "rational_order",
            f"two ints (m, n) between 1 and {MAX_RATIONAL_DEGREE}",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = CONFIG_NAME) -> PedroConfig:
        """Build a config from a JSON object; keys left out take their defaults.

        Raises:
            AdapterError: unknown keys, a `peft_type` that is not "PEDRO", or an invalid value;
                the message begins with `source`.
        """
        if not isinstance(values, Mapping):
            raise AdapterError(f"{source}: expected an object, found {type(values).__name__}")
        # First, because the other keys of an adapter of another kind only distract from it.
        if values.get("peft_type") != PEFT_TYPE:
            found = repr(values["peft_type"]) if "peft_type" in values else "no such key"
            hint = "; vLLM serves it with --enable-lora" if found == "'LORA'" else ""
            raise AdapterError(f"{source}: peft_type: expected {PEFT_TYPE!r}, found {found}{hint}")
        known = [entry.name for entry in dataclasses.fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise AdapterError(f"{source}: unknown keys {shorten(unknown)}; known are {known}")
        try:
            return cls(**values)
        except PedroError as error:
            raise AdapterError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON types, in the order of the fields."""
        values = dataclasses.asdict(self)
        values["rational_order"] = list(self.rational_order)
        return values

    def to_json(self) -> bytes:
        """The bytes of `adapter_config.json`; the same config always gives the same bytes."""
        return (json.dumps(self.to_dict(), indent=2) + "\n").encode("ascii")

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> PedroConfig:
        """Read `adapter_config.json` from the folder `path`.

        Raises:
            AdapterError: the file is missing, too long, not a JSON object, or not valid.
        """
        file = os.path.join(path, CONFIG_NAME)
        return cls.from_dict(parse_json_object(read_config_bytes(file), file), source=file)

    def save_pretrained(self, path: str | os.PathLike[str], **how: Any) -> None:
        """Write `adapter_config.json` into the folder `path`, which is made if needed.

        Args:
            path: the folder.
            **how: what PEFT gives its own configs; without meaning here.
        """
        self.validate()
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / CONFIG_NAME, self.to_json())

    def activation_of(self, layer: int) -> str:
        """The activation of layer `layer`; without meaning when `r` is 0.

        Raises:
            PedroError: the config lists activations and has none for this layer.
        """
        if isinstance(self.activation, str):
            return self.activation
        if not 0 <= layer < len(self.activation):
            raise PedroError(
                f"activation: the list has {len(self.activation)} entries, none for layer {layer}"
            )
        return self.activation[layer]

    def num_parameters(self, shape: BackboneShape, paper: bool = False) -> int:
        """Parameters of one adapter on a backbone of this shape.

        Args:
            shape: the backbone.
            paper: count as the paper does, without biases and the activations' coefficients.
        """
        widths = [
            sum(shape.split_widths(self.target_modules, layer)) for layer in range(shape.num_layers)
        ]
        scaled = [layer for layer, width in enumerate(widths) if width]
        total = self.r * (len(scaled) * shape.hidden_size + sum(widths))
        if paper:
            return total
        total += sum(widths)
        if self.r > 0:
            m, n = self.rational_order
            kinds = [self.activation_of(layer) for layer in scaled]
            total += kinds.count("rational") * (m + 1 + n)
            total += len(scaled) * self.r * self.down_bias
        return total
