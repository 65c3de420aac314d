"""Whether a plan fits, what is advised where it does not, and what the command says of it."""

import json
from dataclasses import replace

import pytest

from sorsa_ds.config import command_line
from sorsa_ds.config import deepspeed_json as settings
from sorsa_ds.config.schema import AdapterConfig, RunConfig
from sorsa_ds.plan.advice import larger
from sorsa_ds.plan.command import print_plan
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import memory
from sorsa_ds.plan.model_facts import facts
from sorsa_ds.plan.options import parse as parse_plan
from sorsa_ds.plan.options import size
from sorsa_ds.plan.report import as_text, plan
from sorsa_ds.plan.shapes import shipped
from sorsa_ds.runtime import hub
from sorsa_ds.runtime.memory import GIB
from tests.helpers.forked import outcome_forked
from tests.helpers.projects import ROOT


def recipe_lines():
    """Every recipe's own plan command."""
    for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml")):
        for line in path.read_text().splitlines():
            if line.startswith("#") and "launch/plan.py" in line:
                yield pytest.param(line.lstrip("# ").split(), id=path.stem)


@pytest.mark.parametrize("words", recipe_lines())
def test_every_recipe_fits_the_hardware_that_it_names(words):
    options = {word[2:]: words[i + 1] for i, word in enumerate(words) if word.startswith("--")}
    config = command_line.load_settings(RunConfig, ROOT / options["config"])
    if "rwkv" in options["config"]:
        pytest.importorskip("fla", reason="needs flash-linear-attention: pip install -e '.[rwkv]'")
    hardware = Hardware(gpus=int(options["gpus"]), nodes=int(options["nodes"]), gpu_memory=size(options["gpu_memory"]))
    planned = plan(
        shipped(config.model), Job.of(config, settings.read_ds_config(ROOT / options["ds_config"]), hardware)
    )
    assert planned.fits, as_text(planned)
    assert not planned.advice
    if any(target.experts for target in planned.facts.targets):  # no run has measured the plan of experts yet
        assert planned.memory.total < 0.6 * hardware.gpu_memory, as_text(planned)


LLAMA = "meta-llama/Llama-2-7b-hf"
SMALL_BUFFERS = {
    "stage": 3,
    "reduce_bucket_size": 10**6,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "gpus", "limit"),
    [
        ({"zero_optimization": {"stage": 0}, "train_micro_batch_size_per_gpu": 16, "gradient_clipping": 0.5}, 1, 24),
        ({"zero_optimization": {"stage": 2}, "train_batch_size": 32}, 2, 20),
        ({"zero_optimization": SMALL_BUFFERS, "train_micro_batch_size_per_gpu": 1}, 1, 8),
    ],
)
def test_advice_is_what_planning_with_it_gives(given, gpus, limit):
    config, hardware = RunConfig(model=LLAMA), Hardware(gpus=gpus, gpu_memory=limit * GIB)
    job = Job.of(config, given, hardware)
    planned = plan(shipped(LLAMA), job)
    assert not planned.fits
    assert planned.advice
    for way in planned.advice:
        options, overrides = command_line.split(way.settings.split(), ["ds_config"], command_line.Errors())
        # The command line is the user's own, which says the model and leaves to the JSON what the JSON says.
        advised = command_line.load_settings(RunConfig, None, [("model", LLAMA), *overrides])
        own = {key: "auto" if f"train.{settings.ONE_PLACE.get(key)}" in dict(overrides) else value
               for key, value in given.items()}  # fmt: skip
        file = settings.read_ds_config(ROOT / options["ds_config"]) if options else own
        as_told = Job.of(advised, file, hardware)
        needed = memory(as_told, facts(shipped(LLAMA), as_told))
        assert (way.gpu, way.host) == (needed.total, gpus * needed.total_host)
        assert way.gpu <= 0.95 * limit * GIB
        assert as_told.resolved.gradient_clipping == job.resolved.gradient_clipping
        assert way.settings in as_text(planned)


