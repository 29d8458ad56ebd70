"""vLLM's own features on rows with an adapter: LoRA beside them, grammars, stops, logprobs."""

from __future__ import annotations

import pytest
from engines import write_lora
from runners import current_runner

from vllm_pedro import PedroRequest

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]


def params(**kwargs):
    from vllm import SamplingParams

    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": 8, "detokenize": False, "ignore_eos": True, **kwargs}
    )


def prompts(count, length=20):
    return [
        {"prompt_token_ids": [(31 * row + 7 * i * i + 3 * i) % 128 for i in range(length + row)]}
        for row in range(count)
    ]


def answers(outputs):
    return [
        [
            list(o.outputs[0].token_ids),
            [{t: e.logprob for t, e in step.items()} for step in o.outputs[0].logprobs],
        ]
        for o in outputs
    ]


def test_lora_rows_beside_pedro_rows(tiny_engine, tiny, tiny_oracle, write_adapter, tmp_path):
    """LoRA rows are as in an engine without PEDRO, PEDRO rows as without LoRA.

    max_loras is larger than the LoRAs in use: on the CPU vLLM's kernels give base rows the weights
    of the last LoRA slot if it is taken, with or without this package.
    """
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("lora", 1, str(write_lora(tiny, tmp_path / "lora")))
    adapter = write_adapter(tiny, seed=1, scale=0.2, down_scale=15.0)
    pedro = PedroRequest("pedro", 1, str(adapter))  # the same id as the LoRA, on purpose
    settings = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    asked = params(logprobs=3)
    with tiny_engine(pedro=False, **settings) as plain:
        rows = [lora, lora, None, lora, None, lora]
        expected = answers(plain.generate(prompts(6), asked, lora_request=rows, use_tqdm=False))
    with tiny_engine(**settings) as both:
        rows = [lora, pedro, None, lora, pedro, lora]
        outputs = both.generate(prompts(6), asked, lora_request=rows, use_tqdm=False)
    got = answers(outputs)
    for row in (0, 2, 3, 5):
        assert got[row] == expected[row]
    assert got[0] != got[1]
    for row in (1, 4):
        tiny_oracle.check(outputs[row], adapter)


def test_grammars_stops_and_logprobs_on_the_real_model(engine, smol, smol_oracle, write_adapter):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    adapter = write_adapter(smol, seed=4, scale=0.03)
    request = PedroRequest("a", 1, str(adapter))
    text = "Question: what colour is the sky? Answer:"
    choices = ["blue as ever", "green", "a shade of red"]
    length = 24 if current_runner() == "v1" else 10  # a step takes V2 long, in the interpreter
    asked = {
        "grammar": SamplingParams(
            temperature=0.0,
            max_tokens=12,
            structured_outputs=StructuredOutputsParams(choice=choices),
        ),
        "plain": SamplingParams(temperature=0.0, max_tokens=length, logprobs=2),
        "min_tokens": SamplingParams(
            temperature=0.0, max_tokens=length + 6, min_tokens=length - 2, logprobs=0
        ),
        "sampled": SamplingParams(temperature=0.8, seed=7, max_tokens=10, logprobs=0),
    }
    with engine(smol) as llm:
        outputs = dict(
            zip(
                asked,
                llm.generate(
                    [text] * len(asked),
                    list(asked.values()),
                    lora_request=request,
                    use_tqdm=False,
                ),
                strict=True,
            )
        )
        whole = outputs["plain"].outputs[0].text
        word = whole.split()[2]
        stopped = llm.generate(
            [text],
            SamplingParams(temperature=0.0, max_tokens=length, stop=[word]),
            lora_request=request,
            use_tqdm=False,
        )[0]
    for name, output in outputs.items():
        if name != "grammar":  # its log probabilities are those after the grammar's mask
            smol_oracle.check_sampled(output, adapter, 0)
    smol_oracle.check(outputs["plain"], adapter)
    assert outputs["grammar"].outputs[0].text in choices
    assert len(outputs["min_tokens"].outputs[0].token_ids) >= length - 2
    assert stopped.outputs[0].stop_reason == word
    assert whole.startswith(stopped.outputs[0].text)
    assert word not in stopped.outputs[0].text
