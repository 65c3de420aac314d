"""The registry of methods: every name has one, a new one needs no other module, and no other module asks for a name."""

import subprocess
import sys
from typing import get_args

import pytest
from transformers import LlamaConfig

from sorsa_ds.config.schema import AdapterConfig, LoadingConfig, MethodName, ResidualConfig, RunConfig
from sorsa_ds.export.options import Format
from sorsa_ds.methods.families.whole_weights import Partial
from sorsa_ds.methods.registry import METHODS, VARIANTS, method_named, method_of
from sorsa_ds.methods.settings import ZERO_STAGES, check_settings, check_stage
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.report import as_text, plan
from sorsa_ds.run.snapshots import adapted_linears
from tests import structure


def test_every_name_in_the_settings_has_a_method():
    assert tuple(METHODS) == get_args(MethodName)
    assert all(method.name == name and method.title for name, method in METHODS.items())


def test_a_method_refuses_only_what_there_is_and_never_a_merged_model():
    for method in METHODS.values():
        assert set(method.refused_exports) <= {*get_args(Format)} - {"merged"}
        assert set(method.refused_stages) < {*ZERO_STAGES}
        assert {"lora", "adapter"} <= set(method.refused_exports) or method.has_rank


def test_a_variant_is_known_by_its_method():
    assert VARIANTS["sorsa-no-reg"][0] == "sorsa" and not set(VARIANTS) & set(METHODS)
    assert all(method_named(name) is METHODS[of] for name, (of, _) in VARIANTS.items())
    check_stage("sorsa-no-reg", 3)


@pytest.mark.slow
def test_the_registry_and_what_reads_it_import_neither_peft_nor_deepspeed():
    """Analysis workers would pay seconds each, and importing PEFT initialises CUDA."""
    modules = "sorsa_ds.run.snapshots, sorsa_ds.run.merge, sorsa_ds.export.command, sorsa_ds.plan.report"
    told = subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; print([x for x in ('peft', 'deepspeed') if x in sys.modules])"],
        text=True, capture_output=True, check=True, cwd=structure.ROOT,
    )  # fmt: skip
    assert told.stdout.strip() == "[]"


class Fake(Partial):
    """A baseline as somebody would add it."""

    name, title = "fake", "a fake"
    ignored_settings = ("residual.*",)
    refused_stages = {2: "it is a fake"}  # noqa: RUF012

    def rows(self, config, targets, trained, reg):
        return [*super().rows(config, targets, trained, reg), ("fake", "as told")]

    def layer_scratch_bytes(self, targets):
        return 2**30

    def step_scratch_bytes(self, config, ranks, trainable):
        return 2**29

    def step_traffic(self, config, targets, zero_stage):
        return {"whispers": 1e9}

    def summary(self, settings, precision):
        return "nothing but a fake"


def fake_config(**settings) -> RunConfig:
    """Settings that name it; `MethodName` is the one line that a new method adds outside of its file."""
    config = RunConfig(**settings)
    object.__setattr__(config, "method", "fake")
    return config


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(METHODS, "fake", Fake())
    return METHODS["fake"]


def test_a_new_methods_settings_are_checked(fake):
    formats = Job.of(RunConfig(), {}, Hardware()).precision
    check_settings(fake_config(), 3, formats)
    with pytest.raises(ValueError, match=r"method fake needs ZeRO stage 0, 1 or 3 \(ds_configs/zero3.json\): it is a"):
        check_settings(fake_config(), 2, formats)
    with pytest.raises(ValueError, match="method fake has no use for residual.storage=nf4; leave it out"):
        check_settings(fake_config(residual=ResidualConfig(storage="nf4")), 3, formats)


def test_a_new_method_is_planned_and_told(fake, tmp_path):
    LlamaConfig(
        hidden_size=40, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    ).save_pretrained(tmp_path)
    config = fake_config(adapter=AdapterConfig(targets=["q_proj"]))
    job = Job.of(config, {"zero_optimization": {"stage": 3}}, Hardware(gpus=2))
    planned = plan(tmp_path, job)
    assert planned.facts.trainable == 2 * 40 * 40
    assert planned.memory.gpu["dense weight"] == 2**30 and planned.memory.gpu["regulariser"] == 2**29
    assert planned.traffic.inside["whispers"] == pytest.approx(5e8)
    assert "nothing but a fake" in as_text(planned)
    rows = dict(method_of(config).rows(config, planned.facts.targets, planned.facts.trainable, None))
    assert rows == {"method": "fake", "trained": "2 linears, 3,200 parameters", "fake": "as told"}
    assert [t.name for t in adapted_linears(skeleton(tmp_path, LoadingConfig()), config)] == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    ]


def test_no_module_outside_of_methods_and_config_looks_at_a_methods_name():
    assert structure.method_name_branches() == []


@pytest.mark.parametrize(
    "branch",
    [
        'found = method == "lora"',
        'found = method not in ("full", "partial")',
        'match method:\n    case "dora":\n        pass',
        'found = {"lora": 1, "pissa": 2}[method]',
        'found = method.startswith("ada" "lora")',
        'CHANGING = ["pissa", "olora"]',
        'found = METHODS["lora"]',
        'found = registry.METHODS.get("lora")',
        'found = {"dora": 1}.get(method, 0)',
        "found = isinstance(method, Method)",
    ],
)
def test_a_branch_on_a_methods_name_would_be_found(tmp_path, branch):
    for room in ("train", "methods"):
        (tmp_path / "sorsa_ds" / room).mkdir(parents=True)
        (tmp_path / "sorsa_ds" / room / "planted.py").write_text(f"method = 'x'\n{branch}\n")
    [place] = structure.method_name_branches(tmp_path / "sorsa_ds")
    assert place.startswith("sorsa_ds/train/planted.py:")
