"""The operators against their definitions and the reference, through whatever backend is there."""

import subprocess
import sys

import pytest
import torch

from vllm_pedro import ops
from vllm_pedro.config import ACTIVATIONS
from vllm_pedro.generator import generate_vectors as generate
from vllm_pedro.generator import pool_prompt
from vllm_pedro.ops import reference, samples
from vllm_pedro.ops.layout import read_record

REGISTERED = torch.ops.vllm_pedro


def test_the_backend_in_use_equals_the_reference():
    assert samples.check(ops) > 500


def test_the_reference_scales_by_definition():
    s = samples.scale_sample("some rows", samples.WIDTHS[1], torch.bfloat16)
    q, k, _v, _f = samples.WIDTHS[1]
    got = s.x.clone()
    reference.scale_columns_(got, s.vectors, s.token_rows, s.ranges["q, v"], s.counts)
    for t in range(len(got)):
        for j in range(got.shape[1]):
            by = 0.0 if q <= j < q + k else float(s.vectors[s.token_rows[t], j])
            want = torch.tensor(float(s.x[t, j]) * (1.0 + by)).bfloat16()  # exact, rounded once
            assert got[t, j] == want


def test_the_reference_makes_vectors_by_definition():
    g = samples.generate_sample(samples.SIZES[0], torch.float32)
    reference.generate_vectors(*g.args())
    without, kinds, biased = [], set(), 0
    for start, length, row, place in g.prefills[:7].tolist():
        record = read_record(g.arena, place, samples.LAYER)
        want = torch.zeros_like(g.vectors[row])
        if record is None:
            without.append(row)
        else:
            pooled = pool_prompt(
                g.hidden[start : start + length], record.pooling, record.input_norm
            )
            is_static = not len(record.down)
            kinds |= set() if is_static else {record.activation}
            biased += bool(record.down_bias.any())
            made = generate(
                pooled,
                None if is_static else record.down,
                None if is_static else record.up.t(),
                record.bias,
                record.activation,
                record.numerator,
                record.denominator,
                record.down_bias,
            )
            at = 0
            for column, width in record.ranges:
                want[column : column + width] = made[at : at + width] - 1
                at += width
        torch.testing.assert_close(g.vectors[row], want)
    assert len(without) == 1
    assert kinds == set(ACTIVATIONS)
    assert biased == 2


def test_each_vector_of_a_static_adapter_is_its_bias_less_one():
    """Widened from the adapter's dtype, and 0 where the adapter has no columns."""
    g = samples.generate_sample(samples.SIZES[0], torch.float32)
    ops.generate_vectors(*g.args())
    static = 0
    for _, _, row, place in g.prefills[:7].tolist():
        record = read_record(g.arena, place, samples.LAYER)
        if record is None or len(record.down):
            continue
        static += 1
        want, at = torch.zeros_like(g.vectors[row]), 0
        for column, width in record.ranges:
            want[column : column + width] = record.bias[at : at + width].float() - 1
            at += width
        assert torch.equal(g.vectors[row], want)
    assert static == 2


def test_rows_without_an_adapter_are_not_read():
    for dtype in samples.DTYPES:
        s = samples.scale_sample("some rows", samples.WIDTHS[0], dtype)
        base = s.token_rows[: len(s.x)] == 0
        s.x[base] = torch.nan
        s.vectors[0] = 7.0  # would show if the identity row were read
        kept = s.x.clone()
        ops.scale_columns_(s.x, s.vectors, s.token_rows, s.ranges["all"], s.counts)
        if ops.backends.cpu.startswith("native"):
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(s.x[base].view(bits), kept[base].view(bits))
        assert bool(s.x[~base].isfinite().all())


@pytest.mark.parametrize("dtype", samples.DTYPES, ids=str)
def test_scaling_rounds_as_torch_does(dtype):
    """Also where it overflows, underflows or is no number."""
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-7, 6e4, -3e38, 1e-39, 2.5]
    x = torch.tensor(special, dtype=torch.float32).to(dtype)
    a, b = (m.reshape(1, -1) for m in torch.meshgrid(x, x, indexing="ij"))
    a, want = a.clone(), (a.float() * (1 + b.float())).to(dtype)
    vectors = torch.cat((torch.zeros_like(b), b))
    step = torch.tensor([0, 1, 0], dtype=torch.int32)
    ops.scale_columns_(a, vectors, torch.tensor([1]), (0, 0, a.shape[1]), step)
    assert torch.equal(a.isnan(), want.isnan())
    assert torch.equal(a.nan_to_num(), want.nan_to_num())


def test_steps_with_nothing_to_do_touch_nothing():
    s = samples.scale_sample("all rows", samples.WIDTHS[0], torch.float32)
    none = torch.zeros(3, dtype=torch.int32)
    before = s.x.clone()
    ops.scale_columns_(s.x, s.vectors, s.token_rows, s.ranges["all"], none)
    assert torch.equal(s.x, before)
    g = samples.generate_sample(samples.SIZES[0], torch.float32)
    kept = g.vectors.clone()
    ops.generate_vectors(*g.args()[:5], none)
    assert torch.equal(g.vectors, kept)


