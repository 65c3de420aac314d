"""A run's evaluations: answers on every ZeRO stage, the best checkpoint, the early end; training goes on as without."""

import json
import shutil
import time

import pytest
import torch
from accelerate import tracking
from transformers import AutoTokenizer

from sorsa_ds.evaluate.command import evaluate
from sorsa_ds.evaluate.options import Options
from sorsa_ds.run import tracker_kinds
from sorsa_ds.run.checkpoint.folder import best_checkpoint, existing_checkpoints
from sorsa_ds.run.peft_files.files import remove_peft_files
from sorsa_ds.run.reload import load_adapter
from sorsa_ds.run.samples import read_samples
from sorsa_ds.runtime import collectives
from sorsa_ds.train import report, sampler, trainer
from tests.helpers.projects import ROOT, metrics
from tests.helpers.runs import train, trained
from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow
TOKENS = 6
LIVELY = ["train.learning_rate=5e-3", "sorsa.dropout=0.1", f"evaluation.sample_tokens={TOKENS}"]
WATCHED = ["train.eval_every=2", "evaluation.samples=3", "evaluation.samples_every=2"]


@pytest.fixture(scope="module")
def unwatched(project):
    """A run with dropout that asks its model nothing."""
    return train(project, "unwatched", *LIVELY, "evaluation.last_answer=false")[0]


@pytest.fixture(scope="module")
def watched(project):
    """The same run, which asks it three questions on the way."""
    return train(project, "watched", *LIVELY, *WATCHED)[0]


def report_of(run):
    return json.loads((run / "report.json").read_text())


def test_asking_moves_no_number_of_the_training(unwatched, watched):
    for key in ("loss", "grad_norm", "reg_loss"):
        assert metrics(watched, key) == metrics(unwatched, key)
    ours, theirs = trained(watched), trained(unwatched)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not read_samples(unwatched)


def test_answers_are_asked_for_at_the_start_in_turn_and_at_the_end(watched):
    found = read_samples(watched)
    assert [(one["step"], one["number"]) for one in found] == [(s, n) for s in (0, 4, 6) for n in (0, 1, 2)]
    assert all("### Instruction" in one["prompt"] and one["expected"].startswith(" It is") for one in found)


