"""The shipped recipes: valid, explained, of the published size, and of the hardware that they name."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from sorsa_ds.config import deepspeed_json, recipes
from sorsa_ds.config.command_line import load_settings
from sorsa_ds.config.schema import LoadingConfig, RunConfig
from sorsa_ds.methods.registry import method_of
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import fits
from sorsa_ds.plan.micro_batch import size_micro_batch
from sorsa_ds.plan.shapes import FOLDER as SHAPES
from sorsa_ds.plan.shapes import shipped
from sorsa_ds.sorsa.regularizer import Regularizer
from tests.helpers.projects import ROOT

NAMES = sorted(path.stem for path in recipes.FOLDER.glob("*.yaml") if path.name != recipes.DEFAULT)
PAPERS = [name for name in NAMES if name.split("_", 1)[1] in ("7b_metamath", "7b_codefeedback")]
PARAMETERS = {  # of the pre-trained model, in millions, as published
    "gemma_7b": 8538, "gpt_oss_20b": 20915, "llama2_70b": 68977, "llama2_7b": 6738, "llama3_405b": 405853,
    "llama3_70b": 70554, "llama3_8b": 8030, "llama31_8b": 8030, "mistral_7b": 7242, "mixtral_8x7b": 46703,
    "qwen3_30b_a3b": 30532, "rwkv6_7b": 7636,
}  # fmt: skip
TRAINABLE = {  # in millions; the papers' where they tell them, else r (m + n + 1) summed by hand
    "analysis_llama2_7b_no_regularizer": 67, "analysis_llama2_7b_sorsa": 67, "gemma_7b_metamath": 200,
    "gpt_oss_20b_8gpu": 418, "gpt_oss_20b_nf4_1gpu": 209, "llama2_7b_codefeedback": 320, "llama2_7b_metamath": 320,
    "llama3_70b_2nodes": 1657, "llama3_70b_8gpu": 1657, "llama3_70b_nf4_1gpu": 828, "llama3_8b_1gpu": 336,
    "llama31_8b_128k_8gpu": 336,
    "mistral_7b_metamath": 168, "mixtral_8x7b_8gpu": 948, "mixtral_8x7b_nf4_1gpu": 474, "qwen3_30b_a3b_8gpu": 1366,
    "qwen3_30b_a3b_nf4_1gpu": 683, "rwkv6_7b_metamath": 176,
}  # fmt: skip


def config_of(name: str) -> RunConfig:
    return load_settings(RunConfig, recipes.FOLDER / f"{name}.yaml")


def hardware(name: str) -> tuple[str, int, int]:
    """(DeepSpeed JSON, GPUs a node, nodes) that a recipe's head names."""
    command = rf"python launch/plan\.py --config launch/recipes/{name}\.yaml --ds_config (ds_configs/\w+\.json) "
    command += r"--gpus (\d+) --nodes (\d+) --gpu_memory 80GiB"
    [(json, gpus, nodes)] = re.findall(rf"^#   {command}$", recipes.head(recipes.FOLDER / f"{name}.yaml"), re.M)
    return json, int(gpus), int(nodes)


def settled(name: str, world_size: int) -> deepspeed_json.Resolved:
    config = config_of(name)
    raw = deepspeed_json.read_ds_config(ROOT / hardware(name)[0])
    return deepspeed_json.resolve_ds_config(raw, config.train, world_size, "cuda", config.train.precision)


def bare(model: str):
    """The model on the meta device; skips where its architecture's package is missing."""
    if model.startswith("fla-hub/") or model == "rwkv6_7b":
        pytest.importorskip("fla.models", reason="needs flash-linear-attention: pip install -e '.[rwkv]'")
    return skeleton(shipped(model) or SHAPES / model, LoadingConfig())


@pytest.mark.parametrize("name", sorted(path.parent.name for path in SHAPES.glob("*/config.json")))
def test_a_shape_has_the_published_number_of_parameters(name):
    assert round(sum(p.numel() for p in bare(name).parameters()) / 1e6) == PARAMETERS[name]


def test_no_shape_ships_for_an_unknown_model():
    assert shipped("somebody/something") is None


def test_a_copy_in_another_number_format_has_the_shape_of_the_original():
    assert shipped("unsloth/gpt-oss-20b-BF16") == shipped("openai/gpt-oss-20b") == SHAPES / "gpt_oss_20b"


