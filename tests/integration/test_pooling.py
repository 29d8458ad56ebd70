"""Embeddings, classes, rewards and scores with an adapter, against plain transformers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from server import curl
from tiny_task import make_backbone, make_folder, make_tokenizer

from vllm_pedro import PedroModel, PedroRequest
from vllm_pedro.bench.servers import serve

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("late_reads")]

TOLERANCE = 2e-6
"""Of numbers of at most 1 in float32; the adapters move them by 0.05 and more."""

LABELS = 3
NAMES = (None, "last", "mean", "max", "answer", "static")


def tokens(count, seed=0):
    return [(7 * i * i + 3 * i + 11 * seed) % 250 + 3 for i in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pooling") / "model")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The same backbone under heads of so many labels."""
    from transformers import LlamaForSequenceClassification

    def make(labels):
        folder = tmp_path_factory.mktemp("classifier")
        backbone = make_backbone()
        config = copy.deepcopy(backbone.config)
        config.num_labels = labels
        head = LlamaForSequenceClassification(config)
        head.model.load_state_dict(backbone.model.state_dict())
        torch.manual_seed(7)
        torch.nn.init.normal_(head.score.weight, std=0.2)
        head.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return folder, head.score.weight.detach()

    return make


@pytest.fixture(scope="module")
def adapters(model, write_adapter):
    def write(seed, **config):
        return write_adapter(model, seed=seed, scale=0.2, down_scale=15.0, **config)

    return {
        None: None,
        "last": write(1),
        "mean": write(2, pooling="mean"),
        "max": write(3, pooling="max", activation="gelu"),
        "answer": write(4, scope="answer"),
        "static": write(5, r=0),
        "away": write(6),
    }


@pytest.fixture(scope="module")
def hidden(adapters):
    """What transformers gives to a head: `[T, d]`, behind the last norm."""
    kept, models = {}, {None: make_backbone()}
    for name, folder in adapters.items():
        if folder is not None:
            models[name] = PedroModel.from_pretrained(make_backbone(), folder)

    @torch.no_grad()
    def hidden(prompt, name=None, length=None):
        key = (*prompt, name, length)
        if key not in kept:
            found, made = [], models[name].eval()
            backbone = made if name is None else made.base_model
            hook = backbone.model.norm.register_forward_hook(lambda *call: found.append(call[2]))
            more = {} if name is None else {"prompt_lengths": [length or len(prompt)]}
            made(input_ids=torch.tensor([prompt]), use_cache=False, **more)
            hook.remove()
            kept[key] = found[0][0]
        return kept[key]

    return hidden


def unit(vector):
    return torch.nn.functional.normalize(vector, dim=-1)


def request_for(adapters, name, length=None):
    if name is None:
        return None
    number = 1 + list(adapters).index(name)
    return PedroRequest(name, number, str(adapters[name]), prompt_length=length)


def near(found, expected):
    assert torch.as_tensor(found).shape == expected.shape
    torch.testing.assert_close(torch.as_tensor(found), expected, atol=TOLERANCE, rtol=0)


SETTINGS = {"runner": "pooling", "max_model_len": 128, "enable_prefix_caching": True}
SETTINGS |= {"block_size": 32, "max_num_batched_tokens": 160}


def batch(adapters, count=60, first_seed=0):
    """A prompt for each adapter, in requests that go together."""
    prompts = [tokens(count + i, first_seed + i) for i in range(len(NAMES))]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return prompts, inputs, [request_for(adapters, name) for name in NAMES]


