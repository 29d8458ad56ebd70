"""What is shown of a trained adapter's vectors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from vllm_pedro.adapter import load_adapter
from vllm_pedro.generator import generate_vectors, pool_prompt
from vllm_pedro.training import inspection
from vllm_pedro.training.data import Example
from vllm_pedro.training.inspection import PromptUse
from vllm_pedro.training.run import load_rows


def test_vectors_of_prompts_are_the_generators(
    folder: Path, tiny_adapter: Path, dev_file: Path
) -> None:
    model, rows = load_rows(str(folder), str(tiny_adapter), str(dev_file), 4)
    prompts = [row.prompt for row in rows]
    found = inspection.vectors_of_prompts(model, prompts)
    # Layer 0 reads the embeddings, so its vectors can be made without the rest of the model.
    embeddings = model.base_model.get_input_embeddings()
    layer = load_adapter(tiny_adapter).layer(0)
    for row, prompt in enumerate(prompts):
        hidden = embeddings(torch.tensor(prompt))
        pooled = pool_prompt(hidden, "last", "rms")
        with torch.no_grad():
            want = generate_vectors(
                pooled, *layer[:3], "rational", layer.numerator, layer.denominator
            )
        assert torch.allclose(torch.cat([v[row] for v in found[0].values()]), want, atol=1e-6)


def test_spread_tells_static_vectors_from_others() -> None:
    row = torch.tensor([1.3, 0.7])
    static = inspection.spread_over_prompts([{"q_proj": row.repeat(3, 1)}])
    assert static[0].spread == 0.0
    assert static[0].deviation == pytest.approx(0.3)
    assert "collapsed to static vectors" in inspection.describe_spread(static, 3)
    moving = inspection.spread_over_prompts([{"q_proj": torch.tensor([[1.3, 1.0], [0.7, 1.0]])}])
    assert moving[0].prompt_share == pytest.approx(1.0)
    assert "makes 100.0%" in inspection.describe_spread(moving, 2)
    fresh = inspection.spread_over_prompts([{"q_proj": torch.ones(2, 2)}])
    assert "changes nothing" in inspection.describe_spread(fresh, 2)


def test_row_losses_are_those_of_the_model_with_the_vectors_that_it_is_given(
    folder: Path, tiny_adapter: Path, dev_file: Path
) -> None:
    model, rows = load_rows(str(folder), str(tiny_adapter), str(dev_file), 6)
    rows[1] = dataclasses.replace(rows[1], pooled=2)
    vectors = inspection.vectors_of_prompts(model, [r.prompt[: r.prompt_length] for r in rows])

    def loss(row: Example) -> float:
        ids = torch.tensor([row.prompt + row.completion])
        labels = torch.tensor([[-100] * len(row.prompt) + row.completion])
        with torch.no_grad():
            output = model(ids, labels=labels, prompt_lengths=[row.prompt_length])
        return float(output.loss)

    own = inspection.row_losses(model, rows, vectors)
    assert own.tolist() == pytest.approx([loss(row) for row in rows], rel=1e-5)
    ones = [{name: torch.ones_like(v) for name, v in layer.items()} for layer in vectors]
    plain = inspection.row_losses(model, rows, ones)
    with model.disable_adapter():
        assert plain.tolist() == pytest.approx([loss(row) for row in rows], rel=1e-5)
    # Of another prompt: as if that prompt had been pooled, whatever lower layers made of this one.
    use = inspection.prompt_use(model, rows, vectors)
    assert use.rows == 6
    assert use.loss == pytest.approx(float(own.mean()))
    assert use.share == pytest.approx(
        inspection.prompt_share(inspection.spread_over_prompts(vectors))
    )
    assert abs(use.loss_swapped - use.loss) > 1e-3
    assert use.loss_mean not in (use.loss, use.loss_swapped)


def test_static_vectors_are_told_from_those_that_the_task_needs(
    folder: Path, tiny_adapter: Path, dev_file: Path
) -> None:
    model, rows = load_rows(str(folder), str(tiny_adapter), str(dev_file), 8)
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if name.endswith("up_proj.weight"):
                tensor.zero_()
    vectors = inspection.vectors_of_prompts(model, [row.prompt for row in rows])
    use = inspection.prompt_use(model, rows, vectors)
    assert use.loss_swapped == use.loss == pytest.approx(use.loss_mean)
    assert not use.matters
    assert "(IA)3" in inspection.describe_use(use)
    # Twice the standard error, over the rows.
    assert use_of(1.5, 0.2).matters
    assert not use_of(1.3, 0.2).matters
    assert "the prompt makes 30.0%" in inspection.describe_use(use_of(1.5, 0.2))
    assert inspection.describe_use(use_of(1.5, 0.2)).endswith("the prompt matters")
    assert "the prompt hardly matters" in inspection.describe_use(use_of(1.3, 0.2))
    # Sure, but of no use.
    assert not use_of(1.005, 0.001).matters


def use_of(swapped: float, error: float) -> PromptUse:
    return PromptUse(8, 0.3, 1.0, swapped, 1.2, error)
