"""What ends a run early: a number that is none, named with its step, and a mistake, after which the name is free."""

import dataclasses

import pytest

from sorsa_ds.engine.engine import SorsaEngine
from tests.helpers.projects import metrics
from tests.helpers.runs import GLOBAL, train, train_rank
from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow


def refused(project, name, arguments):
    """What stops this rank of a run."""
    try:
        train_rank(project, name, "stage0", ["train.steps=3", GLOBAL, *arguments], None)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("field", "what"),
    [("summed", "loss"), ("grad_norm", "norm of the loss's gradient"), ("reg_loss", "regulariser's value L_reg")],
)
def test_an_infinite_number_is_named_with_its_step_on_every_rank_and_not_saved(project, monkeypatch, field, what):
    step = SorsaEngine.train_step

    def infinite(self, losses, passes, summed):
        done = step(self, losses, passes, summed)
        return dataclasses.replace(done, **{field: float("inf")}) if self.global_steps == 2 else done

    monkeypatch.setattr(SorsaEngine, "train_step", infinite)
    told = run_ranks(2, refused, project, field, ["output.save_every=1"])
    last = project / field / "checkpoints" / "step-000001"
    for text in told:
        assert text.startswith(f"the {what} is inf at step 2: lower train.learning_rate (now ")
        assert text.endswith(f"; the last checkpoint is {last}")
    assert sorted(path.name for path in last.parent.iterdir()) == ["latest", last.name]
    assert len(metrics(project / field, "loss")) == 1


def test_a_run_that_fails_before_it_begins_leaves_its_name_free(project):
    for mistake, said in (("data.path=nowhere", "data.path: "), ("adapter.targets=[qproj]", "adapter.targets: ")):
        for _ in range(2):
            (told,) = run_ranks(1, refused, project, "again", [mistake])
            assert told.startswith(said)
    run, _ = train(project, "again", ranks=1, ds="stage0")
    assert len(metrics(run, "loss")) == 6
    (told,) = run_ranks(1, refused, project, "again", [])
    assert "again holds a run already" in told
