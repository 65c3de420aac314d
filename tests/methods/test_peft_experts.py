"""LoRA on experts that a model holds as one parameter: the numbers of PEFT's own loop, on every ZeRO stage."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from sorsa_ds import load_adapter
from sorsa_ds.config.schema import AdapterConfig, LoadingConfig, RunConfig, TrainConfig
from sorsa_ds.config.yaml_io import to_yaml
from sorsa_ds.evaluate import models
from sorsa_ds.export.command import Options, export
from sorsa_ds.methods import settings
from sorsa_ds.methods.registry import METHODS, method_of
from sorsa_ds.model import adapter_file
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.model_facts import facts
from sorsa_ds.runtime.precision import resolve_precision
from tests.helpers.distances import relative
from tests.helpers.engines import MICRO, RATE, STEPS, WARMUP, ds_config, micro_losses, sequences, whole_factors
from tests.helpers.expert_models import save_experts
from tests.helpers.finished import REPORT
from tests.helpers.plans import bytes_saved
from tests.helpers.reference import peft_loop
from tests.helpers.worlds import run_ranks

CPU = torch.device("cpu")
RANK, EXPERT_RANK, ALPHA, CLIP = 3, 2, 6.0, 0.5
INPUT = torch.arange(1, 49).view(2, 24) % 60


def config_of(model="base", method="lora", **adapter) -> RunConfig:
    return RunConfig(
        model=str(model), method=method,
        adapter=AdapterConfig(**{"rank": RANK, "expert_rank": EXPERT_RANK, "alpha": ALPHA} | adapter),
        train=TrainConfig(learning_rate=RATE, precision="fp32", global_batch_size=8),
    )  # fmt: skip


def loaded(folder, ds: dict, method="lora", **adapter):
    from sorsa_ds.model.load import load_adapted_model
    from sorsa_ds.model.sharding import Whole, Zero3
    from sorsa_ds.sorsa.residual_storage import Dense

    config, formats = config_of(method=method, **adapter), resolve_precision("fp32", None, "cpu")
    return load_adapted_model(
        folder, method_of(config).operation(config, formats, Dense(formats.residual_dtype), CPU),
        loading=LoadingConfig(),
        placement=Zero3(ds, CPU) if ds["zero_optimization"]["stage"] == 3 else Whole(CPU), device=CPU,
    )  # fmt: skip


def train_with_engine(folder, stages, checkpointing):
    """Train on each stage in this world; returns trained tensors at the start and the end, and the norms, on rank 0."""
    from sorsa_ds.engine.engine import SorsaEngine
    from sorsa_ds.engine.optimizers import adamw
    from sorsa_ds.engine.schedules import cosine_with_warmup
    from sorsa_ds.runtime import collectives
    from sorsa_ds.train.setup import checkpoint_activations

    results = []
    for stage in stages:
        ds = ds_config(stage, "", CLIP, 2)
        if stage == 3:
            # No parameter is whole by luck: each is gathered for the module that needs it, and freed at once.
            lean = ("param_persistence_threshold", "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
            ds["zero_optimization"] |= {f"stage3_{name}": 0 for name in lean}
        model = loaded(folder, ds)
        if checkpointing:
            checkpoint_activations(model.model)
        engine = SorsaEngine(
            model.model, ds, adamw(RATE, (0.9, 0.999), 1e-8, 0.0), cosine_with_warmup(STEPS, WARMUP), None,
            model.exact_factors,
        )  # fmt: skip
        start, norms = whole_factors(engine), []
        for t in range(STEPS):
            batch = sequences(MICRO * collectives.world_size() * 2, seed=t)
            norms.append(engine.train_step(micro_losses(engine, batch, 2)).grad_norm)
        results.append((start, whole_factors(engine), norms))
        engine.destroy()
    return results if collectives.rank() == 0 else None


def saved_by_autograd(folder, length):
    """Bytes that a forward pass in fp32 keeps for backward."""
    from sorsa_ds.engine.engine import SorsaEngine
    from sorsa_ds.engine.optimizers import adamw
    from sorsa_ds.engine.schedules import cosine_with_warmup

    ds = ds_config(0, "", 0.0, 1)
    model = loaded(folder, ds)
    engine = SorsaEngine(
        model.model, ds, adamw(RATE, (0.9, 0.999), 1e-8, 0.0), cosine_with_warmup(STEPS, WARMUP), None,
        model.exact_factors,
    )  # fmt: skip
    return bytes_saved(engine, length)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_plan_counts_the_weights_of_all_experts_that_peft_makes_in_a_forward_pass(tmp_path, name):
    folder, length = save_experts(name, tmp_path / "model"), 60
    config = config_of(folder)
    config = replace(
        config, data=replace(config.data, max_length=length), train=replace(config.train, micro_batch_size=MICRO)
    )
    kept = facts(folder, Job.of(config, {"zero_optimization": {"stage": 0}}, Hardware(gpus=1))).kept
    assert kept.counted
    [saved] = run_ranks(1, saved_by_autograd, folder, length)
    assert kept.rest + sum(kept.blocks) == pytest.approx(saved, rel=0.1)


def wrapped(folder, targets):
    """What a user of PEFT builds: linears as modules, experts as parameters."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parameters = [target.name for target in targets if target.experts]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM",
        target_modules=[target.name for target in targets if not target.experts], target_parameters=parameters,
        rank_pattern=dict.fromkeys(parameters, EXPERT_RANK),
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def trainable(model) -> dict[str, torch.Tensor]:
    inner = model.base_model.model
    return {name: p.detach().clone() for name, p in inner.named_parameters() if p.requires_grad}