@pytest.mark.parametrize("dtype", samples.DTYPES, ids=str)
@pytest.mark.parametrize("size", samples.SIZES, ids=str)
def test_the_warm_up_is_a_call_like_serving_s(size, dtype):
    d, width, _ = size
    ops.warm_up(d, width, dtype, "cpu")


@pytest.mark.skipif(not ops.backends.cpu.startswith("native"), reason="the reference is trusted")
def test_bad_arguments_are_refused():
    s = samples.scale_sample("all rows", samples.WIDTHS[0], torch.float32)
    with pytest.raises(RuntimeError, match="lie outside of the projection"):
        ops.scale_columns_(s.x, s.vectors, s.token_rows, (100, 0, 64), s.counts)
    with pytest.raises(RuntimeError, match="in the dtype of the projection"):
        ops.scale_columns_(s.x, s.vectors.half(), s.token_rows, (0, 0, 8), s.counts)
    with pytest.raises(RuntimeError, match="an entry for each token"):
        ops.scale_columns_(s.x, s.vectors, s.token_rows[:4], (0, 0, 8), s.counts)
    g = samples.generate_sample(samples.SIZES[0], torch.float32)
    g.prefills[0, 2] = 0  # the identity row
    with pytest.raises(RuntimeError, match="prompt 0 lies outside"):
        ops.generate_vectors(*g.args())


@pytest.mark.skipif(not ops.backends.cpu.startswith("native"), reason="the reference is trusted")
@pytest.mark.parametrize(
    "what",
    [
        "place outside",
        "no blob",
        "cut off",
        "layer",
        "hidden size",
        "rank",
        "width",
        "records",
        "up",
    ],
)
def test_what_is_no_blob_in_the_arena_is_refused(what):
    g = samples.generate_sample(samples.SIZES[0], torch.float32)
    place, arena = int(g.prefills[0, 3]), g.arena
    blob = arena[16 * place :].view(torch.int32)
    record = blob[4 * int(blob[8 + samples.LAYER]) :]
    if what == "place outside":
        g.prefills[0, 3] = len(arena) // 16
    elif what == "no blob":
        g.prefills[0, 3] += 1
    elif what == "cut off":
        arena = arena[: 16 * place + 400].clone()
    elif what == "layer":
        g.layer[0] = 2
    elif what == "hidden size":
        record[7] += 1
    elif what == "rank":
        g.counts[2] = 1
    elif what == "width":
        record[17] += 1
    elif what == "records":
        blob[8 + samples.LAYER] = blob[2]
    else:
        record[13] = blob[2]
    g.prefills[1:] = 0
    g.counts[0] = 1
    with pytest.raises(RuntimeError, match="the arena has no generator of layer"):
        ops.generate_vectors(g.hidden, g.vectors, arena, *g.args()[3:])


def test_opcheck():
    g = samples.generate_sample(samples.SIZES[1], torch.bfloat16)
    torch.library.opcheck(REGISTERED.generate_vectors.default, g.args())
    s = samples.scale_sample("some rows", samples.WIDTHS[1], torch.bfloat16)
    common = (s.vectors, s.token_rows)
    torch.library.opcheck(
        REGISTERED.scale_columns_.default, (s.x, *common, list(s.ranges["q, v"]), s.counts)
    )


@pytest.mark.parametrize("dtype", samples.DTYPES, ids=str)
def test_the_form_for_compilers_equals_the_operator(dtype):
    s = samples.scale_sample("some rows", samples.WIDTHS[2], dtype)
    compiled = torch.compile(ops.scaled, backend="aot_eager", fullgraph=True)
    width = s.x.shape[1]
    want = s.x.clone()
    ops.scale_columns_(want, s.vectors, s.token_rows, (0, 0, width), s.counts)
    assert torch.equal(compiled(s.x, s.vectors, s.token_rows, slice(0, width)), want)


def test_a_compiled_graph_changes_the_store_before_it_reads_it():
    g = samples.generate_sample(samples.SIZES[1], torch.float32)

    def step(hidden, vectors, *others):
        ops.generate_vectors(hidden, vectors, *others)
        return vectors[1] * 2

    want = g.vectors.clone()
    reference.generate_vectors(g.hidden, want, *g.args()[2:])
    out = torch.compile(step, backend="inductor", fullgraph=True)(*g.args())
    torch.testing.assert_close(out, want[1] * 2)
    torch.testing.assert_close(g.vectors, want)


WITHOUT_LIBRARY = """
import pathlib
from vllm_pedro.ops import samples
import vllm_pedro.ops.library as library
from vllm_pedro import ops
assert ops.backends.cpu == "reference (plain PyTorch)", ops.backends
assert ops.backends.note == "_C.so is missing", ops.backends
print(samples.check(ops))
"""


def test_without_the_native_library_the_package_works(tmp_path):
    """A copy of the package without the library, as an installation without a compiler is."""
    import shutil
    from pathlib import Path

    import vllm_pedro

    source = Path(vllm_pedro.__file__).parent
    skip = shutil.ignore_patterns("*.so", "demo_adapters", "__pycache__")
    shutil.copytree(source, tmp_path / "vllm_pedro", ignore=skip)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 500
