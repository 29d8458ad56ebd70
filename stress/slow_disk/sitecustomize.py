"""On `PYTHONPATH`: a disk that is slow for adapters' weights, in each process of a server.

The file that `SLOW_DISK` names says how many seconds each is late. Those below a folder called
`hangs` are never there, those below `hangs-later` once: for who reads them again they never are.
Workers on a CPU get the two tiers of memory that adapters have on a GPU. `READ_SECONDS`, if set, is
what reading an adapter may take.
"""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from vllm_pedro.integration.import_hook import when_imported

_open = os.open


def _late_open(path: Any, *args: Any, **kwargs: Any) -> int:
    if isinstance(path, str) and path.endswith("adapter_model.safetensors"):
        folder = Path(path).parent
        mark = folder / "was-read"
        if folder.name == "hangs" or (folder.name == "hangs-later" and mark.exists()):
            time.sleep(1e6)
        if folder.name == "hangs-later":
            mark.touch()
        with contextlib.suppress(OSError):
            time.sleep(float(Path(os.environ["SLOW_DISK"]).read_text()))
    return _open(path, *args, **kwargs)


def _make_two_tiers() -> None:
    from vllm_pedro.serving.adapters import AdapterBank, HostCache

    make = AdapterBank.__init__

    def __init__(
        self: Any,
        nbytes: int,
        reader: Any,
        device: Any,
        host: Any = None,
        max_adapters: int | None = None,
    ) -> None:
        assert host is None
        assert max_adapters is not None
        host = HostCache(max_adapters, reader)
        host.loader.limit = float(os.environ.get("READ_SECONDS", host.loader.limit))
        make(self, nbytes, reader, device, host)

    AdapterBank.__init__ = __init__  # type: ignore[method-assign]


def _set_patience() -> None:
    from vllm_pedro.integration.frontend import registry

    registry.READ_SECONDS = float(os.environ.get("READ_SECONDS", registry.READ_SECONDS))


if "SLOW_DISK" in os.environ:
    os.open = _late_open
    when_imported("vllm_pedro.serving.adapters", _make_two_tiers)
    when_imported("vllm_pedro.integration.frontend.registry", _set_patience)
