"""Which entry of an adapter's vectors each column of the store holds, and what is packed by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_pedro.adapter import load_adapter, read_adapter
from vllm_pedro.architectures import TARGET_MODULES
from vllm_pedro.backbone import BackboneShape
from vllm_pedro.ops.layout import MAX_RANGES, UNIT, read_record
from vllm_pedro.places import (
    codes_of,
    entries_of,
    grouped,
    modules_of,
    packed,
    permuted,
)
from vllm_pedro.serving.blobs import blob_bytes, blob_layout, pack
from vllm_pedro.serving.columns import StoreColumns

LAYERS = [
    dict(zip(TARGET_MODULES, widths, strict=True))
    for widths in ((24, 12, 12, 8, 8), (24, 12, 12, 0, 0), (0,) * 5, (24, 12, 12, 0, 16), (24,) * 5)
]
SHAPE = BackboneShape.of_layers(8, LAYERS, is_grouped=True)

WHOLE = packed(LAYERS[0])
STORES = {
    "as vLLM packs them": [packed({m: w for m, w in layer.items() if w}) if any(layer.values())
                           else np.zeros(0, np.int64) for layer in LAYERS],
    "a rank's share": [WHOLE[12:24], WHOLE[30:40], WHOLE[:0], codes_of("up_proj", range(8, 16)),
                       WHOLE[:0]],
    "by head": [grouped(48, 12, 6), grouped(48, 12, 6), WHOLE[:0], WHOLE[:0], grouped(72, 6, 6)],
    "permuted": [permuted(codes_of("q_proj", range(24)), 2), WHOLE[24:48], WHOLE[:0],
                 permuted(codes_of("k_proj", range(12)), 3), WHOLE[:0]],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [0, 3])
@pytest.mark.parametrize("modules", [("v_proj", "q_proj", "up_proj"), ("gate_proj",)], ids=str)
@pytest.mark.parametrize("name", STORES)
def test_a_blob_has_what_each_column_needs(name, modules, r, dtype, tmp_path):
    from banks import write

    config = {"r": r, "target_modules": list(modules)}
    write(tmp_path, shape=SHAPE, dtype=dtype, **config)
    adapter, stored = load_adapter(tmp_path, SHAPE), read_adapter(tmp_path, SHAPE)
    columns = StoreColumns(SHAPE, STORES[name])
    layout = blob_layout(adapter.config, stored.dtype, columns)
    assert layout.nbytes <= blob_bytes(adapter.config, stored.dtype, SHAPE)
    arena = np.full(layout.nbytes + 2 * UNIT, 0xFF, np.uint8)
    blob = arena[UNIT : UNIT + layout.nbytes]
    pack(stored, columns, blob)
    for layer, codes in enumerate(columns.layers):
        record = read_record(torch.from_numpy(arena), 1, layer)
        tensors = adapter.layer(layer)
        widths = SHAPE.split_widths(modules, layer)
        own = {}
        for module, begin in zip(modules, np.cumsum([0, *widths]).tolist(), strict=False):
            own[TARGET_MODULES.index(module)] = begin
        found = {}
        if record is not None:
            assert len(record.ranges) <= MAX_RANGES
            at = [
                column for start, width in record.ranges for column in range(start, start + width)
            ]
            found = {column: (record.bias[i], record.up[:, i]) for i, column in enumerate(at)}
            if r:
                assert torch.equal(record.down.float(), tensors.down)
        for column, (number, entry) in enumerate(
            zip(modules_of(codes).tolist(), entries_of(codes).tolist(), strict=True)
        ):
            if number in own:
                bias, up = found[column]
                row = own[number] + entry
                assert bias == tensors.bias[row]
                assert r == 0 or torch.equal(up.float(), tensors.up[row])
            elif column in found:
                bias, up = found[column]
                assert bias == 1
                assert not up.any()
    assert (arena[:UNIT] == 0xFF).all()
    assert (arena[-UNIT:] == 0xFF).all()


def test_layers_without_columns_take_no_room():
    columns = StoreColumns(SHAPE, STORES["a rank's share"])
    assert columns.ranges(["gate_proj"]) == ((), (), (), (), ())
    assert columns.widths() == [12, 10, 0, 8, 0]
    with pytest.raises(ValueError, match="codes of 1 layers for 5"):
        StoreColumns(SHAPE, [WHOLE])
