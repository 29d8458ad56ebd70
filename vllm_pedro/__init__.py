"""PEDRO adapters: prompt-dependent scaling vectors, trained with transformers, served by vLLM."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .integration.import_hook import when_imported

if TYPE_CHECKING:
    from .adapter import Adapter as Adapter
    from .adapter import load_adapter as load_adapter
    from .adapter import save_adapter as save_adapter
    from .backbone import BackboneShape as BackboneShape
    from .config import PedroConfig as PedroConfig
    from .errors import AdapterError as AdapterError
    from .errors import PedroError as PedroError
    from .generator import VectorGenerator as VectorGenerator
    from .integration.request import PedroRequest as PedroRequest
    from .model import PedroModel as PedroModel
    from .model import get_pedro_model as get_pedro_model

__version__ = "0.1.0"

_EXPORTS = {
    "Adapter": ".adapter",
    "AdapterError": ".errors",
    "BackboneShape": ".backbone",
    "PedroConfig": ".config",
    "PedroError": ".errors",
    "PedroModel": ".model",
    "PedroRequest": ".integration.request",
    "VectorGenerator": ".generator",
    "get_pedro_model": ".model",
    "load_adapter": ".adapter",
    "save_adapter": ".adapter",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    """Import public names on first use: neither torch, transformers nor vLLM is loaded before."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_EXPORTS[name], __name__)
    except ModuleNotFoundError as error:
        if error.name == "vllm":
            raise ImportError(
                f"vllm_pedro.{name} needs vLLM: pip install 'vllm-pedro[cuda]' on NVIDIA, "
                "'vllm-pedro[cpu]' elsewhere"
            ) from error
        raise
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


# vLLM reads the keywords of LLM(enable_pedro=True) before it loads plugins, so it has to know them
# as soon as both packages are imported, in whichever order.
def _teach_keywords() -> None:
    importlib.import_module(".integration.plugin", __name__).teach_keywords()


def _register_method() -> None:
    importlib.import_module(".peft", __name__).register()


when_imported("vllm.engine.arg_utils", _teach_keywords)
when_imported("peft", _register_method)
