"""A run that goes on for more steps than it was begun with."""

import pytest
import torch

from tests.helpers.projects import metrics
from tests.helpers.runs import train, trained

CONSTANT = ("train.schedule=constant", "train.warmup_ratio=0")


@pytest.mark.slow
def test_a_finished_run_goes_on_to_more_steps_as_if_it_had_been_begun_with_them(project, capfd):
    whole, _ = train(project, "nine", *CONSTANT, "train.steps=9")
    run, _ = train(project, "six", *CONSTANT)
    with pytest.raises(AssertionError, match="is finished; to go on with it, ask for more train.steps"):
        train(project, "six", *CONSTANT, f"--resume={run}")
    capfd.readouterr()
    train(project, "six", *CONSTANT, "train.steps=9", f"--resume={run}")
    assert "The run now goes on to step 9 (train.steps was 6 and is now 9): from step 7 on " in capfd.readouterr().out
    assert metrics(run, "loss") == metrics(whole, "loss")
    assert metrics(run, "step") == [*range(7), 6, *range(7, 10), 9], "the loss that was measured at its first end stays"
    ours, theirs = trained(run), trained(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(AssertionError, match=r"is now 4: that is 4 steps, and .*step-000009 was saved after step 9"):
        train(project, "six", *CONSTANT, "train.steps=4", f"--resume={run}")
    assert (run / "report.json").exists()


@pytest.mark.slow
def test_a_stopped_run_may_become_longer_and_its_rate_is_then_that_of_a_run_of_so_many_steps(project):
    whole, _ = train(project, "rates-of-eight", "train.steps=8")
    run, _ = train(project, "stopped", stop_at=3)
    train(project, "stopped", "train.steps=8", f"--resume={run}")
    assert metrics(run, "learning_rate")[3:] == metrics(whole, "learning_rate")[3:]
    assert metrics(run, "learning_rate")[2] != metrics(whole, "learning_rate")[2]


@pytest.mark.slow
def test_a_method_that_plans_for_all_steps_refuses(project):
    run, _ = train(project, "adalora", "method=adalora", ds="zero2", stop_at=3)
    with pytest.raises(AssertionError, match=r"other settings: train.steps was 6 and is now 8"):
        train(project, "adalora", "method=adalora", "train.steps=8", f"--resume={run}", ds="zero2")