@pytest.mark.parametrize("name", [name for name in NAMES if config_of(name).adapter.expert_rank != 8])
def test_the_ranks_of_experts_are_multiples_of_8_and_every_expert_is_adapted(name):
    config = config_of(name)
    selection = method_of(config).choose(bare(config.model), config.adapter)
    assert config.adapter.expert_rank % 8 == 0
    assert selection.share > 0.998 and not selection.left_out
    assert {target.rank for target in selection.targets if target.experts} == {config.adapter.expert_rank}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_the_published_number_of_parameters(name):
    config = config_of(name)
    targets = method_of(config).choose(bare(config.model), config.adapter).targets
    assert round(sum(target.trainable for target in targets) / 1e6) == TRAINABLE[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_is_that_of_the_papers_or_of_long_texts_on_the_hardware_that_the_head_names(name):
    _, gpus, nodes = hardware(name)
    resolved = settled(name, gpus * nodes)
    assert resolved.global_batch_size == (8 if name == "llama31_8b_128k_8gpu" else 128)
    assert resolved.zero_stage == (0 if gpus * nodes == 1 else 3)
    assert resolved.gradient_clipping == (0.0 if name.startswith("analysis") else 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_launch_command_is_of_the_same_recipe_and_hardware(name):
    json, gpus, nodes = hardware(name)
    script = (
        "single_gpu.sh" if gpus * nodes == 1 else "multi_gpu.sh" if nodes == 1 else "multi_node.sh --hostfile hostfile"
    )
    command = f"launch/{script} --ds_config {json} \\\n#       --config launch/recipes/{name}.yaml\n"
    assert f"#   {command}" in recipes.head(recipes.FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("name", [name for name in NAMES if hardware(name)[2] > 1])
def test_wherever_a_recipe_for_many_nodes_is_launched_it_is_with_its_ds_config(name):
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "launch").rglob("*.sh"),
             *(ROOT / "launch").rglob("*.sbatch")]  # fmt: skip
    told = "\n".join(path.read_text().replace("\\\n", " ") for path in texts)
    commands = [line for line in told.splitlines() if f"--config launch/recipes/{name}.yaml" in line]
    assert len(commands) >= 6
    assert [line for line in commands if f"--ds_config {hardware(name)[0]}" not in line] == []


@pytest.mark.parametrize("name", [*PAPERS, "analysis_llama2_7b_sorsa"])
def test_the_regulariser_is_as_strong_as_the_published_runs_on_any_number_of_gpus(name):
    """gamma / eta_d over 64 accumulation steps, to the last bit, however many the ranks and micro-batches make."""
    config = config_of(name)
    gamma = 5e-4 if name.startswith("analysis") else 4e-4
    accumulations = set()
    for ranks in (1, 2, 4, 8, 16):
        resolved = settled(name, ranks)
        assert resolved.global_batch_size == 128
        for micro in resolved.micro_choices:
            split = resolved.with_micro_batch(micro)
            accumulations.add(split.gradient_accumulation_steps)
            train = replace(config.train, gradient_accumulation_steps=split.gradient_accumulation_steps)
            assert method_of(config).regularizer(replace(config, train=train)) == Regularizer(
                "norm", "mean", gamma / 3e-5 / 64
            )
    assert accumulations == {1, 2, 4, 8, 16, 32, 64, 128}
    with pytest.raises(ValueError, match="128 is not 3 ranks x a whole number"):
        settled(name, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["analysis_llama2_7b_sorsa", "gemma_7b_metamath", "llama2_7b_metamath"])
def test_the_papers_recipes_take_the_largest_micro_batch_that_fits(name):
    config = config_of(name)
    raw = deepspeed_json.read_ds_config(ROOT / hardware(name)[0])
    sized = size_micro_batch(shipped(config.model), Job.of(config, raw, Hardware()))
    assert sized.job.resolved.micro_batch_size == (8 if name.startswith("gemma") else 16)
    assert fits(sized.job, sized.memory)


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_is_the_papers_set_up(name):
    config = config_of(name)
    assert (config.train.learning_rate, config.train.warmup_ratio, config.train.weight_decay) == (3e-5, 0.03, 0.0)
    assert (config.train.epochs, config.train.adam_betas, config.train.precision) == (1.0, (0.9, 0.999), "mixed")
    assert config.data.train_split == "train[:100000]"
    assert config.data.max_length == 512
    assert config.adapter.rank == (128 if name.startswith("llama2") else 64)


@pytest.mark.parametrize("name", NAMES)
def test_the_comments_are_those_of_the_settings(name):
    recipe = recipes.FOLDER / f"{name}.yaml"
    assert recipe.read_text() == recipes.rewritten(recipe), "out of date: `make recipe` writes it anew"


def test_rewriting_keeps_head_and_values_and_explains_every_key(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("# Mine.\n#\n#   run it\n\ntrain: {seed: 3}   # old\nsorsa:\n  # old\n  rank: 8\n")
    text = recipes.rewritten(recipe)
    assert text.startswith("# Mine.\n#\n#   run it\n\n# Which linear layers are adapted")
    assert "old" not in text
    assert re.search(r"# \(integer from 1 to 65,536; default 16\)\n  rank: 8\n", text)
    assert re.search(r"# Seed of .*\n(  #.*\n)?  # \(integer from 0 to 4,294,967,295; default 0\)\n  seed: 3\n", text)
    before = load_settings(RunConfig, recipe)
    recipe.write_text(text)
    assert load_settings(RunConfig, recipe) == before
    assert recipes.rewritten(recipe) == text


def test_the_documentation_lists_every_recipe():
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in page] == []


@pytest.mark.slow
def test_the_shapes_are_part_of_the_package(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="needs the setuptools that pyproject.toml asks for")
    subprocess.run(
        [sys.executable, "-c", "from setuptools import setup; setup()", "-q",
         "egg_info", "-e", str(tmp_path), "build_py", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    assert {path.parent.name for path in tmp_path.glob("sorsa_ds/plan/shapes/*/config.json")} == set(PARAMETERS)
