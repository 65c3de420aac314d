"""Parameters that are made of several stored tensors: as transformers loads them, and back as they were stored."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.core_model_loading import Chunk, Concatenate, PermuteForRope, Split, Transpose, WeightConverter

from sorsa_ds.config.schema import AdapterConfig, LoadingConfig
from sorsa_ds.model.pretrained import PretrainedWeights
from sorsa_ds.model.sharding import Whole, Zero3
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.model.weight_conversion import Conversion, ModelFacts
from sorsa_ds.model.weight_sources import DiskWeightSource
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.precision import resolve_precision
from tests.helpers.architectures import exactly
from tests.helpers.engines import INPUT, logits_and_gradients
from tests.helpers.expert_models import EXPERT_CONFIGS, STORED_MERGED, save_experts
from tests.helpers.sorsa_models import load_sorsa_model
from tests.helpers.worlds import run_ranks

CPU = torch.device("cpu")
GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model of each architecture, saved by transformers."""
    root = tmp_path_factory.mktemp("experts")
    return {name: save_experts(name, root / name) for name in EXPERT_CONFIGS}


def opened(folder):
    """The weights of a folder, and where each parameter comes from."""
    weights = PretrainedWeights(folder)
    return weights, weights.origins(skeleton(folder, LoadingConfig()))


def conversions(origins) -> list[Conversion]:
    """All groups of stored tensors that are converted."""
    return list(dict.fromkeys(origin.conversion for origin in origins.values() if origin.conversion is not None))


@pytest.mark.parametrize("name", EXPERT_CONFIGS)
def test_every_parameter_is_the_one_that_transformers_loads_and_is_stored_again_as_it_was(folders, name):
    folder = folders[name]
    weights, origins = opened(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert origins.keys() == theirs.keys()
    for parameter, tensor in theirs.items():
        ours = weights.parameter(origins[parameter])
        assert ours.dtype == tensor.dtype, parameter
        assert torch.equal(ours, tensor), parameter
    groups, stored = conversions(origins), load_file(folder / "model.safetensors")
    assert bool(groups) == (name not in STORED_MERGED)
    for group in groups:
        back = group.revert({parameter: weights.parameter(origins[parameter]) for parameter in group.parameters})
        assert [*back] == group.names
        assert all(torch.equal(back[one], stored[one]) for one in back)


def test_only_the_tensors_of_a_parameter_are_read(folders, monkeypatch):
    folder, read = folders["mixtral"], []
    source = DiskWeightSource.of_model(folder, skeleton(folder, LoadingConfig()), {})
    monkeypatch.setattr(PretrainedWeights, "read", lambda self, name, own=PretrainedWeights.read: (
        read.append(name), own(self, name))[1])  # fmt: skip
    tensor = source.parameter(DOWN)
    assert read == [f"model.layers.1.block_sparse_moe.experts.{number}.w2.weight" for number in range(12)]
    assert source.digests == {DOWN: digest.of_tensor(tensor)}
    read.clear()
    source.parameter(GATE_UP)
    assert len(read) == 24
    assert {name.rpartition("experts.")[2].partition(".")[2] for name in read} == {"w1.weight", "w3.weight"}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe"])
def test_an_adapted_mixture_of_experts_starts_as_the_pre_trained_one(folders, name):
    loaded = load(folders[name], Whole(CPU))
    with torch.no_grad():
        assert_close(loaded.model.eval()(INPUT).logits, folders[name])


def load(folder, placement):
    """A SORSA model of a folder."""
    return load_sorsa_model(
        folder, adapter=AdapterConfig(rank=4, targets=["o_proj"]),
        precision=resolve_precision("fp32", None, "cpu"), placement=placement, device=CPU, factor_source=exactly,
    )  # fmt: skip


def assert_close(logits, folder):
    """The logits are those of transformers' own load."""
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()(INPUT).logits
    assert (logits - theirs).norm() < 1e-5 * theirs.norm()


def _zero3_start(folder):
    """Every frozen parameter of a model on ZeRO-3, whole, and the logits at step 0."""
    import deepspeed

    ds = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
          "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}}  # fmt: skip
    model = load(folder, Zero3(ds, CPU)).model
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.numel() == 0
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
    return found, logits_and_gradients(model, ds)[0]


def test_experts_that_are_stored_one_by_one_are_cut_over_the_ranks_of_zero3(folders):
    theirs = AutoModelForCausalLM.from_pretrained(folders["mixtral"]).state_dict()
    for ours, logits in run_ranks(2, _zero3_start, folders["mixtral"]):
        assert {GATE_UP, DOWN} <= ours.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items() if name in theirs)
        assert_close(logits, folders["mixtral"])


