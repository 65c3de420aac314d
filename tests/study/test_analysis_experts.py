"""Runs on experts that a model holds as one parameter, through the trainer and the analysis: one matrix per expert."""

import csv
import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sorsa_ds.export.command import Options as ExportOptions
from sorsa_ds.export.command import export
from sorsa_ds.run.snapshots import existing_snapshots
from sorsa_ds.study.analysis.command import analyze
from sorsa_ds.study.analysis.options import Options
from tests.helpers.analysed import by_hand
from tests.helpers.expert_models import EXPERT_CONFIGS
from tests.helpers.runs import train

LAYER = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def model(project):
    """A tiny mixture beside the small project, with its tokenizer."""
    folder, config = project / "mixtral", deepcopy(EXPERT_CONFIGS["mixtral"])
    config.vocab_size = json.loads((project / "model" / "config.json").read_text())["vocab_size"]
    config.max_position_embeddings, config.num_local_experts = 256, 4
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((project / "model" / name).read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("method", "ds", "ranks"), [("sorsa", "zero2", 1), ("lora", "zero3", 2)])
def test_each_expert_is_a_matrix_of_the_analysis(project, model, tmp_path, method, ds, ranks):
    arguments = [
        f"method={method}", f"model={model}", "adapter.expert_rank=3", "adapter.alpha=4", "train.learning_rate=3e-3",
        "analysis.every=2", "analysis.layers=[layers.1.mlp.experts.down_proj, layers.0.self_attn.q_proj]",
    ]  # fmt: skip
    run, _ = train(project, f"experts-{method}", *arguments, ds=ds, ranks=ranks)
    report = json.loads((run / "report.json").read_text())
    assert report["start_loss"] == pytest.approx(report["base_loss"], rel=1e-6)
    assert report["eval_loss_end"] < report["eval_loss_start"]
    for path in existing_snapshots(run).values():
        stored = load_file(path)
        assert sum(tensor.numel() for tensor in stored.values()) == 4 * 3 * (32 + 24) + 4 * 64 + (
            4 * 3 + 4 if method == "sorsa" else 0
        )
    analyze(Options([run], tmp_path / "analysis", workers=1))
    with (tmp_path / "analysis" / "measures.csv").open() as file:
        rows = {(row["linear"], int(row["step"])): row for row in csv.DictReader(file)}
    names = ["model.layers.0.self_attn.q_proj", *(f"{LAYER}.{expert}" for expert in range(4))]
    assert rows.keys() == {(name, step) for name in names for step in (0, 2, 4, 6)}
    export(ExportOptions(run, "merged", tmp_path / "merged", dtype="float32"))
    now, start = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (tmp_path / "merged", model)
    )
    for expert in range(4):
        expected = by_hand(*(one.get_parameter(LAYER)[expert].detach().numpy() for one in (now, start)))
        for name, value in expected.items():
            assert float(rows[f"{LAYER}.{expert}", 6][name]) == pytest.approx(value, rel=2e-3, abs=1e-6), name
        assert (rows[f"{LAYER}.{expert}", 6]["orthonormality_u"] != "") == (method == "sorsa")
    moved = {row["delta_sigma"] for (name, step), row in rows.items() if step == 4 and name.startswith(LAYER)}
    assert len(moved) == 4