def targets_of(folder):
    return METHODS["lora"].choose(skeleton(folder, LoadingConfig()), config_of().adapter).targets


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
@pytest.mark.parametrize(
    ("name", "stages", "checkpointing"),
    [("mixtral", (0, 1, 2, 3), False), ("gpt_oss", (3,), True)],
)
def test_ten_steps_equal_pefts_own_loop(tmp_path, name, stages, checkpointing):
    folder = save_experts(name, tmp_path / "model")
    results = run_ranks(2, train_with_engine, folder, stages, checkpointing)[0]
    model = wrapped(folder, targets_of(folder))
    own, start = dict(model.base_model.model.named_parameters()), results[0][0]
    with torch.no_grad():
        for leaf, value in start.items():
            assert own[leaf].shape == value.shape
            own[leaf].copy_(value)
    assert start.keys() == trainable(model).keys()
    batches = [sequences(MICRO * 2 * 2, seed=t) for t in range(STEPS)]
    peft_loop(model.train(), batches, rate=RATE, clip=CLIP, steps=STEPS, warmup=WARMUP)
    expected = trainable(model)
    for stage, (begun, end, norms) in zip(stages, results, strict=True):
        assert max(norms) > CLIP, "the clip is part of what is compared"
        for leaf, value in end.items():
            assert torch.equal(begun[leaf], start[leaf]), f"stage {stage}: {leaf} begins elsewhere"
            gap = (value - expected[leaf]).norm() / expected[leaf].norm()
            assert gap < 1e-5, f"stage {stage}: {leaf} is {gap:.1e} off"


