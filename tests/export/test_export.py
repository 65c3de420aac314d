"""A finished run as a plain model, a LoRA and an adapter: checked by transformers, PEFT and plain torch."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sorsa_ds import load_adapter
from sorsa_ds.config.schema import ResidualConfig
from sorsa_ds.export import card
from sorsa_ds.export.command import Options, export
from sorsa_ds.model import adapter_file, tensor_file
from sorsa_ds.run.peft_files.notes import served_by_vllm
from sorsa_ds.runtime import hub
from sorsa_ds.runtime.folder_lock import RunLock, is_held
from tests.helpers.architectures import save
from tests.helpers.chat_tokenizer import chat_tokenizer
from tests.helpers.finished import base_of, finished_run
from tests.helpers.forked import launch_forked, outcome_forked

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
INPUT = torch.arange(1, 25).view(2, 12) % 64
ARCHITECTURES = ["llama", "llama-tied-bias", "gpt2", "qwen2", "phi3", "rwkv"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each architecture, by name; made when it is asked for."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(name: str, **settings) -> Path:
        key = "-".join([name, *(f"{k}={v}" for k, v in settings.items())]).replace("/", "")
        if key not in made:
            base = root / "models" / name
            if not base.exists():
                save(name, base)
            made[key] = finished_run(base, root / f"run-{len(made)}", **settings)
        return made[key]

    return run


def logits(model) -> torch.Tensor:
    """The logits of a model on a fixed input."""
    with torch.no_grad():
        return model.eval()(INPUT).logits.float()


def plainly(folder: Path, **settings):
    """transformers' own loader. RWKV: without its fp16 rescaling, which moves LayerNorm's epsilon."""
    rwkv = json.loads((folder / "config.json").read_text())["model_type"] == "rwkv"
    return AutoModelForCausalLM.from_pretrained(folder, **{**({"rescale_every": 0} if rwkv else {}), **settings})


def relative(a, b) -> float:
    """Relative Frobenius distance."""
    return ((a - b).norm() / b.norm()).item()


def layers_by_hand(run: Path, precision="fp32") -> dict[str, torch.Tensor]:
    """The merged weight of every adapted linear in float64, as the checkpoint stores it."""
    described = adapter_file.read_description(run / "adapter")
    initial, trained = (load_file(run / "adapter" / name) for name in (adapter_file.INITIAL, adapter_file.TRAINED))
    model = plainly(base_of(run), dtype=torch.float32)

    def product(factors, name):
        U, s, V = (factors[f"{name}.{leaf}"] for leaf in ("U", "s", "V"))
        alpha, rank = described.adapter.alpha, s.numel()
        if precision == "bf16":
            U, s = U.bfloat16(), s.bfloat16()
        left = U * (s * (alpha / rank) if alpha else s)
        if precision != "fp32":
            left, V = left.bfloat16(), V.bfloat16()
        return left.double() @ V.double().T

    merged = {}
    for name in described.layers:
        module = model.get_submodule(name)
        transposed = type(module).__name__ == "Conv1D"
        W = module.weight.detach().double()
        rest = (W.T if transposed else W) - product(initial, name)
        rest = rest.float() if precision == "fp32" else rest.bfloat16()
        whole = rest.double() + product(trained, name)
        merged[name] = whole.T if transposed else whole
    return merged


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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_on_the_untouched_base_is_the_trained_model(runs, tmp_path, name):
    pattern = {} if name in ("gpt2", "rwkv") else {"*.0.*": 3}
    run = runs(name, rank_pattern=pattern, alpha=6.0)
    output = export(Options(run, "lora", tmp_path / "out"))
    config = json.loads((output / "adapter_config.json").read_text())
    described = adapter_file.read_description(run / "adapter")
    assert sorted(config["target_modules"]) == sorted(described.layers)
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert config["fan_in_fan_out"] is (name == "gpt2")
    assert config["base_model_name_or_path"] == str(base_of(run))
    theirs = logits(load_adapter(run / "adapter"))
    model = PeftModel.from_pretrained(plainly(base_of(run)), output)
    adapted = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(described.layers)
    ranks = {n: model.get_submodule(f"base_model.model.{n}").r["default"] for n in adapted}
    assert ranks == {n: 2 * layer["rank"] for n, layer in described.layers.items()}
    assert relative(logits(model), theirs) < 1e-5
    assert relative(logits(model.merge_and_unload()), theirs) < 1e-5


def test_a_lora_is_cut_as_well_as_it_can_be(runs, tmp_path):
    run = runs("llama", rank=6)
    output = export(Options(run, "lora", tmp_path / "out", rank=3))
    told = json.loads((output / "truncation.json").read_text())
    assert json.loads((output / "adapter_config.json").read_text())["r"] == told["rank"] == 3
    tensors, base = load_file(output / "adapter_model.safetensors"), plainly(base_of(run))
    for name, whole in layers_by_hand(run).items():
        dW = whole - base.get_submodule(name).weight.double()
        A, B = (tensors[f"base_model.model.{name}.lora_{leaf}.weight"].double() for leaf in "AB")
        assert A.shape[0] == B.shape[1] == 3
        d = torch.linalg.svdvals(dW)
        optimum = (d[3:].norm() / d.norm()).item()
        assert 0.05 < optimum < 1
        assert told["layers"][name] == pytest.approx(optimum, rel=1e-3)
        assert relative(B @ A, dW) == pytest.approx(optimum, rel=1e-3)
    assert told["worst"] == max(told["layers"].values())
    assert told["mean"] == pytest.approx(sum(told["layers"].values()) / len(told["layers"]))
    PeftModel.from_pretrained(base, output)


def test_an_exact_lora_bears_bf16(runs, tmp_path):
    """What the plain form [U s, -U0 s0] [V, V0]^T would not: its two parts nearly cancel."""
    run = runs("llama", size=0.01)
    tensors = load_file(export(Options(run, "lora", tmp_path / "out")) / "adapter_model.safetensors")
    base = plainly(base_of(run))
    for name, whole in layers_by_hand(run).items():
        dW = whole - base.get_submodule(name).weight.double()
        A, B = (tensors[f"base_model.model.{name}.lora_{leaf}.weight"] for leaf in "AB")
        assert relative(B.double() @ A.double(), dW) < 1e-5, name
        assert relative(B.bfloat16().double() @ A.bfloat16().double(), dW) < 0.01, name


def test_vllm_is_told_a_rank_that_it_takes():
    assert "--max-lora-rank 16 " in served_by_vllm(10)
    assert "--max-lora-rank 320 " in served_by_vllm(257)
    assert "cut it with launch/export.py --format lora --rank 512" in served_by_vllm(513)


@pytest.mark.slow
def test_adapter_loads_without_deepspeed(runs, tmp_path):
    run = runs("qwen2")
    output = export(Options(run, "adapter", tmp_path / "out"))
    for name in (adapter_file.INITIAL, adapter_file.TRAINED, adapter_file.CONFIG):
        assert (output / name).read_bytes() == (run / "adapter" / name).read_bytes()
    program = (
        "import sys, torch\nfrom sorsa_ds import load_adapter\n"
        f"model = load_adapter({str(output)!r})\n"
        "assert 'deepspeed' not in sys.modules\n"
        "assert {n.rpartition('.')[2] for n, p in model.named_parameters() if p.requires_grad} == {'U', 's', 'V'}\n"
        f"torch.save(model.eval()(torch.arange(1, 25).view(2, 12) % 64).logits.detach(), {str(tmp_path / 'l')!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    assert torch.equal(torch.load(tmp_path / "l"), logits(load_adapter(run / "adapter")))


def test_a_base_model_that_has_moved(runs, tmp_path):
    run = runs("llama")
    moved = shutil.copytree(base_of(run), tmp_path / "moved")
    gone = shutil.copytree(run, tmp_path / "run")
    change_description(gone, base_model=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no folder.*nowhere.*--base"):
        export(Options(gone, "adapter", tmp_path / "out"))
    output = export(Options(gone, "adapter", tmp_path / "out", base=str(moved)))
    assert torch.equal(logits(load_adapter(output)), logits(load_adapter(run / "adapter")))


def change_description(run: Path, **values) -> None:
    """Overwrite fields of a run's sorsa_config.json."""
    adapter_file.write_description(run / "adapter", replace(adapter_file.read_description(run / "adapter"), **values))


