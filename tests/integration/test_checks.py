"""Options, and what an engine with PEDRO refuses at start-up; no engine is started."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch

import vllm_pedro  # noqa: F401  (teaches EngineArgs its keywords)

# isort: split
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from vllm_pedro.integration.checks import SPECULATION, UNTRIED, check_engine
from vllm_pedro.integration.frontend import engine_config, keywords
from vllm_pedro.integration.frontend.processor import longest_prompt
from vllm_pedro.integration.offloading import CONNECTORS, REFUSED, reasons_against
from vllm_pedro.integration.options import PedroOptions, options_of

pytestmark = pytest.mark.both_runners


def config(model, **settings):
    arguments = {"skip_tokenizer_init": True, "enable_pedro": True, "max_model_len": 256}
    return EngineArgs(model=str(model), **{**arguments, **settings}).create_engine_config()


def test_options_travel_in_the_configuration(tiny):
    found = config(tiny, max_pedros=3, max_cpu_pedros=9, max_pedro_rank=24, pedro_memory_bytes=99)
    assert options_of(found) == PedroOptions(3, 9, 24, pedro_memory_bytes=99)
    assert json.dumps(found.additional_config)  # it is hashed as JSON
    assert found.scheduler_config.scheduler_cls == (
        "vllm_pedro.integration.scheduler.PedroScheduler"
    )


def test_the_memory_for_adapters_is_fixed_in_the_configuration(tiny):
    """A twentieth of the memory, and never less than some adapters of the highest rank need."""
    arguments = EngineArgs(
        model=str(tiny), skip_tokenizer_init=True, max_model_len=256, enable_pedro=True
    )
    assert options_of(arguments).pedro_memory_bytes is None
    found = options_of(arguments.create_engine_config()).pedro_memory_bytes
    assert 1 << 20 < found <= 4 << 30
    assert options_of(arguments).pedro_memory_bytes is None
    options = PedroOptions()
    assert options.default_memory(total=2000, largest=10) == 100
    assert options.default_memory(total=200, largest=10) == 80
    assert PedroOptions(max_pedros=3).default_memory(total=200, largest=10) == 30
    assert options.default_memory(total=1 << 40, largest=10) == 32 << 30


def test_host_memory_has_room_for_more_than_the_device():
    assert PedroOptions(pedro_memory_bytes=100).host_capacity(largest=10) == 40
    assert PedroOptions(pedro_memory_bytes=5).host_capacity(largest=10) == 4
    assert PedroOptions(max_pedros=2, pedro_memory_bytes=100).host_capacity(largest=10) == 8
    assert PedroOptions(max_cpu_pedros=3, pedro_memory_bytes=100).host_capacity(largest=10) == 3


def test_additional_config_of_ones_own_is_kept(tiny):
    mine = {"mine": 1}
    found = config(tiny, additional_config=mine)
    assert found.additional_config["mine"] == 1
    assert mine == {"mine": 1}


def test_both_argument_classes_know_the_keywords(tiny):
    for cls in (EngineArgs, AsyncEngineArgs):
        on = cls(model=str(tiny), enable_pedro=True, max_pedros=2)
        assert options_of(on).max_pedros == 2
        off = cls(model=str(tiny), enable_pedro=False, max_pedros=2)
        assert options_of(off) is None
        assert options_of(cls(model=str(tiny))) is None


def test_the_compile_cache_tells_the_two_apart(tiny):
    on, off = config(tiny), config(tiny, enable_pedro=False)
    assert on.compute_hash() != off.compute_hash()


def test_the_compile_cache_tells_versions_apart(tiny, monkeypatch):
    one, again = config(tiny), config(tiny)
    monkeypatch.setattr(engine_config, "__version__", "9.9.9")
    other = config(tiny)
    assert one.compute_hash() == again.compute_hash() != other.compute_hash()
    assert config(tiny, enable_pedro=False).additional_config.keys() == set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_pedros": 0}, "max_pedros must be an integer of at least 1, got 0"),
        ({"max_pedros": True}, "max_pedros must be an integer"),
        ({"pedro_memory_bytes": 0}, "pedro_memory_bytes must be an integer of at least 1, got 0"),
        ({"pedro_memory_bytes": 1 << 36}, "pedro_memory_bytes must be at most 34359738368"),
        ({"max_pedro_rank": "12"}, "max_pedro_rank must be an integer"),
        ({"max_pedros": 4, "max_cpu_pedros": 3}, r"max_cpu_pedros \(3\) must be at least"),
        ({"pedro_target_modules": ["q_proj", "o_proj"]}, "must name some of q_proj"),
        ({"pedro_target_modules": "q_proj"}, "must be a list"),
        ({"pedro_target_modules": []}, "must name some of q_proj"),
        ({"enable_pedro": "yes"}, "enable_pedro must be True or False"),
    ],
)
def test_bad_options_are_named(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        EngineArgs(model=str(tiny), **{"enable_pedro": True, **settings})


def test_default_budget_takes_a_whole_prompt(tiny):
    assert config(tiny, max_model_len=512).scheduler_config.max_num_batched_tokens >= 512
    assert config(tiny, max_num_batched_tokens=64).scheduler_config.max_num_batched_tokens == 64


def test_longest_prompt_names_the_option_that_limits_it(tiny):
    assert longest_prompt(config(tiny, max_num_batched_tokens=64)) == (64, "max_num_batched_tokens")
    found = config(tiny, max_num_batched_tokens=64, long_prefill_token_threshold=20)
    assert longest_prompt(found) == (20, "long_prefill_token_threshold")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "KV connector ExampleConnector finds blocks by their tokens alone.*unset kv_transfer",
        ),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "OffloadingConnector",
                    "kv_role": "kv_both",
                    "kv_load_failure_policy": "recompute",
                }
            },
            "kv_load_failure_policy: fail",
        ),
        (
            {"runner": "pooling", "convert": "embed", "hf_overrides": {"is_causal": False}},
            "attention that looks ahead",
        ),
        (
            {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
            "brings its own scheduler class",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused(tiny, settings, message):
    if "kv_transfer_config" in settings:
        from vllm.config.kv_transfer import KVTransferConfig

        settings = {"kv_transfer_config": KVTransferConfig(**settings["kv_transfer_config"])}
    with pytest.raises(ValueError, match=message):
        config(tiny, **settings)


def test_every_connector_of_vllm_is_served_or_refused_by_name():
    """A new one, in the next vLLM: see what keys its blocks, then put it where it belongs."""
    from vllm.config.kv_transfer import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    assert {*CONNECTORS, *REFUSED} == set(KVConnectorFactory._registry)
    for name in KVConnectorFactory._registry:
        found = list(reasons_against(KVTransferConfig(kv_connector=name, kv_role="kv_both")))
        assert found == [] if name in CONNECTORS else REFUSED[name] in found[0], name


def test_the_connectors_within_another_are_looked_at():
    children = [
        {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"},
        {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
        {"kv_connector": "OffloadingConnector", "kv_connector_module_path": "mine"},
        {"kv_connector": "OffloadingConnector", "kv_load_failure_policy": "recompute"},
    ]
    given = {
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {"connectors": children},
    }
    found = list(reasons_against(given))
    assert [reason.split(" (")[0] for reason in found] == [
        "KV connector NixlConnector hands a prompt's blocks from engine to engine, which was not "
        "run",
        "KV connector OffloadingConnector is of a module of its own, which is not known to be "
        "exact",
        "blocks that failed to load must end a request",
    ]


def other_model(name, folder):
    import transformers

    small = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
    }  # fmt: skip
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    cls(cls.config_class(**small)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("VaultGemmaForCausalLM", "architecture VaultGemmaForCausalLM is not among"),
        ("GPTBigCodeForCausalLM", "architecture GPTBigCodeForCausalLM is not among"),
    ],
)
def test_unknown_models_are_refused(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(other_model(name, tmp_path), max_model_len=128)


def test_the_choice_of_runner_is_left_to_vllm(tiny, monkeypatch):
    from vllm.triton_utils import HAS_TRITON

    name = "VLLM_USE_V2_MODEL_RUNNER"
    monkeypatch.setenv(name, "0")
    assert not config(tiny).use_v2_model_runner
    assert os.environ[name] == "0"
    monkeypatch.setenv(name, "1")
    if HAS_TRITON:
        assert config(tiny).use_v2_model_runner
    else:
        with pytest.raises(ValueError, match="Model Runner V2 requires Triton"):
            config(tiny)
    assert os.environ[name] == "1"
    monkeypatch.delenv(name)
    config(tiny)
    assert name not in os.environ


def test_an_unsupported_vllm_is_refused_by_version(tiny, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.33.1")
    with pytest.raises(RuntimeError, match=r"supports vLLM ==0\.32\.0 and found 0\.33\.1"):
        EngineArgs(model=str(tiny), enable_pedro=True)


def test_a_filtered_plugin_is_noticed(monkeypatch):
    fake = SimpleNamespace(VLLM_PLUGINS=["something_else"])
    monkeypatch.setattr("vllm.envs", fake)
    with pytest.raises(ValueError, match="VLLM_PLUGINS leaves its plugin out"):
        keywords._check_plugin_loads()


def fake_config(**changes):
    """A configuration that passes, changed in one place, for what this machine cannot load."""
    tree = {
        "model_config": {
            "runner_type": "generate", "is_encoder_decoder": False,
            "is_hybrid": False, "is_attention_free": False,
            "is_multimodal_model": False, "architecture": "LlamaForCausalLM",
            "enable_prompt_embeds": False, "attn_type": "decoder",
            "hf_text_config": SimpleNamespace(model_type="llama"),
        },
        "parallel_config": {
            "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
            "prefill_context_parallel_size": 1, "decode_context_parallel_size": 1,
            "use_ubatching": False,
        },
        "cache_config": {"kv_sharing_fast_prefill": False},
        "kv_transfer_config": None,
        "ec_transfer_config": None,
        "speculative_config": None,
    }  # fmt: skip
    for path, value in changes.items():
        group, _, name = path.partition("__")
        if name:
            tree[group][name] = value
        else:
            tree[group] = value
    spaces = {k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in tree.items()}
    passes = SimpleNamespace(enable_sp=False)
    return SimpleNamespace(**spaces, compilation_config=SimpleNamespace(pass_config=passes))


def test_the_fake_configuration_passes():
    check_engine(fake_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_config__runner_type": "draft"}, "use 'generate' or 'pooling'"),
        (
            {"model_config__runner_type": "pooling", "model_config__attn_type": "encoder_only"},
            "attention that looks ahead",
        ),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder models"),
        (
            {"model_config__is_hybrid": True, "cache_config__mamba_cache_mode": "align"},
            "turn enable_prefix_caching off",
        ),
        ({"model_config__is_attention_free": True}, "attention-free models"),
        ({"model_config__architecture": "WhisperModel"}, "WhisperModel is not among those"),
        (
            {
                "model_config__architecture": "Mistral3ForConditionalGeneration",
                "model_config__hf_text_config": SimpleNamespace(model_type="newest"),
            },
            "the language model in Mistral3ForConditionalGeneration is a newest",
        ),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill_context_parallel_size=2"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size=2"),
        ({"parallel_config__use_ubatching": True}, "turn enable_dbo off"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"ec_transfer_config": SimpleNamespace()}, "unset ec_transfer_config"),
        ({"speculative_config": SimpleNamespace(method="new")}, "'new' is not supported yet"),
        (
            {
                "model_config__is_multimodal_model": True,
                "speculative_config": SimpleNamespace(method="eagle"),
            },
            "'eagle' has not run with images",
        ),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_each_obstacle_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        check_engine(fake_config(**changes))


def test_every_method_of_speculation_is_served_or_refused_by_name():
    from typing import get_args

    from vllm.config.speculative import MTPModelTypes, SpeculativeMethod

    def flat(literal):
        return [m for a in get_args(literal) for m in ([a] if isinstance(a, str) else flat(a))]

    # Those of single models are turned into "mtp" before.
    methods = {*flat(SpeculativeMethod)} - {*flat(MTPModelTypes)} | {"mtp"}
    assert methods == {*SPECULATION, *UNTRIED}
    for method in UNTRIED:
        found = fake_config(speculative_config=SimpleNamespace(method=method))
        with pytest.raises(ValueError, match=f"{method!r} {UNTRIED[method]}"):
            check_engine(found)


def test_all_obstacles_are_named_at_once():
    found = fake_config(
        model_config__is_encoder_decoder=True, parallel_config__decode_context_parallel_size=4
    )
    with pytest.raises(ValueError, match=r"encoder-decoder.*; decode_context_parallel_size=4"):
        check_engine(found)


def test_up_within_experts_is_refused_where_it_has_not_run():
    found = fake_config(device_config=SimpleNamespace(device_type="cuda"))
    options = PedroOptions(pedro_target_modules=("v_proj", "experts_up_proj"))
    found.additional_config = {"pedro": options.to_config()}
    with pytest.raises(ValueError, match=r"has not run on a GPU \(leave experts_up_proj out"):
        check_engine(found)
    found.device_config.device_type = "cpu"
    check_engine(found)
    assert "experts_up_proj" not in PedroOptions().pedro_target_modules
