"""The other methods through our trainer: the numbers of a plain PEFT loop, on every ZeRO stage and number of ranks."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sorsa_ds import load_adapter
from sorsa_ds.config.schema import (
    AdapterConfig,
    BaselineConfig,
    RegularizerConfig,
    ResidualConfig,
    RunConfig,
    SorsaConfig,
    TrainConfig,
)
from sorsa_ds.export.command import Options, export
from sorsa_ds.methods import settings
from sorsa_ds.methods.registry import METHODS as BY_NAME
from sorsa_ds.methods.registry import method_of
from sorsa_ds.model.adapter_file import TRAINED, read_description
from sorsa_ds.model.selection import select_targets
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import memory
from sorsa_ds.plan.model_facts import facts
from sorsa_ds.run.checkpoint.as_run import open_checkpoint
from sorsa_ds.run.checkpoint.folder import LATEST
from sorsa_ds.runtime.precision import resolve_precision
from tests.helpers.engines import MICRO, RATE, STEPS, WARMUP, ds_config, micro_losses, sequences, whole_factors
from tests.helpers.plans import bytes_by_kind, bytes_saved
from tests.helpers.projects import metrics
from tests.helpers.reference import peft_loop
from tests.helpers.runs import rewound, train
from tests.helpers.worlds import run_ranks

CPU = torch.device("cpu")
RANK, CLIP, ALPHA = 3, 0.02, 6.0
ADALORA = BaselineConfig(adalora_init_rank=5, adalora_t_init=1, adalora_t_final=3, adalora_delta_t=2)
BASELINE = {"adalora": ADALORA}
METHODS = ["lora", "pissa", "olora", "dora", "adalora", "full", "partial"]
RUNS = [(method, stage) for method in METHODS for stage in (0, 3) if (method, stage) != ("adalora", 3)]
RUNS += [("lora", 1), ("lora", 2), ("full", 2), ("adalora", 1), ("adalora", 2)]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A random Llama on disk with biases; nothing divides by 2 and 3 at once."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=40, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def config_of(method: str) -> RunConfig:
    """The settings of the tests' runs."""
    layers = {} if method in ("full", "partial") else {"rank": RANK, "alpha": ALPHA}
    return RunConfig(method=method, adapter=AdapterConfig(**layers), baseline=BASELINE.get(method, BaselineConfig()),
                     train=TrainConfig(learning_rate=RATE))  # fmt: skip


def job_of(method: str, stage: int, world: int, precision: str = "fp32", length: int = 12) -> Job:
    """The job that the planner plans for a method."""
    config = config_of(method)
    config = replace(
        config, data=replace(config.data, max_length=length),
        train=replace(config.train, precision=precision, micro_batch_size=MICRO),
    )  # fmt: skip
    given = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    return Job.of(config, given, Hardware(gpus=world))


def build(folder, method: str, ds: dict, precision: str = "fp32"):
    """An engine, as `assemble` makes it."""
    from sorsa_ds.config.schema import LoadingConfig
    from sorsa_ds.engine.optimizers import adamw
    from sorsa_ds.engine.schedules import cosine_with_warmup
    from sorsa_ds.model.load import load_adapted_model
    from sorsa_ds.model.sharding import Whole, Zero3
    from sorsa_ds.sorsa.residual_storage import Dense

    config, formats = config_of(method), resolve_precision(precision, None, "cpu")
    loaded = load_adapted_model(
        folder, method_of(config).operation(config, formats, Dense(formats.residual_dtype), CPU),
        loading=LoadingConfig(),
        placement=Zero3(ds, CPU) if ds["zero_optimization"]["stage"] == 3 else Whole(CPU), device=CPU,
    )  # fmt: skip
    return method_of(config).engine(config, STEPS)(
        loaded.model, ds, adamw(RATE, (0.9, 0.999), 1e-8, 0.0), cosine_with_warmup(STEPS, WARMUP), None,
        loaded.exact_factors,
    )  # fmt: skip


