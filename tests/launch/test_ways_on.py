"""Where a run stops or is refused, the command that is printed leads on: each is taken from the message and run."""

import re
import shlex
import shutil

import pytest

from tests.helpers.forked import launch_forked, run_forked
from tests.helpers.projects import STEPS, metrics
from tests.helpers.runs import rewound

pytestmark = pytest.mark.slow

SAVES = "output.save_every=2"


@pytest.fixture(scope="module")
def place(tmp_path_factory, project):
    """The project in a folder whose name has to be quoted."""
    return shutil.copytree(project, tmp_path_factory.mktemp("of her's") / "a project")


@pytest.fixture(scope="module")
def finished(place):
    """A finished run on one rank."""
    return launch_forked(place, "finished", SAVES, ranks=1, ds="stage0")[1]


def follow(place, printed: str, before: str) -> str:
    """Run the command that stands behind these words of a message; returns what it printed."""
    [told] = re.findall(rf"^error: .*{before}: (.*)$", printed, re.MULTILINE)
    program, *words = shlex.split(told)
    assert program in ("python", "deepspeed")
    return run_forked(place, words)[0]


def nothing_saved(place, finished, name: str):
    """A run that was killed before its first checkpoint."""
    run = rewound(place, finished, name, 2)
    shutil.rmtree(run / "checkpoints")
    return run


def test_the_name_of_a_run_that_can_go_on(place, finished):
    run = rewound(place, finished, "half", 4)
    printed, _, _ = launch_forked(place, "half", SAVES, ranks=1, ds="stage0", code=2)
    told = follow(place, printed, "holds a run already, which is unfinished; to go on with it")
    assert "Going on after step 4" in told
    assert metrics(run, "loss") == metrics(finished, "loss")


def test_the_name_of_a_run_that_has_saved_nothing(place, finished):
    run = nothing_saved(place, finished, "lost")
    printed, _, _ = launch_forked(place, "lost", SAVES, ranks=1, ds="stage0", code=2)
    told = follow(place, printed, "holds a run already, which has saved nothing; to begin it anew")
    assert "Going on" not in told
    assert metrics(run, "loss") == metrics(finished, "loss")


def test_going_on_with_a_run_that_has_saved_nothing(place, finished):
    run = nothing_saved(place, finished, "nothing")
    printed, _ = run_forked(place, ["launch/train.py", "--resume", str(run)], code=2)
    told = follow(place, printed, "--resume: .* has saved nothing; to begin it anew")
    assert "Going on" not in told
    assert metrics(run, "loss") == metrics(finished, "loss")


def test_the_name_of_a_finished_run(place, finished):
    before = (finished / "report.json").read_bytes()
    for number, more in ((2, []), (3, ["--resume", "auto"])):
        printed, _, _ = launch_forked(place, "finished", SAVES, *more, ranks=1, ds="stage0", code=2)
        follow(place, printed, "is finished; to train another")
        assert len(metrics(place / f"finished-{number}", "loss")) == STEPS
    assert (finished / "report.json").read_bytes() == before


def test_going_on_with_a_finished_run(place, finished):
    printed, _ = run_forked(place, ["launch/train.py", "--resume", str(finished)], code=2)
    assert "held-out loss" in follow(place, printed, "is finished; .*; to evaluate it")


def test_a_run_that_ends_before_its_first_step_can_be_begun_anew(place, finished):
    """Its settings are in its folder from the beginning."""
    printed, run, _ = launch_forked(
        place, "early", SAVES, "train.max_start_gap=1e-30", "residual.storage=nf4", ranks=1, ds="stage0", code=2
    )
    assert "config.yaml" in {path.name for path in run.iterdir()}, printed
    shutil.copy(finished / "config.yaml", run / "config.yaml")
    printed, _ = run_forked(place, ["launch/train.py", "--resume", str(run)], code=2)
    follow(place, printed, "has saved nothing; to begin it anew")
    assert metrics(run, "loss") == metrics(finished, "loss")


def test_a_run_that_is_to_be_exported_before_it_is_finished(place, finished):
    run = rewound(place, finished, "unfinished", 4)
    words = ["launch/export.py", "--run", str(run), "--format", "lora", "--output", str(place / "exported")]
    printed, _ = run_forked(place, words, code=2)
    assert "Going on after step 4" in follow(place, printed, "is unfinished: .*; to go on with it")
    run_forked(place, words)
    assert (place / "exported" / "adapter_config.json").is_file()
