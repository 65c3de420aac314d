"""Greedy answers: what a plain loop without any cache would write, whatever the batch and the number of ranks."""

import copy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from sorsa_ds.evaluate import sharing
from sorsa_ds.evaluate.backends.vllm import tensor_parallel_size
from sorsa_ds.evaluate.command import evaluate
from sorsa_ds.model.generation import Prompt, Transformers, batch_prompts
from sorsa_ds.runtime import collectives
from tests.helpers.architectures import CONFIGS
from tests.helpers.chat_tokenizer import chat_tokenizer
from tests.helpers.evaluated import QUESTIONS, asked, run
from tests.helpers.worlds import run_ranks


@pytest.fixture(scope="module")
def reference(trained):
    """The samples made one at a time by one rank."""
    return run_ranks(1, run, asked(trained, "alone", batch_size=1))[0]


def _texts(samples):
    return {sample["id"]: sample["text"] for sample in samples}


@pytest.mark.slow
def test_answers_are_those_of_a_plain_loop(trained, reference):
    model = AutoModelForCausalLM.from_pretrained(trained / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    results, samples = reference
    assert len({sample["tokens"] for sample in samples}) > 2, "answers of one length would prove little"
    assert results["accuracy"] > 0.5
    for question, sample in zip(QUESTIONS, samples, strict=True):
        prompt = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\n{question}\n\n### Response: Let's think step by step."
        )
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 24:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
        assert sample["text"] == tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert sample["ended"] == (ids[-1] == tokenizer.eos_token_id)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "ranks"), [(3, 1), (8, 1), (1, 2), (3, 2), (3, 3), (8, 3)])
def test_neither_the_batch_nor_the_ranks_change_an_answer(trained, reference, batch, ranks):
    per_rank = run_ranks(ranks, run, asked(trained, f"{batch}-{ranks}", batch_size=batch))
    for results, samples in per_rank:
        assert _texts(samples) == _texts(reference[1])
        assert [sample["id"] for sample in samples] == [sample["id"] for sample in reference[1]]
        assert results["correct"] == reference[0]["correct"]
        assert results["speed"]["tokens"] == sum(sample["tokens"] for sample in samples)


@pytest.mark.slow
def test_more_ranks_than_samples_hang_nobody(trained):
    per_rank = run_ranks(3, run, asked(trained, "few", limit=1))
    assert [results["total"] for results, _ in per_rank] == [1, 1, 1]


def test_the_wait_for_others_that_do_nothing_ends(monkeypatch):
    monkeypatch.setattr(sharing, "PATIENCE", 0.1)
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    with pytest.raises(collectives.PeerError, match="no sample for"):
        sharing.Board(4, 0, 0, "work").close()


def _answers(name, sizes, limits=(6,) * 5):
    """{batch size: {prompt: answer}} of a random model."""
    torch.manual_seed(1)
    config = copy.deepcopy(CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=3.0, eos_token_id=63)
    tokenizer = chat_tokenizer()
    generate = Transformers(model, tokenizer, torch.device("cpu"))
    prompts = [Prompt(str(n), [3 + n] * (1 + 3 * n), limit) for n, limit in enumerate(limits)]
    disturbed = generate.disturbed_by_padding(prompts[1])
    found = {}
    for size in sizes:
        found[size] = {}
        for batch in batch_prompts(prompts, size, disturbed):
            generate(batch, lambda prompt, answer, size=size: found[size].__setitem__(prompt.id, answer))
    return disturbed, found


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma", "qwen3", "phi3", "gpt2"])
def test_padding_changes_no_architectures_answers(name):
    disturbed, found = _answers(name, (1, 5))
    assert not disturbed
    assert found[1] == found[5]


def test_a_model_that_does_not_heed_the_mask_is_never_padded():
    disturbed, found = _answers("rwkv", (1, 5))
    assert disturbed
    assert found[1] == found[5]


def test_each_prompt_has_its_own_limit():
    _, found = _answers("llama", (5,), limits=(1, 2, 3, 4, 9))
    cut = {id_: len(answer.token_ids) for id_, answer in found[5].items() if not answer.ended}
    assert cut.items() <= {"0": 1, "1": 2, "2": 3, "3": 4, "4": 9}.items()
    assert len(cut) > 2


