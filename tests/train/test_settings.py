"""Settings of a file that the method does not use are left out with a note; those of the command line are refused."""

import pytest
import yaml

from sorsa_ds.config.schema import AdapterConfig, RegularizerConfig, ResidualConfig, RunConfig, SorsaConfig, TrainConfig
from sorsa_ds.methods.settings import unused_note, without_unused_of_file
from tests.helpers.forked import launch_forked
from tests.helpers.projects import metrics, settings
from tests.helpers.runs import rewound

SAID = "Method full has no use for adapter.rank=4, regularizer.gamma=0.1 in {file}: left out."


def test_only_what_a_file_sets_for_other_methods_is_left_out():
    config = RunConfig(
        method="lora", adapter=AdapterConfig(rank=8), sorsa=SorsaConfig(svd="exact"),
        regularizer=RegularizerConfig(gamma=0.1), residual=ResidualConfig(storage="nf4"), train=TrainConfig(seed=3),
    )  # fmt: skip
    left, unused = without_unused_of_file(config, {"regularizer.gamma", "adapter.rank"})
    assert unused == {"sorsa.svd": "exact", "residual.storage": "nf4"}
    assert left == RunConfig(
        method="lora",
        adapter=AdapterConfig(rank=8),
        regularizer=RegularizerConfig(gamma=0.1),
        train=TrainConfig(seed=3),
    )
    assert unused_note("lora", unused, "a.yaml") == (
        "Method lora has no use for sorsa.svd=exact, residual.storage=nf4 in a.yaml: left out."
    )


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("method: sorsa\nadapter: {rank: 4}\nregularizer: {gamma: 0.1}\n")
    return file


def without_rank(project, name):
    """The settings of a short run, which leave the rank to a file."""
    return [setting for setting in settings(project, name) if not setting.startswith("adapter.rank=")]


@pytest.mark.slow
def test_a_recipe_of_another_method_trains_and_goes_on(project, recipe):
    job = {"job": without_rank, "ds": "stage0", "ranks": 1}
    words = ["--config", str(recipe), "method=full", "output.save_every=2", "output.keep_checkpoints=9"]
    printed, run, _ = launch_forked(project, "full", *words, **job)
    assert printed.count(SAID.format(file=recipe)) == 1
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert (kept["method"], kept["adapter"]["rank"], kept["regularizer"]["gamma"]) == ("full", 16, None)

    again = rewound(project, run, "full-again", 4)
    printed, _, _ = launch_forked(project, "full-again", *words, "--resume", "auto", **job)
    assert "Going on after step 4" in printed
    assert metrics(again, "loss") == metrics(run, "loss")

    by_name = rewound(project, run, "full-by-name", 4)
    printed, _, _ = launch_forked(
        project, "full-by-name", "--resume", str(by_name), job=lambda *_: [], ds="stage0", ranks=1
    )
    assert "Going on after step 4" in printed
    assert "has no use for" not in printed  # a run's own file has what was resolved


@pytest.mark.slow
def test_what_the_command_line_sets_is_refused(project, recipe):
    printed, _, _ = launch_forked(
        project, "refused", "--config", str(recipe), "method=full", "adapter.rank=8", ds="stage0", ranks=1,
        job=without_rank, code=2,
    )  # fmt: skip
    assert "error: method full has no use for adapter.rank=8; leave it out" in printed
