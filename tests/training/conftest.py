"""What the tests of training share."""

from __future__ import annotations

from tiny_fixtures import dev_file, folder, one_thread, tiny_adapter, train_file

__all__ = ["dev_file", "folder", "one_thread", "tiny_adapter", "train_file"]
