"""A finished run as a plain model: checked by transformers and plain torch."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sorsa_ds import load_adapter
from sorsa_ds.config.schema import ResidualConfig
from sorsa_ds.export.command import Options, export
from sorsa_ds.model import adapter_file
from tests.helpers.architectures import save
from tests.helpers.chat_tokenizer import chat_tokenizer
from tests.helpers.distances import relative
from tests.helpers.exported import change_description, layers_by_hand, logits, plainly
from tests.helpers.finished import base_of, finished_run

CPU = torch.device("cpu")


ARCHITECTURES = ["llama", "llama-tied-bias", "gpt2", "qwen2", "phi3", "rwkv"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_model_is_the_trained_one(runs, tmp_path, name):
    run = runs(name, rank_pattern={} if name in ("gpt2", "rwkv") else {"*.0.*": 3}, alpha=6.0)
    export(Options(run, "merged", tmp_path / "out"))
    model, base = plainly(tmp_path / "out"), plainly(base_of(run))
    by_hand = layers_by_hand(run)
    for full, weight in model.named_parameters():
        expected = by_hand.get(full.removesuffix(".weight"))
        if expected is None:
            assert torch.equal(weight, base.get_parameter(full)), full
        else:
            assert relative(weight.double(), expected) < 1e-6, full
            assert relative(weight.double(), base.get_parameter(full).double()) > 1e-3, full
    theirs = logits(load_adapter(run / "adapter"))
    assert relative(logits(model), theirs) < 1e-5
    assert relative(logits(base), theirs) > 1e-3
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(
        base_of(run) / "model.safetensors").keys()  # fmt: skip


@pytest.mark.parametrize("form", ["merged", "lora", "adapter"])
def test_the_chat_template_of_the_training_goes_along(tmp_path, form):
    save("llama", tmp_path / "base")
    chat_tokenizer().save_pretrained(tmp_path / "base")
    run = finished_run(tmp_path / "base", tmp_path / "run")
    (run / "adapter" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    export(Options(run, form, tmp_path / "out"))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0].content }}!"
    assert "chat_template.jinja" in (tmp_path / "out" / "README.md").read_text()
    if form == "merged":
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_rounding_of_training_is_in_the_merged_model(runs, tmp_path, name, precision):
    run = runs(name, precision=precision)
    export(Options(run, "merged", tmp_path / "out"))
    model = plainly(tmp_path / "out")
    exact = layers_by_hand(run)
    for full, expected in layers_by_hand(run, precision).items():
        weight = model.get_submodule(full).weight.double()
        # A number of the residual at the edge between two bf16 neighbours may fall to the other side in fp32.
        assert relative(weight, expected) < 2e-4, full
        assert relative(weight, exact[full]) > 5e-4, full
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
        theirs = logits(load_adapter(run / "adapter"))
    assert relative(logits(model), theirs) < 0.05  # bf16's own rounding of the products


@pytest.mark.parametrize(("storage", "precision"), [("nf4", "fp32"), ("nf4_double", "mixed"), ("int8", "fp32")])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_quantised_run_exports_what_it_computed_with(runs, tmp_path, name, storage, precision):
    """merged is the trained model; base with the LoRA is too, and base alone is where training began."""
    run = runs(name, storage=storage, precision=precision, alpha=6.0)
    trained = load_adapter(run / "adapter")
    assert {p.dtype for n, p in trained.named_parameters() if "residual" in n} == {torch.uint8}
    start = load_adapter(shutil.copytree(run / "adapter", tmp_path / "start"))
    initial = load_file(run / "adapter" / adapter_file.INITIAL)
    start.load_state_dict(initial, strict=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
        now, then = logits(trained), logits(start)
    export(Options(run, "merged", tmp_path / "merged", dtype="float32"))
    export(Options(run, "base", tmp_path / "base", dtype="float32"))
    lora = export(Options(run, "lora", tmp_path / "lora"))
    merged, base = plainly(tmp_path / "merged"), plainly(tmp_path / "base")
    near = 1e-5 if precision == "fp32" else 0.05  # bf16's own rounding of the products
    assert relative(logits(merged), now) < near
    assert relative(logits(base), then) < near
    assert relative(logits(base), logits(plainly(base_of(run)))) > 1e-3
    exact = logits(merged)
    assert relative(logits(PeftModel.from_pretrained(base, lora)), exact) < 1e-5
    on_the_pretrained = relative(logits(PeftModel.from_pretrained(plainly(base_of(run)), lora)), exact)
    assert on_the_pretrained > 1e-3
    for form, told in (("merged", "made dense"), ("base", "from which it began"), ("lora", "`--format base` writes")):
        card = (tmp_path / form / "README.md").read_text()
        assert told in card and f"| residual | {storage}, blocks of 64 |" in card


@pytest.mark.parametrize("form", ["nf4", "nf4_double", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_merged_model_is_quantised_on_request_and_its_error_told(runs, tmp_path, capsys, name, form):
    run = runs(name, storage="nf4", targets=["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "down_proj"])
    export(Options(run, "merged", tmp_path / "dense", dtype="float32"))
    capsys.readouterr()
    export(Options(run, "merged", tmp_path / "out", dtype="float32", quantize=form, max_shard_size="20KB"))
    dense = plainly(tmp_path / "dense")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    told = json.loads((tmp_path / "out" / "quantisation.json").read_text())
    kinds = {
        module_name for module_name, module in packed.named_modules() if type(module).__name__[-4:] in ("4bit", "itLt")
    }
    assert kinds == set(told["layers"]) and told["storage"] == form
    for layer, error in told["layers"].items():
        found = packed.get_submodule(layer)
        # By the module's own product: the identity's rows give its columns back.
        eye = torch.eye(found.in_features, dtype=torch.float32)
        found.train()
        weight = found(eye).t().detach() - (0 if found.bias is None else found.bias.detach()[:, None])
        original = dense.get_submodule(layer).weight.detach()
        original = original.t() if name == "gpt2" else original
        assert relative(weight, original) == pytest.approx(error, rel=0.05)
        assert 1e-3 < error < (0.02 if form == "int8" else 0.15)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert not (tmp_path / "out" / ".merged").exists()
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1, "readable for all or for none"
    for text in (capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()):
        assert "quantised anew" in text and "worst" in text and "loading needs bitsandbytes" in text
        assert "made dense" not in text


def test_a_disk_that_is_full_when_the_quantised_model_is_written_leaves_nothing(runs, tmp_path, monkeypatch):
    run = runs("llama", storage="nf4")

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(ValueError, match="cannot be written .*No space left"):
        export(Options(run, "merged", tmp_path / "out", quantize="nf4"))
    assert not list(tmp_path.iterdir())


def test_a_matrix_of_zeros_loses_nothing_when_it_is_quantised(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save("llama", tmp_path / "base"))
    torch.nn.init.zeros_(model.model.layers[1].mlp.up_proj.weight)
    model.save_pretrained(tmp_path / "base")
    run = finished_run(tmp_path / "base", tmp_path / "run", storage="nf4", targets=["up_proj"])
    export(Options(run, "merged", tmp_path / "out", quantize="nf4"))
    told = json.loads((tmp_path / "out" / "quantisation.json").read_text())["layers"]
    assert told["model.layers.1.mlp.up_proj"] == 0 < told["model.layers.0.mlp.up_proj"]


def test_an_adapter_of_another_quantisation_is_refused(runs, tmp_path):
    run = shutil.copytree(runs("llama", storage="nf4"), tmp_path / "run")
    change_description(run, residual=ResidualConfig(storage="int8"))
    with pytest.raises(ValueError, match=r"trained over a residual in int8 .*settings say nf4"):
        export(Options(run, "merged", tmp_path / "out"))
    with pytest.raises(ValueError, match="--format base: the residual was not quantised"):
        export(Options(runs("llama"), "base", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_shards_have_an_index_and_hold_the_same(runs, tmp_path):
    run = runs("llama")
    export(Options(run, "merged", tmp_path / "one"))
    export(Options(run, "merged", tmp_path / "many", max_shard_size="30KB"))
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) >= 4
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    whole, pieces = load_file(tmp_path / "one" / "model.safetensors"), {}
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    for file in files:
        held = load_file(tmp_path / "many" / file)
        assert sum(tensor.nbytes for tensor in held.values()) <= 30_000 or len(held) == 1
        assert {name for name, place in index["weight_map"].items() if place == file} == held.keys()
        pieces |= held
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert pieces.keys() == whole.keys()
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)
    assert torch.equal(logits(plainly(tmp_path / "many")), logits(plainly(tmp_path / "one")))


def test_dtype_is_chosen_or_the_bases(runs, tmp_path):
    run = runs("llama")
    exact = plainly(export(Options(run, "merged", tmp_path / "float32")))
    for name in ("bfloat16", "float16"):
        model = plainly(export(Options(run, "merged", tmp_path / name, dtype=name)))
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == name
        for full, weight in model.named_parameters():
            assert torch.equal(weight, exact.get_parameter(full).to(getattr(torch, name))), full
    halved = finished_run(save("llama", tmp_path / "base", torch.bfloat16), tmp_path / "run")
    tensors = load_file(export(Options(halved, "merged", tmp_path / "auto")) / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {weight.dtype for weight in plainly(tmp_path / "auto").parameters()} == {torch.bfloat16}


def test_tensors_of_other_dtypes_and_other_owners_are_copied(tmp_path):
    base = save("llama", tmp_path / "base", torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    tensors |= {"a.mask": torch.tensor([True, False, True]), "a.count": torch.tensor(7), "a.wide": torch.rand(3)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run = finished_run(base, tmp_path / "run")
    adapted = {f"{name}.weight" for name in adapter_file.read_description(run / "adapter").layers}
    for dtype in (None, "float32"):
        written = load_file(export(Options(run, "merged", tmp_path / str(dtype), dtype=dtype)) / "model.safetensors")
        assert written.keys() == tensors.keys()
        with (tmp_path / str(dtype) / "model.safetensors").open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            assert file.tell() % 8 == 0
        for name, tensor in written.items():
            assert header[name]["data_offsets"][0] % tensor.element_size() == 0, name
        for name in tensors.keys() - adapted:
            whole = tensors[name].dtype.is_floating_point
            expected = tensors[name].float() if dtype and whole else tensors[name]
            assert torch.equal(written[name], expected), name
            assert written[name].dtype == expected.dtype, name


def test_a_number_too_large_for_the_dtype_is_named(tmp_path):
    base = save("llama", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run = finished_run(base, tmp_path / "run")
    with pytest.raises(ValueError, match=r"model.norm.weight holds numbers too large for torch.float16"):
        export(Options(run, "merged", tmp_path / "out", dtype="float16"))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run"}


def test_files_beside_the_weights_are_copied_and_no_pickle(tmp_path):
    base = save("llama", tmp_path / "base")
    chat_tokenizer().save_pretrained(base)
    (base / "modeling_own.py").write_text("# the model's own code\n")
    (base / "LICENSE").write_text("terms\n")
    for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl", "pytorch_model.bin.index.json"):
        (base / name).write_bytes(b"pickle")
    output = export(Options(finished_run(base, tmp_path / "run"), "merged", tmp_path / "out"))
    names = {path.name for path in output.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "LICENSE",
                     "tokenizer_config.json", "chat_template.jinja", "README.md"}  # fmt: skip
    assert "modeling_own.py" in (output / "README.md").read_text()
    for name in names - {"config.json", "model.safetensors", "README.md"}:
        assert (output / name).read_bytes() == (base / name).read_bytes(), name
    assert json.loads((output / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(output).get_vocab() == chat_tokenizer().get_vocab()


def test_an_adapted_head_is_untied_from_its_embedding(runs, tmp_path):
    run = runs("llama-tied-bias", targets=["lm_head", "q_proj"])
    model = plainly(export(Options(run, "merged", tmp_path / "merged")))
    base = plainly(base_of(run))
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert relative(model.lm_head.weight.double(), layers_by_hand(run)["lm_head"]) < 1e-6
    theirs = logits(load_adapter(run / "adapter"))
    assert relative(logits(model), theirs) < 1e-5
    lora = PeftModel.from_pretrained(base, export(Options(run, "lora", tmp_path / "lora")))
    assert relative(logits(lora), theirs) < 1e-4