@pytest.mark.both_runners
def test_embeddings(engine, model, adapters, hidden):
    """In one batch; on cached blocks; with an explicit P; scores; an adapter that went away."""
    with engine(model, convert="embed", **SETTINGS) as llm:
        prompts, inputs, requests = batch(adapters)
        for turn in range(2):
            outputs = llm.embed(inputs, lora_request=requests, use_tqdm=False)
            for output, prompt, name in zip(outputs, prompts, NAMES, strict=True):
                near(output.outputs.embedding, unit(hidden(prompt, name)[-1]))
                assert output.num_cached_tokens == turn * ((len(prompt) - 1) // 32 * 32), name
        # The adapters differ from the base by more than the tolerance.
        base = unit(hidden(prompts[1])[-1])
        assert (unit(hidden(prompts[1], "last")[-1]) - base).abs().max() > 0.05
        later = prompts[1] + tokens(20, 9)
        for name in ("last", "mean"):
            request = request_for(adapters, name, 40)
            (output,) = llm.embed({"prompt_token_ids": later}, lora_request=request, use_tqdm=False)
            near(output.outputs.embedding, unit(hidden(later, name, 40)[-1]))
        (score,) = llm.score("A query", "A document", lora_request=requests[1], use_tqdm=False)
        pair = [llm.get_tokenizer().encode(text) for text in ("A query", "A document")]
        query, document = (unit(hidden(text, "last")[-1]) for text in pair)
        near(score.outputs.score, query @ document)
        neighbours_live(llm, adapters, hidden)


def neighbours_live(llm, adapters, hidden):
    """The folder goes away between admission and prefill: that request alone fails."""
    from vllm import PoolingParams

    prompts, inputs, requests = batch(adapters, 50, 20)
    prompt, away = tokens(50, 40), adapters["away"]
    inputs.insert(2, {"prompt_token_ids": prompt})
    requests.insert(2, request_for(adapters, "away"))
    for number, (asked, request) in enumerate(zip(inputs, requests, strict=True)):
        params = PoolingParams(task="embed")
        params.verify(llm.llm_engine.model_config)
        llm.llm_engine.add_request(str(number), asked, params, lora_request=request)
    kept = away.rename(away.with_name(away.name + "-kept"))
    done = {}
    try:
        while llm.llm_engine.has_unfinished_requests():
            done |= {output.request_id: output for output in llm.llm_engine.step()}
    finally:
        kept.rename(away)
    failed = done.pop("2")
    assert failed.error is not None
    assert failed.error.code == "vllm_pedro"
    assert str(away) in failed.error.message
    assert not failed.error.retryable
    right = [done[number] for number in sorted(done)]
    for output, asked, name in zip(right, prompts, NAMES, strict=True):
        near(output.outputs.data, unit(hidden(asked, name)[-1]))
    # What it computed without vectors is not found again.
    (output,) = llm.embed(inputs[2], lora_request=requests[2], use_tqdm=False)
    assert output.error is None
    assert output.num_cached_tokens == 0
    near(output.outputs.embedding, unit(hidden(prompt, "away")[-1]))


@pytest.mark.both_runners
def test_classes_and_cross_encoders(engine, classifier, adapters, hidden):
    folder, weight = classifier(1)
    with engine(folder, **SETTINGS) as llm:
        prompts, inputs, requests = batch(adapters)
        outputs = llm.classify(inputs, lora_request=requests, use_tqdm=False)
        for output, prompt, name in zip(outputs, prompts, NAMES, strict=True):
            near(output.outputs.probs, torch.sigmoid(weight @ hidden(prompt, name)[-1]))
        (score,) = llm.score("A query", "A document", lora_request=requests[1], use_tqdm=False)
        pair = list(score.prompt_token_ids)
        near(score.outputs.score, torch.sigmoid(weight @ hidden(pair, "last")[-1])[0])


@pytest.mark.both_runners
def test_a_reward_for_each_token(engine, classifier, adapters, hidden):
    """The result is of all tokens, so that no hit is taken; base prompts come in chunks."""
    from vllm.config import PoolerConfig

    folder, weight = classifier(LABELS)
    with engine(folder, pooler_config=PoolerConfig(task="token_classify"), **SETTINGS) as llm:
        prompts, inputs, requests = batch(adapters)
        for _ in range(2):
            outputs = llm.encode(
                inputs, lora_request=requests, pooling_task="token_classify", use_tqdm=False
            )
            for output, prompt, name in zip(outputs, prompts, NAMES, strict=True):
                near(output.outputs.data, (hidden(prompt, name) @ weight.T).softmax(-1))


def test_other_heads(engine, model, classifier, adapters, hidden):
    from vllm.config import PoolerConfig

    prompts, inputs, requests = batch(adapters)
    task = PoolerConfig(task="token_embed")
    with engine(model, convert="embed", pooler_config=task, **SETTINGS) as llm:
        outputs = llm.encode(
            inputs, lora_request=requests, pooling_task="token_embed", use_tqdm=False
        )
        for output, prompt, name in zip(outputs, prompts, NAMES, strict=True):
            near(output.outputs.data, unit(hidden(prompt, name)))
    mean = PoolerConfig(seq_pooling_type="MEAN")
    with engine(model, convert="embed", pooler_config=mean, **SETTINGS) as llm:
        outputs = llm.embed(inputs, lora_request=requests, use_tqdm=False)
        for output, prompt, name in zip(outputs, prompts, NAMES, strict=True):
            near(output.outputs.embedding, unit(hidden(prompt, name).mean(0)))
    folder, weight = classifier(LABELS)
    with engine(folder, **SETTINGS) as llm:
        outputs = llm.classify(inputs, lora_request=requests, use_tqdm=False)
        for output, prompt, name in zip(outputs, prompts, NAMES, strict=True):
            near(output.outputs.probs, (weight @ hidden(prompt, name)[-1]).softmax(-1))


def test_a_reserved_key_is_refused(engine, model, adapters):
    from vllm import PoolingParams

    with engine(model, convert="embed", **SETTINGS) as llm:
        params = PoolingParams(extra_kwargs={"vllm_pedro": {}})
        with pytest.raises(ValueError, match="is reserved: ask for a PEDRO adapter"):
            llm.embed({"prompt_token_ids": tokens(9)}, pooling_params=params, use_tqdm=False)
        with pytest.raises(ValueError, match="expected an adapter folder"):
            llm.embed(
                {"prompt_token_ids": tokens(9)},
                lora_request=PedroRequest("none", 1, "/nowhere"),
                use_tqdm=False,
            )


def test_without_a_result_a_failure_stops_the_front_end(
    engine, model, adapters, hidden, monkeypatch
):
    from vllm_pedro.integration import wire

    put = wire.put_failure
    monkeypatch.setattr(wire, "put_failure", lambda output, reason, pools: put(output, reason))
    with engine(model, convert="embed", **SETTINGS) as llm, pytest.raises(AssertionError):
        neighbours_live(llm, adapters, hidden)


SERVER = ["--runner", "pooling", "--served-model-name", "base", "--enforce-eager"]
SERVER += ["--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "8"]
SERVER += ["--kv-cache-memory-bytes", str(64 << 20), "--enable-pedro"]
TEXTS = ["A first text", "another"]


def asked(server, path, name, **body):
    status, text = curl(server.url + path, {"model": name or "base", **body})
    assert status == 200, text
    answer = json.loads(text)
    assert answer["model"] == (name or "base")
    return answer


def test_the_servers_routes_for_embeddings(model, adapters, hidden, tmp_path):
    encode = make_tokenizer().encode
    one, two = (encode(text) for text in TEXTS)
    flags = [*SERVER, "--convert", "embed", "--pedro-modules", f"last={adapters['last']}"]
    environment = {"OMP_NUM_THREADS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with serve(model, flags, tmp_path / "server.log", **environment) as server:
        for name in (None, "last"):
            first, second = (unit(hidden(ids, name)[-1]) for ids in (one, two))
            for path in ("/v1/embeddings", "/pooling"):
                data = asked(server, path, name, input=TEXTS)["data"]
                for entry, expected in zip(data, (first, second), strict=True):
                    near(entry["embedding" if path != "/pooling" else "data"], expected)
            answer = asked(server, "/score", name, queries=TEXTS[0], documents=TEXTS[1:])
            near(answer["data"][0]["score"], first @ second)
            answer = asked(server, "/rerank", name, query=TEXTS[0], documents=TEXTS[1:])
            near(answer["results"][0]["relevance_score"], first @ second)
        # Loaded at run time, gone before it is needed, and unloaded.
        away = adapters["away"]
        body = {"lora_name": "late", "lora_path": str(away)}
        assert curl(f"{server.url}/v1/load_lora_adapter", body)[0] == 200
        kept = away.rename(away.with_name(away.name + "-kept"))
        status, text = curl(f"{server.url}/v1/embeddings", {"model": "late", "input": TEXTS})
        assert (status, "late" in text, str(away) in text) == (400, True, False), text
        kept.rename(away)
        data = asked(server, "/v1/embeddings", "late", input=TEXTS)["data"]
        near(data[0]["embedding"], unit(hidden(one, "away")[-1]))
        assert curl(f"{server.url}/v1/unload_lora_adapter", {"lora_name": "late"})[0] == 200
        for name in ("late", "none"):
            status, text = curl(f"{server.url}/v1/embeddings", {"model": name, "input": TEXTS})
            assert status == 404, text


@pytest.mark.slow
def test_the_servers_routes_for_classes(classifier, adapters, hidden, tmp_path):
    folder, weight = classifier(1)
    one = make_tokenizer().encode(TEXTS[0])
    flags = [*SERVER, "--pedro-modules", f"last={adapters['last']}"]
    with serve(folder, flags, tmp_path / "server.log", OMP_NUM_THREADS="1") as server:
        for name in (None, "last"):
            expected = torch.sigmoid(weight @ hidden(one, name)[-1])
            answer = asked(server, "/classify", name, input=TEXTS)
            near(answer["data"][0]["probs"], expected)
            answer = asked(server, "/pooling", name, input=TEXTS, task="classify")
            near(answer["data"][0]["data"], expected)
            answer = asked(server, "/score", name, queries=TEXTS[0], documents=TEXTS[1:])
            pair = make_tokenizer()(*TEXTS)["input_ids"]
            near(answer["data"][0]["score"], torch.sigmoid(weight @ hidden(pair, name)[-1])[0])