@pytest.mark.slow
def test_memory_of_the_node_is_judged_where_it_is_known():
    config, given = RunConfig(model=LLAMA), settings.read_ds_config(ROOT / "ds_configs" / "zero3_offload.json")
    unknown = Job.of(config, given, Hardware(gpus=4))
    needed = memory(unknown, facts(shipped(LLAMA), unknown))
    assert needed.total_host > 3 * GIB
    for host, fit in ((None, True), (4 * needed.total_host, True), (4 * needed.total_host - 1, False)):
        planned = plan(shipped(LLAMA), replace(unknown, hardware=replace(unknown.hardware, host_memory=host)))
        assert planned.fits is fit
        told = as_text(planned)
        assert (f"if a node has {4 * needed.total_host / GIB:.1f} GiB of its own memory" in told) is (host is None)
        assert ("of a node's own memory are needed" in told) is not fit
        assert all(way.host <= host for way in planned.advice)
    assert planned.advice


def test_too_much_for_one_node_is_advised_more_of_them():
    config = RunConfig(model=LLAMA, adapter=AdapterConfig(rank=128))
    hardware = Hardware(gpus=8, gpu_memory=8 * GIB, host_memory=6 * GIB)
    [way] = plan(shipped(LLAMA), Job.of(config, {"zero_optimization": {"stage": 0}}, hardware)).advice
    assert "--gpus 8 --nodes" in way.settings
    assert way.gpu <= 0.95 * 8 * GIB
    assert way.host <= 6 * GIB


def test_nodes_are_filled_up_before_there_are_more_of_them():
    sizes = [(one.gpus, one.nodes) for one in larger(Hardware(gpus=3))]
    assert sizes[:4] == [(6, 1), (8, 1), (8, 2), (8, 4)]
    assert sizes[-1] == (8, 128)


@pytest.mark.slow
def test_the_command_prints_one_json_object_and_leaves_with_3_where_it_does_not_fit(tmp_path):
    done = outcome_forked(
        tmp_path, "launch/plan.py", "--ds_config", "ds_configs/stage0.json", "--gpu_memory", "8GiB", f"model={LLAMA}",
        "adapter.rank=128", "--json",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    told = json.loads(done.stdout)
    assert told["fits"] is False and told["trainable"] == 319_844_352
    assert told["gib_per_rank"] == pytest.approx(sum(told["gib"].values()))
    assert all(way["gib_per_rank"] < 8 < told["gib_per_rank"] for way in told["advice"])
    assert {"bytes_per_step", "seconds_per_step", "initialisation", "host_gib_per_node"} <= set(told)


def test_the_command_says_that_it_fits(capsys):
    assert print_plan(parse_plan(["--ds_config", "ds_configs/stage0.json", "--host_memory", "64GiB", f"model={LLAMA}"]))
    assert "of 64.0 GiB of its own memory" in capsys.readouterr().out


def test_a_recipe_is_planned_for_a_method_that_does_not_use_all_of_it(capsys):
    words = ["--config", "launch/recipes/llama2_7b_metamath.yaml", "--ds_config", "ds_configs/zero3.json"]
    print_plan(parse_plan([*words, "method=full", "--json"]))
    told = capsys.readouterr()
    assert json.loads(told.out)["trainable"] > 6e9
    assert told.err.startswith("Method full has no use for adapter.rank=128")
    assert told.err.endswith("llama2_7b_metamath.yaml: left out.\n")
    assert "method full has no use for adapter.rank=8; leave it out" in refusal(*words, "method=full", "adapter.rank=8")


def refusal(*arguments) -> str:
    with pytest.raises(ValueError) as caught:
        print_plan(parse_plan(arguments))
    return str(caught.value)


def test_everything_wrong_with_a_command_is_told_at_once():
    told = refusal("--gpus", "none", "--nodes", "1000000000", "--gpu_memory", "1MiB", "--host_memory", "80",
                   "--efficiency", "nan", "--ds_config", "m.json", "--ds_config", "n.json", "sorsa.rnk=3")  # fmt: skip
    for wrong in ("--gpus none: must be a whole number from 1 to 999999", "--nodes 1000000000: must be a whole",
                  "--gpu_memory 1MiB: must be from 1GiB", "--host_memory 80: write", "--efficiency nan: must be",
                  "n.json: no such file", "--ds_config is given twice", "did you mean adapter.rank"):  # fmt: skip
        assert wrong in told


def test_a_model_that_is_nowhere_is_named(monkeypatch):
    monkeypatch.setattr(hub, "can_be_read", lambda *_: False)
    assert "'nobody/nothing' is not a folder here, and no shape of it ships with sorsa_ds: the hub" in refusal(
        "model=nobody/nothing"
    )
    assert "there is no folder './nothing'" in refusal("model=./nothing")
