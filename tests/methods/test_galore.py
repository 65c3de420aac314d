"""GaLore through our engine: the steps of galore-torch's own optimizer, resumed bit for bit, on no ZeRO stage."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sorsa_ds import load_adapter
from sorsa_ds.config.schema import AdapterConfig, BaselineConfig, LoadingConfig, RunConfig, TrainConfig
from sorsa_ds.engine.schedules import cosine_with_warmup
from sorsa_ds.export.command import Options, export
from sorsa_ds.methods import settings
from sorsa_ds.methods.registry import method_of
from sorsa_ds.model.adapter_file import TRAINED
from sorsa_ds.model.load import load_adapted_model
from sorsa_ds.model.selection import select_targets
from sorsa_ds.model.sharding import Whole
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import memory
from sorsa_ds.plan.model_facts import facts
from sorsa_ds.runtime.precision import resolve_precision
from sorsa_ds.sorsa.residual_storage import Dense
from tests.helpers.engines import MICRO, RATE, STEPS, WARMUP, ds_config, micro_losses, sequences, whole_factors
from tests.helpers.projects import metrics
from tests.helpers.runs import rewound, train
from tests.helpers.worlds import run_ranks

CPU, CLIP, DECAY = torch.device("cpu"), 0.02, 0.01
GALORE = BaselineConfig(galore_rank=3, galore_update_gap=4, galore_scale=0.5)
ARGUMENTS = ["method=galore", "adapter.rank=16", "baseline.galore_rank=3", "baseline.galore_update_gap=3",
             "train.learning_rate=1e-2"]  # fmt: skip
there = importlib.util.find_spec("galore_torch") is not None
needs_galore = pytest.mark.skipif(not there, reason='needs galore-torch: pip install "sorsa-ds[galore]"')


def _config(whole: list[str] | None = None) -> RunConfig:
    return RunConfig(
        method="galore", baseline=GALORE, adapter=AdapterConfig(train_whole=whole or []),
        train=TrainConfig(learning_rate=RATE, weight_decay=DECAY, precision="fp32", micro_batch_size=MICRO),
    )  # fmt: skip


def _steps(folder, whole):
    from sorsa_ds.engine.masters import inner_optimizer
    from sorsa_ds.runtime import collectives

    config, formats = _config(whole), resolve_precision("fp32", None, "cpu")
    loaded = load_adapted_model(
        folder, method_of(config).operation(config, formats, Dense(formats.residual_dtype), CPU),
        loading=LoadingConfig(), placement=Whole(CPU), device=CPU,
    )  # fmt: skip
    engine = method_of(config).engine(config, STEPS)(
        loaded.model, ds_config(0, "", CLIP, 2), None, cosine_with_warmup(STEPS, WARMUP), None, loaded.exact_factors
    )
    for t in range(STEPS):
        engine.train_step(micro_losses(engine, sequences(MICRO * collectives.world_size() * 2, seed=t), 2))
    state = inner_optimizer(engine).state.values()
    held = sum(of[name].numel() for of in state for name in ("exp_avg", "exp_avg_sq"))
    held += sum(of["projector"].ortho_matrix.numel() for of in state if "projector" in of)
    return whole_factors(engine), held


def _plain(folder, world, whole):
    """The trained weights after the same steps as galore-torch's documentation shows them, in one process."""
    from galore_torch import GaLoreAdamW

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    named = dict(model.named_parameters())
    projected = [named[f"{target.name}.weight"] for target in select_targets(model, AdapterConfig(rank=1))]
    others = [named[f"{name}.weight"] for name in whole]
    groups = [dict(params=projected, rank=3, update_proj_gap=4, scale=0.5, proj_type="std"), dict(params=others)]
    trained = [parameter.requires_grad_() for parameter in projected + others]
    optimizer = GaLoreAdamW(groups, lr=RATE, weight_decay=DECAY, eps=1e-8, no_deprecation_warning=True)
    scheduler = cosine_with_warmup(STEPS, WARMUP)(optimizer)
    for t in range(STEPS):
        batch = sequences(MICRO * world * 2, seed=t)
        count = sum(int((labels[:, 1:] != -100).sum()) for _, labels in batch)
        for first in range(0, len(batch), MICRO):
            ids, labels = (torch.cat(parts) for parts in zip(*batch[first : first + MICRO], strict=True))
            logits = model(input_ids=ids).logits[:, :-1].reshape(-1, model.config.vocab_size)
            nats = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
            (nats / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in named.items() if parameter.requires_grad}


@needs_galore
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "whole"), [(1, []), (2, []), (2, ["model.embed_tokens"])])
def test_ten_steps_are_those_of_galores_own_optimizer(tiny_llama, ranks, whole):
    trained, held = run_ranks(ranks, _steps, tiny_llama, whole)[0]
    expected = _plain(tiny_llama, ranks, whole)
    before = dict(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).named_parameters())
    assert trained.keys() == expected.keys()
    for name, value in trained.items():
        assert (value - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
        assert (value - before[name]).norm() >= 1e-4 * before[name].norm(), name
    job = Job.of(_config(whole), {"zero_optimization": {"stage": 0}}, Hardware(gpus=ranks))
    assert memory(job, facts(tiny_llama, job)).gpu["moments"] == 4 * held


@pytest.fixture(scope="module")
def finished(project):
    """A run that nothing has interrupted."""
    return train(project, "whole-galore", *ARGUMENTS, ds="stage0")[0]


@needs_galore
@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_a_run_goes_on_bit_for_bit(project, finished, step):
    report = json.loads((finished / "report.json").read_text())
    assert report["eval_loss_end"] < report["eval_loss_start"]
    run = rewound(project, finished, f"again-{step}", step)
    train(project, run.name, *ARGUMENTS, "--resume=auto", ds="stage0")
    assert metrics(run, "loss") == metrics(finished, "loss")
    ours, theirs = (load_file(one / "adapter" / TRAINED) for one in (run, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@needs_galore
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["mixed", "bf16"])
def test_rounded_runs_learn_the_same_and_go_on_bit_for_bit(project, finished, precision):
    arguments = [*ARGUMENTS, f"train.precision={precision}"]
    rounded = train(project, f"{precision}-galore", *arguments, ds="stage0")[0]
    assert metrics(rounded, "loss") == pytest.approx(metrics(finished, "loss"), rel=0.02)
    run = rewound(project, rounded, f"again-{precision}", 4)
    train(project, run.name, *arguments, "--resume=auto", ds="stage0")
    assert metrics(run, "loss") == metrics(rounded, "loss")


@needs_galore
@pytest.mark.slow
def test_a_run_is_exported_as_it_computed(finished, tmp_path):
    ids = torch.arange(1, 25).view(2, 12)
    export(Options(finished, "merged", tmp_path / "merged"))
    with torch.no_grad():
        trained = load_adapter(finished / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
    assert (merged - trained).norm() < 1e-5 * trained.norm()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_refused_with_the_reason(stage):
    with pytest.raises(
        ValueError,
        match=r"method galore needs ZeRO stage 0 \(ds_configs/stage0.json\): .*projects the gradient of a whole matrix",
    ):
        settings.check_stage("galore", stage)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"method galore needs the package galore-torch.*sorsa-ds\[galore\]"):
        settings.check_package(_config())
    settings.check_package(RunConfig(method="partial"))