def held(engine) -> dict[str, torch.Tensor]:
    """What this rank holds of the model."""
    return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def _all_runs(folder, runs):
    """Start every run; returns, on every rank, the trained tensors at its start and end (on rank 0), the gradient norms
    and AdaLoRA's ranks by step, what this rank held at the start and the end, and the bytes of its tensors by kind."""
    from sorsa_ds.runtime import collectives

    results = []
    for method, stage in runs:
        ds = ds_config(stage, "", CLIP, 2)
        if stage == 3:
            ds["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        engine = build(folder, method, ds)
        start, ranks, norms = whole_factors(engine), [], []
        began = held(engine)
        for t in range(STEPS):
            batch = sequences(MICRO * collectives.world_size() * 2, seed=t)
            norms.append(engine.train_step(micro_losses(engine, batch, 2)).grad_norm)
            ranks.append(getattr(engine, "ranks", {}))
        results.append((start, whole_factors(engine), norms, ranks, (began, held(engine)), bytes_by_kind(engine)))
        engine.destroy()
    return results


def plain_model(folder, method: str, start: dict) -> torch.nn.Module:
    """What a user of PEFT builds, in its own way, but for the random start, which is ours."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = [t.name for t in select_targets(model, AdapterConfig(rank=1))]
    if method in ("full", "partial"):
        model.requires_grad_(method == "full")
        for name in targets if method == "partial" else []:
            model.get_submodule(name).weight.requires_grad_(True)
        return model.train()
    shared = dict(target_modules=targets, lora_alpha=ALPHA, task_type="CAUSAL_LM")
    if method == "adalora":
        config = peft.AdaLoraConfig(init_r=5, target_r=RANK, tinit=1, tfinal=3, deltaT=2, total_step=STEPS, **shared)
    else:
        how = method if method in ("pissa", "olora") else True
        config = peft.LoraConfig(r=RANK, init_lora_weights=how, use_dora=method == "dora", **shared)
    wrapped = peft.get_peft_model(model, config)
    if method not in ("pissa", "olora"):  # these two decompose; theirs must be ours
        own = dict(wrapped.base_model.model.named_parameters())
        with torch.no_grad():
            for name, value in start.items():
                own[name].copy_(value)
    return wrapped.train()


def trainable(model) -> dict[str, torch.Tensor]:
    """Trained tensors by the names that our engine has for them."""
    inner = model.base_model.model if isinstance(model, peft.PeftModel) else model
    return {n: p.detach().clone() for n, p in inner.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def everyone(tiny_llama):
    """Each rank's results of `RUNS` on two ranks."""
    return run_ranks(2, _all_runs, tiny_llama, RUNS)


@pytest.mark.slow
def test_every_method_takes_the_steps_of_a_plain_loop(tiny_llama, everyone):
    for (method, stage), (start, end, norms, ranks, *_) in zip(RUNS, everyone[0], strict=True):
        label = f"{method}, stage {stage}"
        model = plain_model(tiny_llama, method, start)
        for name, value in trainable(model).items():
            assert (start[name] - value).norm() <= 1e-5 * value.norm(), f"{label}: {name} begins elsewhere"
        batches = [sequences(MICRO * 2 * 2, seed=t) for t in range(STEPS)]
        peft_loop(model, batches, rate=RATE, clip=CLIP, steps=STEPS, warmup=WARMUP)
        expected = trainable(model)
        assert start.keys() == end.keys() == expected.keys(), label
        for name, value in end.items():
            if name.endswith("k_proj.bias"):
                continue  # softmax does not see it: its gradient is rounding alone, which Adam makes whole steps of
            gap = (value - expected[name]).norm() / expected[name].norm().clamp_min(1e-30)
            assert gap < 1e-5, f"{label}: {name} is {gap:.1e} off"
        assert max(norms) > CLIP, "the clip is part of what is compared"
        if method == "adalora":
            masks = model.base_model.peft_config["default"].rank_pattern
            assert ranks[-1] == {name: sum(mask) for name, mask in masks.items()}, label


@pytest.mark.slow
def test_adalora_keeps_to_its_budget(everyone):
    """The cubic schedule of the AdaLoRA paper, eq. 12, by hand; and what is taken away stays away."""
    _, end, _, ranks, *_ = everyone[0][RUNS.index(("adalora", 2))]
    layers, begin, rest, t_init, t_final, every = 14, 5, RANK, 1, 3, 2
    last = STEPS - t_final
    expected, budget = [], None
    for t in range(1, STEPS + 1):
        if t_init < t < last and t % every == 0:
            budget = int(layers * (rest + (begin - rest) * (1 - (t - t_init) / (last - t_init)) ** 3) + 1e-9)
        if t == last:
            budget = layers * rest
        expected.append(budget)
    assert [sum(found.values()) if found else None for found in ranks] == expected
    assert sum(int((value != 0).sum()) for name, value in end.items() if "lora_E" in name) == layers * rest


@pytest.mark.slow
def test_all_ranks_and_all_worlds_start_and_stay_alike(tiny_llama, everyone):
    runs = [run for run in RUNS if run[1] == 0]
    alone = run_ranks(1, _all_runs, tiny_llama, runs)[0]
    for i, (method, stage) in enumerate(runs):
        ranks = [rank[RUNS.index((method, stage))][4] for rank in everyone]
        for rank, (began, ended) in enumerate(ranks):
            for name, value in alone[i][4][0].items():
                assert torch.equal(began[name], value), f"{method}: {name} begins apart on rank {rank}"
            for name, value in ranks[0][1].items():
                assert torch.equal(ended[name], value), f"{method}: {name} ends apart on rank {rank}"


@pytest.mark.slow
def test_the_plan_knows_what_every_method_holds(tiny_llama, everyone):
    for i, (method, stage) in enumerate(RUNS):
        job = job_of(method, stage, world=2)
        model = facts(tiny_llama, job)
        planned = memory(job, model).gpu
        for name in ("residual", "frozen", "trained", "masters", "moments"):
            largest = max(rank[i][-1].get(name, 0) for rank in everyone)
            assert planned[name] == largest, (method, stage, name)
        assert model.trainable == sum(value.numel() for value in everyone[0][i][0].values())


def _saved(folder, method, precision, length):
    ds = ds_config(0, "", 0.0, 1)
    if precision == "mixed":
        ds["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return bytes_saved(build(folder, method, ds, precision), length)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "mixed"])
def test_the_plan_knows_what_every_method_keeps_for_backward(tiny_llama, precision):
    for method in METHODS:
        kept = facts(tiny_llama, job_of(method, 0, 1, precision, length=60)).kept
        [saved] = run_ranks(1, _saved, tiny_llama, method, precision, 60)
        assert kept.counted
        assert kept.rest + sum(kept.blocks) == pytest.approx(saved, rel=0.1), method


@pytest.mark.slow
def test_parameter_counts_are_those_of_sorsa_but_for_its_singular_values(tiny_llama, everyone):
    """LoRA r (m + n), SORSA and AdaLoRA r (m + n + 1), DoRA r (m + n) + m."""
    from sorsa_ds.config.schema import LoadingConfig

    model = skeleton(tiny_llama, LoadingConfig())
    targets = select_targets(model, AdapterConfig(rank=RANK))
    sizes = [(t.out_features, t.in_features) for t in targets]
    config = {method: RunConfig(method=method, adapter=AdapterConfig(rank=RANK)) for method in METHODS}
    counts = {
        method: sum(value.numel() for value in start.values())
        for (method, _), (start, *_) in zip(RUNS, everyone[0], strict=True)
    }
    lora = sum(RANK * (m + n) for m, n in sizes)
    assert counts["lora"] == counts["pissa"] == counts["olora"] == lora
    assert counts["dora"] == lora + sum(m for m, _ in sizes)
    assert counts["adalora"] == sum(5 * (m + n + 1) for m, n in sizes)  # its rank at the start is 5
    assert counts["partial"] == sum(m * n for m, n in sizes)
    assert counts["full"] == sum(p.numel() for p in model.parameters())
    told = dict(BY_NAME["lora"].rows(config["lora"], targets, counts["lora"], None))
    sorsa = lora + RANK * len(sizes)
    assert told["trained"] == f"14 linears, {lora:,} parameters"
    assert told["for comparison"] == f"SORSA at this rank trains r (m + n + 1): {sorsa:,}, {RANK * len(sizes)} more"


def given(method: str) -> list[str]:
    """Arguments of a run of a method in the small project."""
    budget = ["baseline.adalora_init_rank=6", "baseline.adalora_t_init=0", "baseline.adalora_t_final=1",
              "baseline.adalora_delta_t=1", "train.learning_rate=3e-2"]  # fmt: skip
    rank = ["adapter.rank=16"] if method in ("full", "partial") else []  # the default again: they have no rank
    return [f"method={method}", *rank, *(budget if method == "adalora" else [])]


STAGE = {"lora": "zero3", "pissa": "zero3", "olora": "zero2", "dora": "zero3", "adalora": "zero2", "full": "zero3",
         "partial": "zero2"}  # fmt: skip


@pytest.fixture(scope="module")
def finished(project):
    """A run of each method that nothing has interrupted, made when it is asked for."""
    made = {}

    def run(method: str):
        if method not in made:
            asked = [*given(method), "output.peft_adapter=true"]
            made[method] = train(project, f"whole-{method}", *asked, ds=STAGE[method])[0]
        return made[method]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_starts_at_the_base_models_loss_and_learns(finished, method):
    run = finished(method)
    report = json.loads((run / "report.json").read_text())
    assert report["start_loss"] == pytest.approx(report["base_loss"], rel=1e-6)
    assert report["eval_loss_end"] < report["eval_loss_start"]
    tensors = load_file(run / "adapter" / TRAINED)
    assert report["trainable_parameters"] == sum(t.numel() for t in tensors.values())
    assert report["method"] == method
    assert report["reg_loss_end"] is None
    assert not metrics(run, "reg_loss")
    if method == "pissa":  # it starts there with a product that is not zero
        initial = load_file(run / "adapter" / "initial_factors.safetensors")
        assert all(tensor.norm() > 0 for tensor in initial.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_bit_for_bit(project, finished, method):
    expected = finished(method)
    run = rewound(project, expected, f"again-{method}", 4)
    train(project, run.name, *given(method), "--resume=auto", ds=STAGE[method])
    assert metrics(run, "loss") == metrics(expected, "loss")
    assert metrics(run, "eval_loss") == metrics(expected, "eval_loss")
    ours, theirs = (load_file(r / "adapter" / TRAINED) for r in (run, expected))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "ds", "ranks"), [("lora", "zero2", 1), ("adalora", "stage0", 1), ("full", "zero2", 3)]
)
def test_a_run_goes_on_at_other_ranks_and_stages(project, finished, method, ds, ranks):
    expected = finished(method)
    run = rewound(project, expected, f"moved-{method}", 2)
    train(project, run.name, *given(method), "--resume=auto", ds=ds, ranks=ranks)
    assert metrics(run, "loss") == pytest.approx(metrics(expected, "loss"), rel=1e-5)
    ours, theirs = (load_file(r / "adapter" / TRAINED) for r in (run, expected))
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-3 * value.norm(), name


@pytest.mark.slow
def test_another_method_does_not_go_on_with_a_run(project, finished):
    run = rewound(project, finished("lora"), "mixed-up", 2)
    with pytest.raises(AssertionError, match="method was 'lora' and is now 'pissa'"):
        train(project, run.name, *given("pissa"), f"--resume={run}")


IDS = torch.arange(1, 25).view(2, 12)


def logits(model) -> torch.Tensor:
    """On a fixed input."""
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_exports_compute_what_the_trained_model_computes(finished, tmp_path, method):
    run = finished(method)
    base = AutoModelForCausalLM.from_pretrained(run.parent / "model")
    trained, before = logits(load_adapter(run / "adapter")), logits(base)
    assert (trained - before).norm() > 1e-3 * before.norm()

    def check(model):
        assert (logits(model) - trained).norm() < 1e-5 * trained.norm()

    export(Options(run, "merged", tmp_path / "merged"))
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert BY_NAME[method].title in (tmp_path / "merged" / "README.md").read_text()
    formats = {"lora": ("lora", "adapter"), "pissa": ("lora",), "olora": ("lora",), "dora": ("adapter",),
               "adalora": ("adapter",)}.get(method, ())  # fmt: skip
    for form in ("lora", "adapter", "base"):
        if form in formats:
            export(Options(run, form, tmp_path / form))
            fresh = AutoModelForCausalLM.from_pretrained(run.parent / "model")
            check(peft.PeftModel.from_pretrained(fresh, tmp_path / form))
        else:
            with pytest.raises(ValueError, match=f"--format {form}: not for method {method}: "):
                export(Options(run, form, tmp_path / form))
            assert not (tmp_path / form).exists()
    if formats:  # the run's own folder is such an adapter too
        check(peft.PeftModel.from_pretrained(base, run / "adapter"))
    else:
        assert not (run / "adapter" / "adapter_config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_is_opened_like_the_run_that_ended_there(finished, tmp_path, method):
    run = finished(method)
    theirs = load_file(run / "adapter" / TRAINED)
    with open_checkpoint(run, LATEST, tmp_path / "beside") as source:
        assert set(source.trained.names) == theirs.keys()
        assert all(torch.equal(source.trained.tensor(name), value) for name, value in theirs.items())
        assert source.report["steps"] == 6
    with open_checkpoint(run, "2", tmp_path / "beside") as source:
        assert not all(torch.equal(source.trained.tensor(name), value) for name, value in theirs.items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_merged_models_are_quantised_too(finished, tmp_path, method):
    export(Options(finished(method), "merged", tmp_path / "4bit", quantize="nf4"))
    errors = json.loads((tmp_path / "4bit" / "quantisation.json").read_text())["layers"]
    assert len(errors) == 14
    assert all(0 < error < 0.2 for error in errors.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "method"),
    [("mixed", method) for method in ("lora", "dora", "full")]
    + [("bf16", method) for method in ("pissa", "olora", "adalora", "partial")],
)
def test_rounded_runs_train_and_are_exported_as_they_computed(project, finished, tmp_path, method, precision):
    run, _ = train(project, f"{precision}-{method}", *given(method), f"train.precision={precision}", ds=STAGE[method])
    assert metrics(run, "loss") == pytest.approx(metrics(finished(method), "loss"), rel=0.02)
    export(Options(run, "merged", tmp_path / "merged", dtype="float32"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    adapted = read_description(run / "adapter").layers
    for name, parameter in merged.named_parameters():
        if method != "full" and name.removesuffix(".weight") not in adapted:
            parameter.data = parameter.data.bfloat16().float()  # frozen, it was rounded; an export has the base's own
    trained = logits(load_adapter(run / "adapter").float())  # the rounded numbers, without the products' own rounding
    assert (logits(merged) - trained).norm() < 1e-5 * trained.norm()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pissa", "adalora", "dora", "partial"])
def test_gpt2s_transposed_linears_are_adapted_too(project, tmp_path, method):
    torch.manual_seed(1)
    vocabulary = len(json.loads((project / "model" / "tokenizer.json").read_text())["model"]["vocab"]) + 64
    config = GPT2Config(n_embd=40, n_layer=2, n_head=4, vocab_size=vocabulary, n_positions=256, initializer_range=0.2)
    model = tmp_path / "gpt2"
    GPT2LMHeadModel(config).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((project / "model" / name).read_bytes())
    run, _ = train(project, f"gpt2-{method}", *given(method), f"model={model}", ds=STAGE[method])
    report = json.loads((run / "report.json").read_text())
    assert report["start_loss"] == pytest.approx(report["base_loss"], rel=1e-6)
    export(Options(run, "merged", tmp_path / "merged"))
    trained = logits(load_adapter(run / "adapter"))
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - trained).norm() < 1e-5 * trained.norm()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RunConfig(method="lora"), "auto follows from the singular values that SORSA trains, and method lora"),
        (RunConfig(regularizer=RegularizerConfig(gamma=0.1)), "write regularizer.gamma relative to the rate"),
        (RunConfig(regularizer=RegularizerConfig(preset="reference")), "write regularizer.gamma relative to the rate"),
    ],
)
def test_a_rate_that_is_left_open_is_refused_where_it_has_no_rule_or_is_needed_before(config, message):
    formats = resolve_precision("fp32", None, "cpu")
    with pytest.raises(ValueError, match=message):
        settings.check_settings(replace(config, train=TrainConfig(learning_rate="auto")), 2, formats)
    settings.check_settings(RunConfig(train=TrainConfig(learning_rate="auto")), 2, formats)