def test_an_answer_ends_at_any_of_the_models_end_tokens():
    """The model's own configuration names others than the tokenizer, as Llama 3's does."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    with torch.no_grad():
        first = int(model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    model.generation_config = GenerationConfig(eos_token_id=[62, first])
    told = []
    Transformers(model, chat_tokenizer(), torch.device("cpu"))(
        [Prompt("a", [5, 6, 7], 8)], lambda prompt, answer: told.append((prompt.id, answer.token_ids, answer.ended))
    )
    assert told == [("a", [], True)]


def test_batches_hold_all_prompts_once_the_longest_first():
    prompts = [Prompt(str(n), [1] * (1 + n % 4), 1) for n in range(10)]
    made = batch_prompts(prompts, 3, one_length=False)
    assert sorted(p.id for batch in made for p in batch) == sorted(p.id for p in prompts)
    assert max(len(batch) for batch in made) == 3
    lengths = [len(p.token_ids) for batch in made for p in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len({len(p.token_ids) for p in batch}) == 1 for batch in batch_prompts(prompts, 3, one_length=True))


@pytest.mark.slow
def test_a_prompt_that_leaves_no_room_is_counted_and_not_asked(trained):
    results, samples = run_ranks(1, run, asked(trained, "long", num_few_shot=3, limit=3))[0]
    assert results["too_long"] == 3 == results["total"]
    assert {sample["outcome"] for sample in samples} == {"too long"}


class _Output(SimpleNamespace):
    """Imitates an answer of vLLM: `outputs[0].token_ids`, with the stop token, and `finish_reason`."""


def _stand_in_for_vllm(asked_with):
    """A module with what is used of vLLM's interface, over a loop without a cache; notes how it is called."""

    class LLM:
        def __init__(self, model, **settings):
            asked_with.append(settings)
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, settings["dtype"])).eval()

        @torch.no_grad()
        def generate(self, prompts, parameters, use_tqdm):
            return [self.answer(one["prompt_token_ids"], p) for one, p in zip(prompts, parameters, strict=True)]

        def answer(self, prompt, parameters):
            assert parameters.temperature == 0
            ids = []
            while len(ids) < parameters.max_tokens:
                ids.append(int(self.model(torch.tensor([prompt + ids])).logits[0, -1].argmax()))
                if ids[-1] in parameters.stop_token_ids:
                    return _Output(outputs=[_Output(token_ids=ids, finish_reason="stop")])
            return _Output(outputs=[_Output(token_ids=ids, finish_reason="length")])

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SimpleNamespace
    return module


@pytest.mark.slow
def test_what_vllm_generates_is_recorded_as_any_other_answer(trained, reference, monkeypatch):
    """vLLM itself needs a GPU and another torch; a stand-in with its interface shows what is made of its answers."""
    asked_with = []
    monkeypatch.setitem(sys.modules, "vllm", _stand_in_for_vllm(asked_with))
    results, samples = run(asked(trained, "vllm", backend="vllm"))
    assert samples == reference[1]
    assert results["correct"] == reference[0]["correct"]
    assert [(settings["dtype"], settings["generation_config"]) for settings in asked_with] == [("float32", "vllm")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "keys", "gpus", "size"),
    [(32, 8, 8, 8), (28, 4, 8, 4), (40, 40, 8, 8), (14, 2, 8, 2), (32, 8, 6, 4), (9, 3, 8, 3)],
)
def test_vllm_cuts_a_model_among_as_many_gpus_as_divide_its_heads(tmp_path, capsys, heads, keys, gpus, size):
    LlamaConfig(hidden_size=heads * 8, num_attention_heads=heads, num_key_value_heads=keys).save_pretrained(tmp_path)
    assert tensor_parallel_size(tmp_path, gpus) == size
    told = capsys.readouterr().out
    assert (f"takes {size} of {gpus} GPUs" in told) == (size < gpus)


def test_vllm_that_is_not_installed_or_started_on_ranks_is_a_clear_error(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="the package vllm is not installed"):
        evaluate(asked(trained, "no-vllm", backend="vllm"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="from one process"):
        evaluate(asked(trained, "no-vllm", backend="vllm"))