def _flip(run):
    base = base_of(run)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] += 1e-6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def _reshape(run):
    file = base_of(run) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 48}))


def _cut(run):
    file = run / "adapter" / adapter_file.TRAINED
    file.write_bytes(file.read_bytes()[:-100])


def _narrow(run):
    file = run / "adapter" / adapter_file.TRAINED
    tensors = load_file(file)
    save_file({name: t[:, :2].contiguous() if t.dim() == 2 else t[:2] for name, t in tensors.items()}, file)


def _forget(run):
    digests = adapter_file.read_description(run / "adapter").digests
    change_description(run, digests={name: d for name, d in digests.items() if "1.mlp.up_proj" not in name})


LOCKS = []


def _hold(run):
    LOCKS.append(RunLock(run))
    LOCKS[-1].acquire()


@pytest.mark.parametrize("form", ["merged", "lora", "adapter"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "is not the folder of a run"),
        (
            lambda run: (run / "report.json").unlink(),
            "is unfinished: it has no report.json; to go on with it: .*--resume",
        ),
        (lambda run: (run / "report.json").write_text("{"), "report.json is damaged"),
        (_hold, "still trains"),
        (_flip, "up_proj.weight is not the weight that was trained on: this is another base"),
        (lambda run: save("qwen3", base_of(run)), "wrong base model"),
        (_reshape, "config.json and weights do not belong together"),
        (_cut, "trained_factors.safetensors: missing, truncated"),
        (lambda run: (run / "adapter" / adapter_file.INITIAL).unlink(), "initial_factors.safetensors: missing"),
        (_narrow, "has other shapes than in this model"),
        (_forget, "no digest of model.layers.1.mlp.up_proj.weight"),
        (lambda run: (base_of(run) / "model.safetensors").unlink(), "no model.safetensors"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(runs, tmp_path, form, spoil, message):
    run = shutil.copytree(runs("llama"), tmp_path / "run")
    base = shutil.copytree(base_of(run), tmp_path / "base")
    change_description(run, base_model=str(base))
    before = set(tmp_path.rglob("*"))
    spoil(run)
    with pytest.raises(ValueError, match=message):
        export(Options(run, form, tmp_path / "out"))
    assert {path for path in tmp_path.rglob("*") if path.name != ".lock"} <= before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "merged", "rank": 4}, "--rank goes with --format lora"),
        ({"form": "lora", "dtype": "float16"}, "--dtype goes with --format merged"),
        ({"form": "adapter", "max_shard_size": "1GB"}, "--max_shard_size goes with --format merged"),
        ({"form": "lora", "rank": 0}, "at least rank 1"),
        ({"form": "merged", "max_shard_size": "large"}, "--max_shard_size large: write it as 5GB"),
        ({"form": "lora", "private": True}, "--private goes with --push_to_hub"),
    ],
)
def test_options_that_mean_nothing_are_refused(runs, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export(Options(runs("llama"), options.pop("form"), tmp_path / "out", **options))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(runs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("dear to me")
    with pytest.raises(ValueError, match="is not an empty folder"):
        export(Options(runs("llama"), "lora", tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    export(Options(runs("llama"), "lora", tmp_path / "empty"))


def test_a_full_disk_leaves_nothing(runs, tmp_path, monkeypatch):
    written = []

    def full(tensor):
        written.append(tensor)
        if len(written) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return raw(tensor)

    raw = tensor_file.raw
    monkeypatch.setattr(tensor_file, "raw", full)
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\)"):
        export(Options(runs("llama"), "merged", tmp_path / "out"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="would take 0.0 GB"):
        export(Options(runs("llama"), "merged", tmp_path / "out"))


def test_a_killed_export_looks_unfinished_and_is_cleared_away(runs, tmp_path):
    run = runs("llama")
    if (child := os.fork()) == 0:
        tensor_file.raw = lambda tensor: os.kill(os.getpid(), signal.SIGKILL)
        export(Options(run, "merged", tmp_path / "out"))
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    [left] = [path.name for path in tmp_path.iterdir()]
    assert left.startswith(".out.") and left.endswith(".tmp")
    export(Options(run, "merged", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_the_lock_of_a_run_ends_with_its_process(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom sorsa_ds.runtime.folder_lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1]))\nlock.acquire()\nprint('held', flush=True)\ntime.sleep(60)"
    )
    assert not is_held(tmp_path)
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"held\n"
        assert is_held(tmp_path)
        with pytest.raises(ValueError, match="is in use"):
            RunLock(tmp_path).acquire()
        child.kill()
    assert not is_held(tmp_path)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert is_held(tmp_path)
    lock.release()
    assert not is_held(tmp_path)


@pytest.mark.parametrize("form", ["merged", "lora", "adapter"])
def test_the_card_tells_where_it_comes_from_and_nothing_of_this_machine(runs, tmp_path, form):
    run = runs("llama", precision="mixed")
    card = (export(Options(run, form, tmp_path / "out")) / "README.md").read_text()
    for told in ("library_name:", "# llama, fine-tuned with SORSA", "| rank | 4 |", "gamma = 0.0002", "all-linear",
                 "word-problems", "| held-out loss after | 1.125 |", "PATH_OF_THIS_FOLDER"):  # fmt: skip
        assert told in card, told
    assert ("without that rounding" in card) is (form == "lora")
    assert str(tmp_path) not in card
    assert str(base_of(run).parent) not in card
    assert "base_model:" not in card


class Hub:
    """A stand-in for huggingface_hub.HfApi: the two calls, with its signatures."""

    called: list = []  # noqa: RUF012
    refuse = False

    def create_repo(self, repo_id, *, private=None, repo_type=None, exist_ok=False):
        if self.refuse:
            raise OSError("401: no token")
        self.called.append(("create", repo_id, private))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message=None):
        self.called.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_publishing(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "HfApi", Hub)
    monkeypatch.setattr(hub, "check_logged_in", lambda: None)
    export(Options(runs("llama"), "lora", tmp_path / "out", push_to_hub="mine", private=True))
    assert Hub.called == [
        ("create", "mine", True),
        ("upload", "me/mine", ["README.md", "adapter_config.json", "adapter_model.safetensors"]),
    ]
    monkeypatch.setattr(Hub, "refuse", True)
    with pytest.raises(ValueError, match=r"--push_to_hub mine: 401: no token\nThe export itself is whole: .*kept"):
        export(Options(runs("llama"), "lora", tmp_path / "kept", push_to_hub="mine"))
    PeftModel.from_pretrained(plainly(base_of(runs("llama"))), tmp_path / "kept")


def test_publishing_without_a_login_is_refused_before_anything_is_exported(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"--push_to_hub mine: you are not logged in .*hf auth login.*hf upload mine"):
        export(Options(runs("llama"), "lora", tmp_path / "out", push_to_hub="mine"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shard"), [("embedded", "30MB"), ("stories260k", "300KB")])
def test_a_real_model(name, shard, request, tmp_path):
    if name == "embedded":
        base = request.getfixturevalue("small_real_model")
    else:
        base = request.getfixturevalue("shared_data") / "models" / name
    run = finished_run(base, tmp_path / "run", rank=8)
    theirs = logits(load_adapter(run / "adapter"))
    merged = export(Options(run, "merged", tmp_path / "merged", max_shard_size=shard))
    assert relative(logits(plainly(merged, dtype=torch.float32)), theirs) < 1e-5
    assert AutoTokenizer.from_pretrained(merged)("Once upon")["input_ids"]
    lora = export(Options(run, "lora", tmp_path / "lora"))
    assert relative(logits(PeftModel.from_pretrained(plainly(base, dtype=torch.float32), lora)), theirs) < 1e-4


@pytest.mark.slow
def test_the_command(runs, tmp_path):
    command = ["launch/export.py", "--run", runs("llama"), "--output", tmp_path / "out"]
    done = outcome_forked(tmp_path, *command, "--format", "lora", "--rank", "4")
    assert done.returncode == 0, done.stderr
    assert "--max-lora-rank 8 " in done.stdout
    assert "Cut to rank 4: relative error" in done.stdout
    done = outcome_forked(tmp_path, *command, "--format", "merged")
    assert done.returncode == 2
    assert "is not an empty folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_as_the_trainer_leaves_it(project, tmp_path):
    _, run, _ = launch_forked(project, "exported", ranks=1, ds="stage0")
    theirs = logits(load_adapter(run / "adapter"))
    base = plainly(project / "model")
    assert relative(logits(base), theirs) > 1e-4
    assert relative(logits(plainly(export(Options(run, "merged", tmp_path / "merged")))), theirs) < 1e-5
    lora = export(Options(run, "lora", tmp_path / "lora"))
    assert relative(logits(PeftModel.from_pretrained(base, lora)), theirs) < 1e-5
    held_out = json.loads((run / "report.json").read_text())["eval_loss_end"]
    assert f"| held-out loss after | {held_out:.4g} |" in (lora / "README.md").read_text()
