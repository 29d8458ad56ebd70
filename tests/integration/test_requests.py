"""What users pass, and what they are told when it cannot be served."""

from __future__ import annotations

import shutil

import pytest
import torch
from engines import write_lora
from runners import current_runner
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from vllm_pedro import PedroRequest

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]


def greedy(**kwargs):
    from vllm import SamplingParams

    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": 6, "detokenize": False, "ignore_eos": True, **kwargs}
    )


def prompt(length=12, seed=0):
    return {"prompt_token_ids": [(seed * 31 + 7 * i * i + 3 * i) % 128 for i in range(length)]}


def tokens_of(outputs):
    return [list(o.outputs[0].token_ids) for o in outputs]


@pytest.fixture(scope="module")
def llm(tiny_engine):
    with tiny_engine(max_num_batched_tokens=96, max_pedro_rank=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def adapter(tiny, write_adapter):
    return write_adapter(tiny, seed=1)


@pytest.fixture(scope="module")
def expected(llm, adapter):
    """What the healthy adapter answers; asked again after each failure."""
    request = PedroRequest("good", 1, str(adapter))
    return tokens_of(llm.generate([prompt()], greedy(), lora_request=request, use_tqdm=False))


def still_serving(llm, adapter, expected):
    request = PedroRequest("good", 1, str(adapter))
    assert not llm.llm_engine.has_unfinished_requests()
    assert (
        tokens_of(llm.generate([prompt()], greedy(), lora_request=request, use_tqdm=False))
        == expected
    )


def test_one_request_serves_all_prompts_and_a_list_serves_each_its_own(llm, adapter, tiny_oracle):
    one = PedroRequest("good", 1, str(adapter))
    for requests in (one, [one, None, one]):
        outputs = llm.generate(
            [prompt(seed=s) for s in range(3)], greedy(), lora_request=requests, use_tqdm=False
        )
        listed = requests if isinstance(requests, list) else [requests] * 3
        for output, request in zip(outputs, listed, strict=True):
            tiny_oracle.check(output, None if request is None else adapter)
            assert output.lora_request == request


def test_adapter_changes_the_answer(llm, expected):
    assert tokens_of(llm.generate([prompt()], greedy(), use_tqdm=False)) != expected


def test_a_plain_lora_request_for_a_pedro_folder_is_understood(llm, adapter, expected):
    request = LoRARequest("good", 1, str(adapter))
    assert (
        tokens_of(llm.generate([prompt()], greedy(), lora_request=request, use_tqdm=False))
        == expected
    )


def test_a_lora_folder_is_not_taken_for_pedros(llm, adapter, expected, tiny, tmp_path):
    folder = write_lora(tiny, tmp_path / "lora")
    request = PedroRequest("lora", 2, str(folder))
    with pytest.raises(VLLMValidationError, match=r"found 'LORA'; .*--enable-lora"):
        llm.generate([prompt()], greedy(), lora_request=request, use_tqdm=False)
    still_serving(llm, adapter, expected)


def test_content_counts_not_names(llm, adapter, expected, write_adapter, tiny, tiny_oracle):
    other = write_adapter(tiny, seed=9)
    same_name = PedroRequest("good", 1, str(other))
    outputs = llm.generate([prompt()], greedy(), lora_request=same_name, use_tqdm=False)
    tiny_oracle.check(outputs[0], other)
    still_serving(llm, adapter, expected)


def test_folder_changed_in_place_takes_effect(llm, tiny, write_adapter, tmp_path):
    folder = tmp_path / "changing"
    answers = []
    for seed in (20, 21, 20):
        write_adapter(tiny, folder=folder, seed=seed, scale=0.2)
        request = PedroRequest("changing", 7, str(folder))
        answers += tokens_of(
            llm.generate([prompt(40)], greedy(), lora_request=request, use_tqdm=False)
        )
    assert answers[0] == answers[2] != answers[1]


BAD = {
    "missing folder": (lambda f: shutil.rmtree(f), "expected an adapter folder"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no such file"),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-9]
        ),
        "truncated",
    ),
    "config is not JSON": (
        lambda f: (f / "adapter_config.json").write_text("{"), "expected a JSON object"
    ),
    "unknown key": (
        lambda f: (f / "adapter_config.json").write_text(
            (f / "adapter_config.json").read_text().replace("{", '{"bogus": 1,', 1)
        ),
        "bogus",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_broken_folder_fails_its_call_only(
    name, llm, adapter, expected, tiny, write_adapter, tmp_path
):
    folder = tmp_path / "bad"
    write_adapter(tiny, folder=folder, seed=3)
    breakage, message = BAD[name]
    breakage(folder)
    rows = [PedroRequest("good", 1, str(adapter)), PedroRequest("bad", 2, str(folder))]
    with pytest.raises(ValueError, match=message):
        llm.generate([prompt(), prompt()], greedy(), lora_request=rows, use_tqdm=False)
    still_serving(llm, adapter, expected)


def test_adapter_of_another_backbone(llm, adapter, expected, smol, write_adapter):
    request = PedroRequest("smol", 2, str(write_adapter(smol)))
    with pytest.raises(VLLMValidationError, match="another backbone"):
        llm.generate([prompt()], greedy(), lora_request=request, use_tqdm=False)
    still_serving(llm, adapter, expected)


def test_rank_above_the_limit_names_the_option(llm, adapter, expected, tiny, write_adapter):
    request = PedroRequest("wide", 2, str(write_adapter(tiny, r=9)))
    with pytest.raises(VLLMValidationError, match=r"max_pedro_rank=9"):
        llm.generate([prompt()], greedy(), lora_request=request, use_tqdm=False)
    still_serving(llm, adapter, expected)


@pytest.mark.parametrize(
    ("length", "prompt_length", "message"),
    [
        (97, None, r"97 tokens is longer than the 96 .*max_num_batched_tokens of at least 97"),
        (200, 97, r"97 tokens is longer than the 96"),
        (10, 11, r"prompt_length is 11, but the prompt has only 10 tokens"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused_at_once(
    llm, adapter, expected, length, prompt_length, message
):
    request = PedroRequest("good", 1, str(adapter), prompt_length=prompt_length)
    with pytest.raises(VLLMValidationError, match=message):
        llm.generate([prompt(length)], greedy(), lora_request=request, use_tqdm=False)
    still_serving(llm, adapter, expected)


def test_the_longest_prompt_is_served(llm, adapter, tiny_oracle):
    rows = [PedroRequest("good", 1, str(adapter)), None, PedroRequest("good", 1, str(adapter))]
    outputs = llm.generate(
        [prompt(96), prompt(200, 1), prompt(96, 2)], greedy(), lora_request=rows, use_tqdm=False
    )
    for output, request in zip(outputs, rows, strict=True):
        tiny_oracle.check(output, request and adapter)


@pytest.mark.parametrize("length", [0, -1, True, 1.5, "3"])
def test_prompt_length_is_checked(length):
    with pytest.raises(ValueError, match="prompt_length must be an integer of at least 1"):
        PedroRequest("x", 1, "/nowhere", prompt_length=length)


def test_the_reserved_channel_cannot_be_forged(llm, adapter, expected):
    params = greedy(extra_args={"vllm_pedro": {"path": str(adapter)}})
    with pytest.raises(VLLMValidationError, match="reserved"):
        llm.generate([prompt()], params, use_tqdm=False)
    still_serving(llm, adapter, expected)


def test_streaming_input_sessions_are_refused(llm, adapter, expected):
    processor = llm.llm_engine.input_processor
    with pytest.raises(VLLMValidationError, match="streaming-input session"):
        processor.process_inputs(
            "s",
            {"type": "token", **prompt()},
            greedy(),
            ("generate",),
            lora_request=PedroRequest("good", 1, str(adapter)),
            resumable=True,
        )
    still_serving(llm, adapter, expected)


def test_prompts_without_token_ids_are_refused(llm, adapter, expected, monkeypatch):
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs

    def altered(self, *args, **kwargs):
        request = original(self, *args, **kwargs)
        request.prompt_embeds = torch.zeros(12, 64)
        return request

    with monkeypatch.context() as patch:
        patch.setattr(InputProcessor, "process_inputs", altered)
        with pytest.raises(VLLMValidationError, match="PEDRO adapters take"):
            llm.generate(
                [prompt()],
                greedy(),
                lora_request=PedroRequest("good", 1, str(adapter)),
                use_tqdm=False,
            )
    still_serving(llm, adapter, expected)


def test_other_extra_args_and_the_callers_params_are_left_alone(llm, adapter, expected):
    params = greedy(extra_args={"mine": 1})
    request = PedroRequest("good", 1, str(adapter))
    outputs = llm.generate([prompt()], params, lora_request=request, use_tqdm=False)
    assert tokens_of(outputs) == expected
    assert params.extra_args == {"mine": 1}


def test_an_adapter_that_vanishes_after_admission_ends_its_request_only(
    llm, tiny, write_adapter, tmp_path, tiny_oracle, adapter, late_reads
):
    """The folder is valid when the request comes in and gone when its prompt is prefilled."""
    folder = tmp_path / "vanishing"
    write_adapter(tiny, folder=folder, seed=44)
    engine, results = llm.llm_engine, {}
    good = PedroRequest("good", 1, str(adapter))
    gone = PedroRequest("vanishing", 2, str(folder))
    for name, request, seed in (("a", good, 1), ("b", gone, 2), ("c", None, 3)):
        engine.add_request(name, prompt(seed=seed), greedy(), lora_request=request)
    shutil.rmtree(folder)
    while engine.has_unfinished_requests():
        for output in engine.step():
            results[output.request_id] = output
    assert results["b"].outputs[0].finish_reason == "error"
    assert list(results["b"].outputs[0].token_ids) == []
    assert "expected an adapter folder" in results["b"].outputs[0].stop_reason
    tiny_oracle.check(results["a"], adapter)
    tiny_oracle.check(results["c"], None)
    # Nothing of what it computed is found by the same prompt once the folder is back.
    write_adapter(tiny, folder=folder, seed=44)
    outputs = llm.generate([prompt(40, 2)], greedy(), lora_request=gone, use_tqdm=False)
    tiny_oracle.check(outputs[0], folder)


def test_a_name_with_other_content_reaches_the_requests_that_wait(
    llm, tiny, write_adapter, tiny_oracle
):
    """Those that run go on as they began; of those behind them, all but a beam take the new one."""
    from vllm_pedro.adapter import load_adapter

    old = write_adapter(tiny, seed=60, scale=0.2, down_scale=15.0)
    new = write_adapter(tiny, seed=61, scale=0.2, down_scale=15.0, pooling="mean")
    engine, results = llm.llm_engine, {}
    request = PedroRequest("mine", 5, str(old))
    for i in range(10):
        # The last two have blocks of their first tokens in the cache by then.
        engine.add_request(f"r{i}", prompt(70, i % 8), greedy(max_tokens=20), lora_request=request)
    engine.add_request(
        "beam",
        prompt(70, 0),
        greedy(),
        lora_request=PedroRequest("mine", 5, str(old), prompt_length=60, is_pinned=True),
    )
    engine.add_request("else", prompt(9), greedy(), lora_request=PedroRequest("else", 6, str(old)))
    for _ in range(9):
        for output in engine.step():
            results[output.request_id] = output
    core = engine.engine_core.engine_core
    running = {r.request_id.partition("-")[0] for r in core.scheduler.running}
    begun = [f"r{i}" in running for i in range(10)]
    assert 6 <= sum(begun) <= 8
    replaced = core.pedro_replace(
        "mine", str(new), load_adapter(new).digest, "all", 4096, "sequence"
    )
    assert replaced == 10 - sum(begun)
    while engine.has_unfinished_requests():
        for output in engine.step():
            results[output.request_id] = output
    for i in range(10):
        tiny_oracle.check(results[f"r{i}"], old if begun[i] else new)
    tiny_oracle.check(results["beam"], old, 60)
    tiny_oracle.check(results["else"], old)
    # Blocks are found under the content they were computed with.
    again = PedroRequest("mine", 5, str(new))
    outputs = llm.generate([prompt(70, 0)], greedy(), lora_request=again, use_tqdm=False)
    tiny_oracle.check(outputs[0], new)


def test_aborted_requests_leave_no_slot_behind(llm, adapter, expected):
    engine = llm.llm_engine
    request = PedroRequest("good", 1, str(adapter))
    for i in range(20):
        engine.add_request(f"r{i}", prompt(seed=i), greedy(max_tokens=50), lora_request=request)
    for _ in range(3):
        engine.step()
    engine.abort_request([f"r{i}" for i in range(20)])
    while engine.has_unfinished_requests():
        engine.step()
    still_serving(llm, adapter, expected)


def test_switched_off_engine_says_how_to_switch_it_on(tiny_engine, adapter):
    with tiny_engine(pedro=False) as off:
        with pytest.raises(VLLMValidationError, match=r"PEDRO is not enabled: .*enable_pedro=True"):
            off.generate(
                [prompt()],
                greedy(),
                lora_request=PedroRequest("good", 1, str(adapter)),
                use_tqdm=False,
            )
        # Asked for as a LoRA, vLLM would look for a LoRA's tensors in it.
        with pytest.raises(VLLMValidationError, match=r"is a PEDRO adapter, but PEDRO is not enab"):
            off.generate(
                [prompt()],
                greedy(),
                lora_request=LoRARequest("good", 1, str(adapter)),
                use_tqdm=False,
            )
        assert tokens_of(off.generate([prompt()], greedy(), use_tqdm=False))


def test_switched_off_engine_is_untouched(tiny_engine):
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner as CPUModelRunnerV2
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    with tiny_engine(pedro=False, enable_pedro=False, max_pedros=3) as off:
        core = off.llm_engine.engine_core.engine_core
        assert type(core.scheduler) is Scheduler
        assert type(off.llm_engine.input_processor) is InputProcessor
        worker = core.model_executor.driver_worker.worker
        if current_runner() == "v2":
            assert type(worker.model_runner) is CPUModelRunnerV2
            assert type(worker.model_runner.model_state) is DefaultModelState
        else:
            assert type(worker.model_runner) is CPUModelRunner
        hooked = [m for m in worker.model_runner.model.modules() if m._forward_hooks]
        assert hooked == []


def test_chat_and_beam_search_on_the_real_model(engine, smol, write_adapter, smol_oracle):
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams

    adapter = write_adapter(smol, seed=3, scale=0.03)
    request = PedroRequest("a", 1, str(adapter))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = {"prompt_token_ids": [(53 * i) % 40_000 for i in range(20)]}
    with engine(smol) as llm:
        outputs = llm.chat(
            [messages, messages],
            SamplingParams(temperature=0.0, max_tokens=10),
            lora_request=[request, None],
            use_tqdm=False,
        )
        # vLLM sends each step's beams as new prompts; P has to stay that of the first.
        beams = llm.beam_search(
            [text],
            BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True),
            lora_request=request,
        )[0].sequences
    for output, path in zip(outputs, (adapter, None), strict=True):
        smol_oracle.check(output, path)
    assert "Paris" in outputs[1].outputs[0].text
    assert len(beams) == 3
    for beam in beams:
        reference = smol_oracle.score(text["prompt_token_ids"], beam.tokens[20:], adapter, 20)
        assert beam.cum_logprob == pytest.approx(sum(reference.logprobs), abs=2e-3)


def test_store_and_generators_are_where_vllm_counts_memory(llm):
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runtime = worker.model_runner.pedro
    model = worker.model_runner.model
    buffers = {b.data_ptr() for _, b in model.named_buffers()}
    assert all(v.data_ptr() in buffers for v in runtime.store.vectors)
    assert runtime.bank.arena.data_ptr() in buffers
