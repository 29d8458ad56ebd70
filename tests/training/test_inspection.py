"""What is shown of a trained adapter's vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_pedro.adapter import load_adapter
from vllm_pedro.generator import generate_vectors, pool_prompt
from vllm_pedro.training import inspection
from vllm_pedro.training.run import load_prompts


def test_vectors_of_prompts_are_the_generators(
    folder: Path, tiny_adapter: Path, dev_file: Path
) -> None:
    model, prompts = load_prompts(str(folder), str(tiny_adapter), str(dev_file), 4)
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
