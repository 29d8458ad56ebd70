"""The table of names while adapters are loaded."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from vllm_pedro.integration.frontend.models import NameLocks, PedroServingModelsMixin
from vllm_pedro.integration.request import ServedPedroRequest


class Table:
    """vLLM's part."""

    async def _check_load_lora_adapter_request(self, request):
        return None

    async def _check_unload_lora_adapter_request(self, request):
        return None


class Models(PedroServingModelsMixin, Table):
    """A table before an engine that answers when it is let."""

    def __init__(self):
        self.gate, self.heard = asyncio.Event(), []
        config = SimpleNamespace(lora_config=None)
        self.engine_client = SimpleNamespace(
            vllm_config=config,
            collective_rpc=self._hear,
            engine_core=SimpleNamespace(
                call_utility_all_async=self._hear_all, engine_ranks_managed=[]
            ),
        )
        config.parallel_config = SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1)
        self.lora_requests, self.lora_resolver_lock = {}, NameLocks()
        self.pedro_root, self._pedro_starting, self._pedro_metrics = None, False, None
        self._pedro_registry = SimpleNamespace(forget=lambda path: None)

    async def _hear(self, method, args):
        await self.gate.wait()
        self.heard.append((method, *args))

    async def _hear_all(self, *call):
        await self.gate.wait()
        self.heard.append(call)
        return []

    async def _pedro_read(self, name, folder, base_model_name=None):
        return ServedPedroRequest(name, 1, folder, digest=folder)


def test_a_load_whose_client_goes_away_is_done(tmp_path):
    """Else the name would stand for what no engine was told of."""

    async def run():
        models = Models()
        first, second = tmp_path / "first", tmp_path / "second"
        first.mkdir()
        second.mkdir()

        def load(folder):
            request = SimpleNamespace(lora_name="name", lora_path=str(folder))
            return asyncio.ensure_future(models.load_lora_adapter(request))

        asked = load(first)
        while "name" not in models.lora_requests:
            await asyncio.sleep(0.001)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        # Another load of the name has to wait for it, or the engines might hear the second first.
        later = load(second)
        await asyncio.sleep(0.05)
        assert models.lora_requests["name"].digest == str(first)
        assert models.heard == []
        models.gate.set()
        await later
        assert models.lora_requests["name"].digest == str(second)
        assert [call[:2] for call in models.heard if call[0] == "pedro_restore"] == [
            ("pedro_restore", str(first)),
            ("pedro_restore", str(second)),
        ]
        gone = asyncio.ensure_future(models.unload_lora_adapter(SimpleNamespace(lora_name="name")))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0.05)
        assert models.lora_requests == {}
        assert models.heard[-1][-2] == (str(second),)

    asyncio.run(run())
