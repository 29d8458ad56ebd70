"""The page on reinforcement learning: its code trains, and both sides agree on what was sampled."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "grpo.md"

pytestmark = pytest.mark.engine


def test_the_engine_and_the_trainer_have_one_policy(tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    pytest.importorskip("trl")
    from engines import start_engine
    from tiny_task import make_folder

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.chdir(tmp_path)
    model = make_folder(tmp_path / "model")
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    block, count = re.subn(r"\nllm = LLM\(.*?\n\)\n", "\n", block, flags=re.DOTALL)
    assert count == 1
    block = block.replace("max_steps=20", "max_steps=5").replace(
        'text.count("e") / max(1, len(text))', "sum(map(str.isalpha, text)) / 16"
    )
    before, after = block.split("trainer.train()\n")
    with start_engine(model, max_model_len=128, logprobs_mode="processed_logprobs") as llm:
        names = {"MODEL": str(model), "llm": llm}
        exec(compile(before, str(PAGE), "exec"), names)
        trainer, sampled, errors = names["trainer"], [], []
        rollout, score = trainer.rollout_func, trainer._generate_and_score_completions

        def watched_rollout(prompts, trainer):
            output = rollout(prompts, trainer)
            sampled.append(output["logprobs"])
            return output

        def watched_score(inputs):
            """What the trainer gives the tokens, with the weights that the engine had."""
            found = score(inputs)
            ids = torch.cat([found["prompt_ids"], found["completion_ids"]], 1)
            mask = torch.cat([found["prompt_mask"], found["completion_mask"]], 1)
            width = found["completion_ids"].shape[1]
            with torch.no_grad():
                ours, *_ = trainer._get_per_token_logps_and_entropies(
                    trainer.model, ids, mask, width
                )
            for row, theirs in zip(ours, sampled[-1], strict=True):
                errors.append((row[: len(theirs)] - torch.tensor(theirs)).abs().max().item())
            return found

        trainer.rollout_func = watched_rollout
        trainer._generate_and_score_completions = watched_score
        first = {name: t.clone() for name, t in trainer.model.adapter_tensors().items()}
        trainer.train()
        exec(compile(after, str(PAGE), "exec"), names)
    assert len(sampled) == 5
    # Of about 5.2, in float32.
    assert max(errors) < 5e-6
    moved = [
        (tensor - first[name]).abs().max()
        for name, tensor in names["model"].adapter_tensors().items()
    ]
    assert max(moved) > 0.001
    assert (tmp_path / "my-policy" / "adapter_model.safetensors").is_file()