def test_the_answers_at_the_end_are_those_of_the_finished_model(watched, project):
    """Under ZeRO-3 on two ranks, against a plain loop without a cache on the rebuilt model."""
    model = load_adapter(watched / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(project / "model")
    for sample in read_samples(watched)[-3:]:
        ids = tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"]
        length = len(ids)
        with torch.no_grad():
            while len(ids) < length + TOKENS:
                following = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
                if following == tokenizer.eos_token_id:
                    break
                ids.append(following)
        assert sample["answer"] == tokenizer.decode(ids[length:], skip_special_tokens=True)


@pytest.mark.parametrize(("ds", "ranks"), [("stage0", 1), ("zero2", 2)])
def test_answers_on_other_stages(project, ds, ranks):
    run, _ = train(project, f"asked-{ds}", *LIVELY[:1], LIVELY[2], *WATCHED, "train.steps=2", ds=ds, ranks=ranks)
    steps = [(one["step"], one["number"]) for one in read_samples(run)]
    assert steps == [(step, number) for step in (0, 2) for number in range(3)]


def test_a_run_that_is_asked_nothing_shows_one_answer_at_its_end(project, capfd):
    run, _ = train(project, "last", *LIVELY, "train.steps=2", ranks=1, ds="stage0")
    (sample,) = read_samples(run)
    assert (sample["step"], sample["number"]) == (2, 0)
    assert "Step 2, answer to held-out prompt 1 of" in capfd.readouterr().out
    train(project, "nothing", "train.steps=2", "data.eval_size=0", ranks=1, ds="stage0")
    assert "No answer of the model is shown: there are no held-out prompts." in capfd.readouterr().out


@pytest.fixture
def losses(monkeypatch):
    """Lets a run measure these held-out losses, one after the other, and then the last one again."""
    given = []

    def measured(*_):
        return (given.pop(0) if len(given) > 1 else given[0]), {}

    monkeypatch.setattr(trainer, "held_out_losses", measured)  # ranks are forked, each with a list of its own
    return given


def checkpoints_of(run):
    return [path.name for path in existing_checkpoints(run)]


def test_the_best_checkpoint_outlives_newer_ones(project, losses):
    losses += [9.0, 3.0, 2.0, 2.5, 2.4, 2.6, 2.7]
    run, _ = train(project, "best", "train.eval_every=1", "output.save_every=0", "output.keep_checkpoints=1")
    assert checkpoints_of(run) == ["step-000006", "step-000002"]
    assert best_checkpoint(run).name == "step-000002"
    assert report_of(run)["best"] == {"step": 2, "eval_loss": 2.0, "checkpoint": "step-000002"}
    assert report_of(run)["eval_loss_end"] == 2.7


ALONE = ["train.eval_every=1", "output.save_every=1", "output.keep_checkpoints=1"]


def test_a_best_checkpoint_that_is_due_anyway_is_saved_once_and_goes_when_another_is_better(project, losses):
    losses += [9.0, 3.0, 2.0, 2.5, 1.0, 2.6, 2.7]
    run, _ = train(project, "due", *ALONE, ranks=1, ds="stage0")
    assert checkpoints_of(run) == ["step-000006", "step-000004"]
    assert best_checkpoint(run).name == "step-000004"


def test_none_is_kept_where_that_is_not_wanted(project, losses):
    losses += [9.0, 1.0, 2.0]
    wanted = ["evaluation.keep_best=false", "output.save_every=0", "train.eval_every=3"]
    run, _ = train(project, "unkept", *wanted, ranks=1, ds="stage0")
    assert checkpoints_of(run) == ["step-000006"]
    assert report_of(run)["best"] == {"step": 3, "eval_loss": 1.0, "checkpoint": None}


PATIENT = ["train.eval_every=1", "evaluation.patience=2", "evaluation.min_delta=0.5"]


def test_a_run_that_does_not_improve_ends_early_and_is_finished(project, losses, capfd):
    losses += [9.0, 3.0, 2.0, 1.9, 1.6, 1.0]
    run, said = train(project, "early", *PATIENT, ranks=1, ds="stage0")
    assert said is None
    found = report_of(run)
    assert (found["steps"], found["planned_steps"]) == (4, 6)
    assert found["best"] == {"step": 4, "eval_loss": 1.6, "checkpoint": "step-000004"}
    assert found["eval_loss_end"] == 1.6, "it was measured already"
    assert sum(source["taken"] for source in found["sources"].values()) == 4 * 6, "examples of a global batch"
    assert len(metrics(run, "loss")) == 4
    assert (
        "Stopped early after step 4: the held-out loss has not fallen by more than 0.5 in 2 evaluations "
        "(evaluation.patience=2); the lowest, 1.6000, was that after step 4." in capfd.readouterr().out
    )


def test_a_run_that_goes_on_knows_for_how_long_it_has_waited(project, losses):
    losses += [9.0, 3.0, 2.0, 1.9]
    run, said = train(project, "stopped", *PATIENT, "output.save_every=1", stop_at=3)
    assert "stopped after step 3" in said
    assert json.loads((run / "ended.json").read_text())["state"] == "interrupted"
    losses[:] = [1.9, 1.9]  # made again after step 3, and the next one
    train(project, "stopped", *PATIENT, "output.save_every=1", f"--resume={run}")
    assert report_of(run)["steps"] == 4
    assert not (run / "ended.json").exists()


def test_going_back_makes_the_earlier_best_one_the_best_again(project, losses):
    losses += [9.0, 3.0, 2.0, 1.0]
    run, _ = train(project, "back", "train.eval_every=2", ranks=1, ds="stage0")
    assert best_checkpoint(run).name == "step-000006"
    losses[:] = [5.0]
    kept = shutil.copytree(run / "checkpoints" / "step-000002", project / "kept-step")
    train(project, "back", "train.eval_every=2", f"--resume={run}/checkpoints/step-000004", ranks=1, ds="stage0")
    assert kept.exists()
    assert best_checkpoint(run).name == "step-000002", "as it was when step 4 was saved"


def test_a_checkpoint_of_a_run_is_evaluated_by_its_name(watched):
    measured = dict(zip((0, 2, 4, 6), metrics(watched, "eval_loss"), strict=True))
    for name, step in (("2", 2), ("step-000004", 4), ("best", 6), ("latest", 6)):
        options = Options(model=str(watched), task="loss", checkpoint=name)
        (results,) = run_ranks(1, evaluate, options)
        assert results["nats_per_token"] == pytest.approx(measured[step], rel=1e-5), name
        assert results["reported"] == measured[step]
        assert (watched / "evaluation" / f"held-out-loss-step-{step:06d}" / "results.json").exists()


def refusal(**options):
    with pytest.raises(ValueError) as refused:
        evaluate(Options(task="loss", **options))
    return str(refused.value)


def test_a_checkpoint_that_is_not_there_is_refused(unwatched, project):
    (told,) = run_ranks(1, _refused, str(unwatched), "5")
    assert f"--checkpoint: {unwatched} has no checkpoint '5'; it has step-000006" in told
    (told,) = run_ranks(1, _refused, str(project / "model"), "best")
    assert told.startswith("--checkpoint goes with the folder of a run")


def _refused(model, checkpoint):
    return refusal(model=model, checkpoint=checkpoint)


def test_the_best_checkpoint_of_a_run_that_goes_on_is_that_of_its_end_where_it_was_the_best(project, losses):
    losses += [9.0, 3.0, 1.0]
    run, _ = train(project, "longer", "train.eval_every=4", "output.keep_checkpoints=1")
    assert report_of(run)["best"] == {"step": 6, "eval_loss": 1.0, "checkpoint": "step-000006"}
    losses[:] = [2.0, 2.5]
    train(project, "longer", "train.eval_every=4", "output.keep_checkpoints=1", "train.steps=9", f"--resume={run}")
    assert report_of(run)["best"] == {"step": 6, "eval_loss": 1.0, "checkpoint": "step-000006"}
    assert checkpoints_of(run) == ["step-000009", "step-000006"]


def test_answers_at_the_end_of_a_run_that_goes_on_stay_and_none_is_there_twice(project):
    asked = ["train.eval_every=4", "evaluation.samples=1", "evaluation.sample_tokens=2"]
    run, _ = train(project, "asked-on", *asked, ranks=1, ds="stage0")
    assert [one["step"] for one in read_samples(run)] == [0, 4, 6]
    train(project, "asked-on", *asked, "train.steps=9", f"--resume={run}", ranks=1, ds="stage0")
    assert [one["step"] for one in read_samples(run)] == [0, 4, 6, 8, 9]
    (run / "report.json").unlink()  # as after a kill in the last moment
    train(project, "asked-on", *asked, "train.steps=9", f"--resume={run}", ranks=1, ds="stage0")
    assert [one["step"] for one in read_samples(run)] == [0, 4, 6, 8, 9]


def test_a_run_that_stopped_early_goes_on_where_it_may_wait_longer_and_is_refused_elsewhere(project, losses):
    losses += [9.0, 3.0, 2.0, 1.9, 1.6]
    run, _ = train(project, "patience", *PATIENT, ranks=1, ds="stage0")
    before = (run / "report.json").read_bytes()
    alone = {"ranks": 1, "ds": "stage0"}
    with pytest.raises(AssertionError, match=r"it stopped early \(evaluation.patience=2\); to go on with it, set"):
        train(project, "patience", *PATIENT, f"--resume={run}", **alone)
    stopped = r"the run stopped early after step 4: .* fallen in 2 evaluations \(evaluation.patience=2\); to go on, set"
    with pytest.raises(AssertionError, match=stopped):
        train(project, "patience", *PATIENT, "train.steps=12", f"--resume={run}", **alone)
    assert (run / "report.json").read_bytes() == before
    losses[:] = [1.6, 1.6, 1.5]
    train(project, "patience", *PATIENT, "evaluation.patience=9", f"--resume={run}", **alone)
    assert report_of(run)["steps"] == 6
    train(project, "patience", *PATIENT, "evaluation.patience=0", "evaluation.min_delta=0", "train.steps=8",
          f"--resume={run}", **alone)  # fmt: skip
    assert report_of(run)["steps"] == 8


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_answer_fails_no_finished_run_and_holds_none_up(project, monkeypatch, failing, capfd):
    answer = sampler.Sampler._answer

    def failed(self, generate, question):
        if collectives.rank() == failing:
            raise RuntimeError("no memory for it")
        return answer(self, generate, question)

    monkeypatch.setattr(sampler.Sampler, "_answer", failed)
    run, said = train(project, f"unanswered-{failing}", "train.steps=2", "train.timeout_minutes=1", ds="zero2")
    assert said is None
    assert report_of(run)["steps"] == 2
    told = capfd.readouterr().err
    if failing == 0:
        assert "[rank 0] no answer of the model is shown: RuntimeError: no memory for it" in told
    else:
        assert len(read_samples(run)) == 1, "a rank without a question of its own is not asked"


def test_a_page_that_cannot_be_written_fails_no_finished_run(unwatched, project, capsys):
    run = shutil.copytree(unwatched, project / "unshown")
    (run / "samples.jsonl").write_text("[1]\n")
    (run / "report.html").unlink(missing_ok=True)
    report.show_report(report_of(run), run)
    shown = capsys.readouterr()
    assert "report.html is not written: " in shown.err
    assert "evaluate it" in shown.out
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_goes_on_keeps_nothing_that_its_earlier_end_has_made_for_others(project):
    alone = {"ranks": 1, "ds": "stage0"}
    run, _ = train(project, "for-others", "train.steps=2", "output.peft_adapter=true", **alone)
    made = [run / "adapter" / "adapter_config.json", run / "adapter" / "adapter_model.safetensors"]
    assert all(file.exists() for file in made)
    (run / "report.html").touch()
    more = ["train.steps=4", "output.peft_adapter=true", f"--resume={run}"]
    _, said = train(project, "for-others", *more, stop_at=3, **alone)
    assert "stopped after step 3" in said
    assert not any(file.exists() for file in [*made, run / "report.html", run / "report.json"])
    assert (run / "adapter" / "sorsa_config.json").exists()
    train(project, "for-others", *more, **alone)
    assert all(file.exists() for file in made)


def test_files_of_version_0_1_0_under_the_names_of_peft_stay(tmp_path):
    adapter = shutil.copytree(ROOT / "tests" / "fixtures" / "run_of_0.1.0" / "adapter", tmp_path / "adapter")
    before = sorted(path.name for path in adapter.iterdir())
    remove_peft_files(adapter)
    assert "adapter_config.json" in before
    assert sorted(path.name for path in adapter.iterdir()) == before


def test_a_finished_run_stays_as_it_is_where_a_tracker_refuses(project, monkeypatch):
    class Refusing:
        def __init__(self, **arguments):
            raise OSError("its server does not answer")

    run, _ = train(project, "untracked", "train.steps=4", ranks=1, ds="stage0")
    before = contents(run)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Refusing)
    monkeypatch.setattr(tracker_kinds.TrackerKind, "is_installed", True)
    with pytest.raises(AssertionError, match="tensorboard cannot begin: its server does not answer"):
        train(project, "untracked", "output.trackers=[tensorboard]", "train.steps=6",
              f"--resume={run}/checkpoints/step-000002", ranks=1, ds="stage0")  # fmt: skip
    assert contents(run) == before


def contents(run):
    """Every file of a run but its lock, with what it holds."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


def test_files_in_pefts_format_come_after_the_report_and_may_take_longer_than_a_collective(project, monkeypatch):
    seen = project / "seen"

    def slow(run, config, device):
        time.sleep(8)
        seen.write_text(str((run / "report.json").exists()))

    monkeypatch.setattr(trainer, "add_peft_files", slow)
    run, _ = train(project, "slow-files", "train.steps=2", "train.timeout_minutes=0.1", ds="zero2")
    assert seen.read_text() == "True"
    assert report_of(run)["steps"] == 2