@pytest.mark.parametrize(
    ("config", "stage", "message"),
    [
        (RunConfig(method="lora", regularizer=RegularizerConfig(gamma=0.1)), 2, "no use for regularizer.gamma=0.1"),
        (RunConfig(method="lora", residual=ResidualConfig(storage="nf4")), 2, "no use for residual.storage=nf4"),
        (RunConfig(method="pissa", sorsa=SorsaConfig(svd="exact")), 2, "no use for sorsa.svd=exact"),
        (RunConfig(method="dora", baseline=BaselineConfig(pissa_iterations=4)), 2, "baseline.pissa_iterations=4"),
        (RunConfig(method="adalora", adapter=AdapterConfig(rank_pattern={"q_proj": 2})), 2, "adapter.rank_pattern="),
        (
            RunConfig(method="full", adapter=AdapterConfig(rank=4, targets=["q_proj"])),
            2,
            "adapter.targets=.*adapter.rank=4",
        ),
        (RunConfig(method="partial", adapter=AdapterConfig(dropout=0.1)), 2, "no use for adapter.dropout=0.1"),
        (
            RunConfig(baseline=BaselineConfig(adalora_beta1=0.9)),
            2,
            "method sorsa has no use for baseline.adalora_b",
        ),
        (RunConfig(method="adalora"), 3, "needs ZeRO stage 0, 1 or 2"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(config, stage, message):
    formats = resolve_precision("fp32", None, "cpu")
    with pytest.raises(ValueError, match=message):
        settings.check_settings(config, stage, formats)
    settings.check_settings(settings.without_ignored(config), 2, formats)


def test_adaloras_schedule_must_fit_the_steps():
    from sorsa_ds.methods.adalora_engine import schedule

    with pytest.raises(ValueError, match="leave none of 8 steps"):
        schedule(RunConfig(method="adalora", baseline=BaselineConfig(adalora_init_rank=20, adalora_t_init=8)), 8)
    with pytest.raises(ValueError, match="above the 16"):
        schedule(RunConfig(method="adalora", baseline=BaselineConfig(adalora_target_rank=20)), 8)