EXPERT = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT.format(5, "w1")),
         rf"lacks {EXPERT.format(5, 'w1')}, of which {GATE_UP} is made together with .*experts.0.w1.weight \[24, 32\] "
         r"and 22 more; download the model again"),
        (lambda t: [t.pop(EXPERT.format(n, "w2")) for n in (3, 7)],
         rf"lacks {EXPERT.format(3, 'w2')} \(and 1 more\), of which {DOWN} is made"),
        (lambda t: t.pop(EXPERT.format(11, "w2")),
         rf"{EXPERT.format(0, 'w2')} \[32, 24\] and 10 more make a tensor of shape \[11, 32, 24\], the model's {DOWN} "
         r"\[12, 32, 24\]: config.json and weights do not belong together"),
        (lambda t: [t.pop(EXPERT.format(n, "w3")) for n in range(12)],
         rf"{GATE_UP} cannot be made of {EXPERT.format(0, 'w1')} \[24, 32\] and 11 more and nothing that matches "
         r".experts.\*.w3.weight: "),
        (lambda t: t.update({EXPERT.format(2, "w1"): t[EXPERT.format(2, "w1")].bfloat16()}),
         rf"{EXPERT.format(2, 'w1')} \(BF16\) and {EXPERT.format(0, 'w1')} \(F32\) make one parameter, {GATE_UP}, and "
         r"have different dtypes; convert them to one"),
        (lambda t: t.update({EXPERT.format(2, "w1"): t[EXPERT.format(2, "w1")][:-1]}),
         rf"{GATE_UP} cannot be made of .*experts.0.w1.weight \[24, 32\] and 23 more: stack expects"),
        (lambda t: t.update({n: v.to(torch.float8_e4m3fn) for n, v in t.items() if ".experts." in n}),
         r"experts.0.w1.weight is stored as F8_E4M3; F64, F32, F16, BF16 can be read"),
        (lambda t: t.update({GATE_UP: torch.zeros(12, 48, 32)}),
         rf"{GATE_UP} is stored twice, as {GATE_UP} and as {EXPERT.format(0, 'w1')}; remove the one not meant"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.1.block_sparse_moe.experts" in n],
         rf"lacks 2 parameters of MixtralForCausalLM, first {GATE_UP}, {DOWN}\.$"),
    ],
)  # fmt: skip
def test_experts_that_do_not_fit_are_named(folders, tmp_path, change, message):
    tensors = load_file(folders["mixtral"] / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders["mixtral"] / "config.json").read_bytes())
    with pytest.raises(ValueError, match=re.sub(r"\.(?=\w)", r"\.", message)):
        opened(tmp_path)


def test_a_wrong_configuration_is_named_before_anything_is_read(folders, tmp_path, monkeypatch):
    config = json.loads((folders["qwen3_moe"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 24}))
    (tmp_path / "model.safetensors").write_bytes((folders["qwen3_moe"] / "model.safetensors").read_bytes())
    monkeypatch.setattr(PretrainedWeights, "read", None)
    with pytest.raises(ValueError, match=r"model.safetensors: model.layers.0.mlp.experts.0.gate_proj.weight \[20, 32\] "
                                         r"and 23 more make a tensor of shape \[12, 40, 32\], the model's "
                                         r"model.layers.0.mlp.experts.gate_up_proj \[12, 48, 32\]"):  # fmt: skip
        opened(tmp_path)


@pytest.mark.parametrize("told", [True, False], ids=["in config.json", "by its tensors alone"])
def test_weights_in_mxfp4_are_refused_with_the_way_to_others(folders, tmp_path, told):
    config = json.loads((folders["gpt_oss"] / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "mxfp4"}} if told else {}
    (tmp_path / "config.json").write_text(json.dumps(config | quantised))
    tensors = load_file(folders["gpt_oss"] / "model.safetensors")
    for name in [name for name in tensors if name.endswith("gate_up_proj")]:
        del tensors[name]
        tensors |= {f"{name}_blocks": torch.zeros(4, 48, 1, 16).byte(), f"{name}_scales": torch.zeros(4, 48, 1).byte()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = "quant_method: mxfp4" if told else "It has model.layers.0.mlp.experts.gate_up_proj_blocks"
    found = (
        "quantised \\(quantization_config in config.json: mxfp4\\)" if told else f"{found}: weights that are quantised"
    )
    with pytest.raises(ValueError, match=f"{found}; take a copy of the model in bf16, .*dequantize=True"):
        opened(tmp_path)


class Odd(nn.Module):
    """Parameters for conversions that no family of the tests has."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(8, 6)) for _ in range(3))
        self.joined, self.turned = nn.Parameter(torch.randn(9, 6)), nn.Parameter(torch.randn(2, 3, 5))


@pytest.mark.parametrize(
    ("converter", "shapes"),
    [
        (WeightConverter("qkv", ["q", "k", "v"], [Chunk(dim=0)]), {"qkv": (24, 6)}),
        (WeightConverter("qkv", ["q", "k", "v"], [Chunk(dim=0), PermuteForRope(permute_layer_names=["q", "k"])]),
         {"qkv": (24, 6)}),
        (WeightConverter("both", ["q", "joined"], [Split(dim=0)]), {"both": (17, 6)}),
        (WeightConverter(["a", "b"], "joined", [Concatenate(dim=0)]), {"a": (2, 6), "b": (7, 6)}),
        (WeightConverter("turned", "turned", [Transpose(1, 2, check_dims=True)]), {"turned": (2, 5, 3)}),
    ],
    ids=["one to many", "one to many, permuted", "unequal split", "unequal parts", "transposed for its shape"],
)  # fmt: skip
def test_every_conversion_is_undone(converter, shapes):
    """Those too that transformers' reverse operations would cut or leave in another shape."""
    facts = ModelFacts(LlamaConfig(num_attention_heads=2), dict(Odd().named_parameters()))
    shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
    group = Conversion(converter, converter.target_patterns[0], {name: [name] for name in shapes}, shapes, facts)
    stored = {name: torch.randn(shape) for name, shape in shapes.items()}
    made = group.convert(stored.__getitem__)
    assert {name: t.shape for name, t in made.items()} == {name: facts.parameters[name].shape for name in made}
    back = group.revert(dict(made))
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in stored)