def peft_run(base, folder, method="lora", **adapter):
    """A finished run of a method of PEFT's without the trainer, and the values of all that it has trained."""
    model = loaded(base, ds_config(0, "", 0.0, 1), method, **adapter)
    generator = torch.Generator().manual_seed(0)
    initial = {name: p.detach().clone() for name, p in model.model.named_parameters() if p.requires_grad}
    trained = {name: 0.2 * torch.randn(value.shape, generator=generator) for name, value in initial.items()}
    (folder / "adapter").mkdir(parents=True)
    save_file(initial, folder / "adapter" / adapter_file.INITIAL)
    save_file(trained, folder / "adapter" / adapter_file.TRAINED)
    config = config_of(base, method, **adapter)
    adapter_file.describe_adapter(folder / "adapter", config, model.targets, model.digests)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "report.json").write_text(json.dumps(REPORT))
    return folder, trained


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(INPUT).logits.float()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4", "glm4_moe"])
def test_a_run_computes_in_every_form_what_pefts_model_computes(tmp_path, name):
    base = save_experts(name, tmp_path / "base")
    run, trained = peft_run(base, tmp_path / "run")
    before = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    ours = load_adapter(run / "adapter")
    theirs = wrapped(base, targets_of(base)) if name != "glm4_moe" else None
    if theirs is not None:
        own = dict(theirs.base_model.model.named_parameters())
        with torch.no_grad():
            for leaf, value in trained.items():
                own[leaf].copy_(value)
        assert relative(logits(ours), logits(theirs)) < 1e-5
    expected = logits(ours)
    assert relative(before, expected) > 0.05

    export(Options(run, "merged", tmp_path / "merged"))
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected) < 1e-5
    for form in ("lora", "adapter"):
        export(Options(run, form, tmp_path / form))
        fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        assert relative(logits(peft.PeftModel.from_pretrained(fresh, tmp_path / form)), expected) < 1e-5, form
    plain = models.find_evaluated_model(str(run)).load(CPU, torch.float32)
    assert relative(logits(plain), expected) < 1e-5
    kinds = {type(module) for module in AutoModelForCausalLM.from_pretrained(base).modules()}
    assert {type(module) for module in plain.modules()} == kinds


def test_a_linear_that_peft_would_take_for_an_experts_is_refused_where_it_stays_a_linear(tmp_path):
    base = save_experts("glm4_moe", tmp_path / "base")
    run, _ = peft_run(base, tmp_path / "run", "dora")
    with pytest.raises(ValueError, match=r"PEFT would take model.layers.0.mlp.gate_proj for the linear of an expert"):
        export(Options(run, "adapter", tmp_path / "adapter"))


def test_where_peft_cannot_adapt_experts_they_are_left_out_or_refused(tmp_path):
    dbrx = skeleton(save_experts("dbrx", tmp_path / "dbrx"), LoadingConfig())
    mixtral = skeleton(save_experts("mixtral", tmp_path / "mixtral"), LoadingConfig())
    flat = METHODS["lora"].choose(dbrx, config_of().adapter)
    assert not any(target.experts for target in flat.targets)
    assert "PEFT takes experts in a parameter of two dimensions for one matrix" in dict(flat.rows())["left out"]
    for method in ("pissa", "olora", "dora", "adalora"):
        selection = METHODS[method].choose(mixtral, config_of().adapter)
        assert not any(target.experts for target in selection.targets)
        assert "only SORSA and LoRA adapt experts" in dict(selection.rows())["left out"]
    assert [method.title for method in METHODS.values() if not method.refused_experts] == ["SORSA", "LoRA"]
    with pytest.raises(ValueError, match=r"adapter.dropout=0.1: PEFT's LoRA has no dropout for experts .*gate_up_proj"):
        loaded(tmp_path / "mixtral", ds_config(0, "", 0.0, 1), dropout=0.1)
    loaded(tmp_path / "mixtral", ds_config(0, "", 0.0, 1), dropout=0.1, experts="frozen")


def test_settings_of_experts_mean_something_to_lora_and_nothing_to_the_others():
    formats = resolve_precision("fp32", None, "cpu")
    settings.check_settings(config_of(experts="frozen", expert_rank=4), 3, formats)
    for method in ("pissa", "dora", "adalora"):
        with pytest.raises(ValueError, match=f"method {method} has no use for .*adapter.expert_rank=4"):
            settings.check_settings(replace(config_of(expert_rank=4), method=method), 2, formats)
