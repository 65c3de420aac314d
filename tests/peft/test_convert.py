"""A trainer's adapter and PEFT's are one another's: the same tensors, and models that compute the same."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sorsa_ds.model.adapter_file import CONFIG, INITIAL, TRAINED
from sorsa_ds.peft import SorsaConfig
from sorsa_ds.peft.convert import from_peft, to_peft
from sorsa_ds.run.reload import load_adapter
from tests.helpers.finished import finished_run
from tests.helpers.projects import ROOT

MODEL, EARLIER = ROOT / "tests" / "golden" / "model", ROOT / "tests" / "fixtures" / "run_of_0.1.0" / "adapter"
INPUT = torch.arange(1, 25).view(2, 12) % 64


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUT).logits


def peft_model(base, adapter, **options):
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter, **options
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha": 6.0, "dropout": 0.1, "rank_pattern": {"down_proj": 2}, "targets": ["down_proj", "q_proj"]},
        {"alpha": 6.0, "rslora": True, "rank_pattern": {"down_proj": 2}},
    ],
)
def test_a_trainers_adapter_computes_in_peft_what_it_computes_in_the_trainer(tiny_llama, tmp_path, settings):
    run = finished_run(tiny_llama, tmp_path / "run", **settings)
    to_peft(run / "adapter", tmp_path / "peft")
    ours, theirs = load_adapter(run / "adapter"), peft_model(tiny_llama, tmp_path / "peft")
    base = logits(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
    assert (logits(ours) - base).abs().max() > 0.1
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    config = theirs.peft_config["default"]
    assert (config.sorsa_alpha, config.sorsa_dropout) == (settings.get("alpha"), settings.get("dropout", 0.0))
    assert config.base_model_name_or_path == str(tiny_llama)


def test_there_and_back_is_the_same_to_the_bit(tiny_llama, tmp_path):
    run = finished_run(tiny_llama, tmp_path / "run", alpha=6.0, rslora=True, rank_pattern={"down_proj": 2})
    to_peft(run / "adapter", tmp_path / "peft")
    from_peft(tmp_path / "peft", tmp_path / "back")
    for name in (TRAINED, INITIAL):
        before, after = load_file(run / "adapter" / name), load_file(tmp_path / "back" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    ours, theirs = (json.loads((folder / CONFIG).read_text()) for folder in
                    (run / "adapter", tmp_path / "back"))  # fmt: skip
    assert ours["layers"] == theirs["layers"]
    assert ours["adapter"]["alpha"] == theirs["adapter"]["alpha"] == 6.0
    assert ours["adapter"]["rslora"] == theirs["adapter"]["rslora"] is True
    assert torch.equal(logits(load_adapter(tmp_path / "back")), logits(load_adapter(run / "adapter")))


def test_an_adapter_that_peft_made_computes_the_same_in_the_trainer(tiny_llama, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = get_peft_model(model, SorsaConfig(r=3, target_modules="all-linear", sorsa_alpha=5.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sorsa_factors." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape) * parameter.std(correction=0))
    model.save_pretrained(tmp_path / "peft")
    from_peft(tmp_path / "peft", tmp_path / "ours")
    again = load_adapter(tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert "is not checked" in capsys.readouterr().out  # the base model's digests
    # And on: what the trainer wrote goes back.
    to_peft(tmp_path / "ours", tmp_path / "again")
    torch.testing.assert_close(logits(peft_model(tiny_llama, tmp_path / "again")), logits(model), rtol=1e-6, atol=1e-6)


def test_an_adapter_of_an_earlier_version_is_converted(tmp_path):
    to_peft(EARLIER, tmp_path)
    ours = load_adapter(EARLIER, base=str(MODEL))
    torch.testing.assert_close(logits(peft_model(MODEL, tmp_path)), logits(ours), rtol=1e-4, atol=1e-4)


def test_over_a_quantised_residual_it_is_the_same_change_of_the_pre_trained_weights(tiny_llama, tmp_path):
    run = finished_run(tiny_llama, tmp_path / "run", storage="nf4")
    to_peft(run / "adapter", tmp_path / "peft")
    model = peft_model(tiny_llama, tmp_path / "peft")
    name = "model.layers.0.self_attn.q_proj"
    own = {leaf: [load_file(run / "adapter" / file)[f"{name}.{leaf}"].double() for file in (TRAINED, INITIAL)]
           for leaf in ("U", "s", "V")}  # fmt: skip
    now, begun = ((own["U"][at] * own["s"][at]) @ own["V"][at].T for at in (0, 1))
    layer = model.get_submodule(f"base_model.model.{name}")
    torch.testing.assert_close(layer.get_delta_weight("default").double(), now - begun, rtol=1e-5, atol=1e-5)


def described(folder, name=CONFIG, **changes):
    """Change entries of an adapter's description."""
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_pefts_layers_cannot_hold_is_refused(tiny_llama, tmp_path):
    adapter = finished_run(tiny_llama, tmp_path / "run") / "adapter"
    described(adapter, method="lora")
    with pytest.raises(ValueError, match="an adapter of the method lora, which PEFT has itself"):
        to_peft(adapter, tmp_path / "peft")
    described(adapter, method="sorsa", new_tokens={"<new>": 63})
    with pytest.raises(ValueError, match="has embeddings of new tokens"):
        to_peft(adapter, tmp_path / "peft")
    layers = json.loads((adapter / CONFIG).read_text())["layers"]
    described(adapter, new_tokens={}, layers={name: {**one, "experts": 2} for name, one in layers.items()})
    with pytest.raises(ValueError, match="of experts, which are one parameter"):
        to_peft(adapter, tmp_path / "peft")
    described(adapter, layers=layers)
    file = adapter / TRAINED
    save_file(load_file(file) | {"model.norm.weight": torch.ones(40)}, file)
    with pytest.raises(ValueError, match=r"model\.norm\.weight, which was trained whole"):
        to_peft(adapter, tmp_path / "peft")
    with pytest.raises(ValueError, match="not the description of an adapter"):
        to_peft(tmp_path / "nothing", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_what_is_no_sorsa_adapter_of_peft_is_refused(tiny_llama, tmp_path):
    def base():
        return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)

    get_peft_model(base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="PEFT's method PeftType.LORA, not of SORSA"):
        from_peft(tmp_path / "lora", tmp_path / "ours")
    saved = SorsaConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    get_peft_model(base(), saved).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"modules_to_save=\['norm'\]"):
        from_peft(tmp_path / "saved", tmp_path / "ours")
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        from_peft(tmp_path / "nothing", tmp_path / "ours")
    get_peft_model(base(), SorsaConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    lacking = "base_model.model.model.layers.0.self_attn.q_proj.sorsa_initial.s"
    save_file({name: value for name, value in tensors.items() if name != lacking}, file)
    with pytest.raises(ValueError, match=r"has no sorsa_initial of model\.layers\.0\.self_attn\.q_proj\.s"):
        from_peft(tmp_path / "peft", tmp_path / "ours")
    save_file(tensors, file)
    described(tmp_path / "peft", "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="names no base model"):
        from_peft(tmp_path / "peft", tmp_path / "ours")
    from_peft(tmp_path / "peft", tmp_path / "ours", base_model=str(tiny_llama))
    assert load_adapter(tmp_path / "ours").config.model_type == "llama"
