"""What the tests of commands share."""

from __future__ import annotations

from tiny_fixtures import dev_file, folder, one_thread, run, tiny_adapter, train_file

__all__ = ["dev_file", "folder", "one_thread", "run", "tiny_adapter", "train_file"]
