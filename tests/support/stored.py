"""Adapters in the form that workers keep them, for tests that make theirs in memory."""

from tempfile import TemporaryDirectory

from vllm_pedro.adapter import Adapter, StoredAdapter, read_adapter, save_adapter


def stored(adapter: Adapter) -> StoredAdapter:
    """The adapter as it is read from a folder, which is gone by then."""
    with TemporaryDirectory() as folder:
        save_adapter(folder, adapter.config, adapter.tensors)
        return read_adapter(folder)
