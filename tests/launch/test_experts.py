"""Mixtures of experts by the real commands: two ranks under ZeRO-3, the exports, and what their users get."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from sorsa_ds import load_adapter
from sorsa_ds.model.adapter_file import CONFIG
from tests.helpers import projects
from tests.helpers.expert_models import EXPERT_CONFIGS
from tests.helpers.forked import launch_forked, run_forked
from tests.helpers.projects import metrics
from tests.helpers.runs import train
from tests.helpers.runs import trained as factors_of

pytestmark = pytest.mark.slow

INPUT = torch.arange(1, 49).view(2, 24)
SETTINGS = ("adapter.expert_rank=4", "train.learning_rate=5e-3")


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def trained(request, tmp_path_factory):
    """A project with a finished run: its folder, what was printed, and the run's folder."""
    config = copy.deepcopy(EXPERT_CONFIGS[request.param])
    config.output_router_logits, config.router_aux_loss_coef = request.param == "mixtral", 0.1
    project = projects.make(tmp_path_factory.mktemp(request.param), config)
    printed, run, _ = launch_forked(project, "zero3", *SETTINGS)
    return project, printed, run


def test_a_run_on_two_ranks_under_zero3_adapts_every_expert(trained):
    project, printed, run = trained
    count = json.loads((project / "model" / "config.json").read_text())["num_local_experts"]
    assert f"8 linears, the weights of {count} experts x 4; 9" in printed
    assert ("router loss" in printed) == ("mixtral" in str(project))
    assert metrics(run, "loss")[-1] < metrics(run, "loss")[0]
    described = json.loads((run / "adapter" / CONFIG).read_text())["layers"]
    assert described["model.layers.1.mlp.experts.down_proj"]["experts"] == count
    layers = {layer["name"]: layer for layer in json.loads((run / "init.json").read_text())["layers"]}
    assert layers["model.layers.1.mlp.experts.down_proj"]["experts"] == count


def test_one_rank_without_zero_trains_the_same_numbers(trained):
    project, _, run = trained
    _, alone, _ = launch_forked(project, "alone", *SETTINGS, ds="stage0", ranks=1)
    # A run on two ranks takes other micro-batches, over which the router's loss is a mean.
    tolerance = 1e-3 if "mixtral" in str(project) else 1e-5
    assert metrics(alone, "loss") == pytest.approx(metrics(run, "loss"), rel=tolerance)
    assert metrics(alone, "reg_loss") == pytest.approx(metrics(run, "reg_loss"), rel=tolerance * 10, abs=1e-8)


def test_the_merged_model_is_stored_as_the_base_is_and_computes_what_was_trained(trained):
    project, _, run = trained
    merged = project / "merged"
    run_forked(project, ["launch/export.py", "--run", str(run), "--format", "merged", "--output", str(merged)])
    shapes = []
    for folder in (project / "model", merged):
        with safe_open(folder / "model.safetensors", "pt") as file:
            shapes.append({name: file.get_slice(name).get_shape() for name in sorted(file.keys())})
    assert shapes[0] == shapes[1]
    base, plain = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (project / "model", merged))
    ours = load_adapter(run / "adapter").eval()
    with torch.no_grad():
        before, found, wanted = base(INPUT).logits, plain(INPUT).logits, ours(INPUT).logits
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (before - wanted).abs().max() > 1e-2 * wanted.abs().max()


def test_a_stopped_run_goes_on_bit_for_bit(trained):
    project, _, _ = trained
    whole, _ = train(project, "whole", *SETTINGS)
    parts, said = train(project, "parts", *SETTINGS, stop_at=3)
    assert "stopped after step 3 of 6" in said
    train(project, "parts", *SETTINGS, "--resume=auto")
    assert metrics(parts, "loss") == metrics(whole, "loss")
    ours, theirs = factors_of(parts), factors_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_packed_residuals_train(trained):
    project = trained[0]
    printed, packed, _ = launch_forked(project, "nf4", *SETTINGS, "residual.storage=nf4", "train.max_start_gap=1e9")
    assert metrics(packed, "loss")[-1] < metrics(packed, "loss")[0]
    assert "experts.gate_up_proj" in printed
