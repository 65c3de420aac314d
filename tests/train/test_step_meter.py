"""What a run's log says of its steps: speed on every line, and where asked for, the parts of some steps and traces."""

import gzip
import json

import pytest

from sorsa_ds.config.train_settings import TrainConfig
from sorsa_ds.train.step_meter import covered
from tests.helpers.projects import ROOT, metrics, settings
from tests.helpers.runs import train
from tests.helpers.worlds import run_ranks

PARTS = {"data", "forward", "backward", "step", "rest"}


def lines(run):
    """The lines of a run's steps."""
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in logged if "loss" in line]


def parts(line):
    """The seconds of a line's parts."""
    return {key.partition("/")[2]: value for key, value in line.items() if key.startswith("step_seconds/")}


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [([], 0), ([(1, 2)], 1), ([(3, 4), (1, 2)], 2), ([(1, 4), (2, 3), (3.5, 5)], 4), ([(1, 2), (2, 3), (1, 2)], 2)],
)
def test_time_that_several_spans_cover_counts_once(spans, seconds):
    assert covered(spans) == pytest.approx(seconds)


@pytest.mark.slow
@pytest.mark.parametrize("ds", ["zero2", "zero3"])
def test_the_fourth_and_fifth_step_are_profiled_and_traced(project, ds):
    run, _ = train(project, f"traced-{ds}", "train.profile_steps=2", "train.profile_trace=true", ds=ds)
    logged = lines(run)
    for line in logged:
        assert line["tokens_per_second_per_gpu"] == pytest.approx(line["tokens_per_second"] / 2)
        assert "mfu" not in line  # nobody knows the peak of a CPU
    assert [line["step"] for line in logged if "step_seconds" in line] == [4, 5]
    for line in logged[3:5]:
        found = parts(line)
        during = found.pop("collectives")
        assert found.keys() == PARTS and all(seconds > 0 for seconds in found.values())
        assert sum(found.values()) == pytest.approx(line["step_seconds"])
        assert 0 < during < line["step_seconds"]
        assert found["forward"] + found["backward"] > 0.1 * line["step_seconds"]
    assert not any(parts(line) for line in (*logged[:3], *logged[5:]))
    traces = sorted((run / "profile").iterdir())
    assert [trace.name for trace in traces] == [f"step-{step:06d}.rank-0.json.gz" for step in (4, 5)]
    for trace in traces:
        with gzip.open(trace) as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"_SorsaFunction", "_SorsaFunctionBackward"} <= names
        assert any(name.startswith("gloo:") for name in names if name)


def syncs_of_a_step(project, name, *arguments):
    """Host syncs of the fourth step, and what the meter found in it."""
    from benchmarks.helpers.host_syncs import HostSyncs
    from sorsa_ds.train.options import parse
    from sorsa_ds.train.setup import assemble

    trainer = assemble(parse([*settings(project, name), *arguments, f"--ds_config={ROOT}/ds_configs/zero2.json"]))
    trainer.prepare()
    for number in range(3):
        trainer.step(number)
    with HostSyncs() as syncs, trainer.meter.step(3):
        _, ready, _ = trainer.step(3)
    return dict(syncs.counts), trainer.meter.figures(ready)


@pytest.mark.slow
def test_a_profile_adds_no_host_sync_and_nothing_is_there_without_one(project):
    plain, figures = run_ranks(2, syncs_of_a_step, project, "plain")[0]
    assert sum(plain.values()) <= 3
    assert figures.keys() == {"tokens_per_second", "tokens_per_second_per_gpu", "mfu", "memory_gib"}
    ranks = run_ranks(2, syncs_of_a_step, project, "profiled", "train.profile_steps=1")
    assert [counts for counts, _ in ranks] == [plain, plain]
    assert parts(ranks[0][1]).keys() == PARTS | {"collectives"}
    assert parts(ranks[1][1]) == {}  # only rank 0 is profiled
    for name in ("plain", "profiled"):
        assert not (project / name / "profile").exists()


@pytest.mark.slow
def test_a_run_that_ends_early_says_what_is_not_profiled(project, capfd):
    run, _ = train(project, "short", "train.steps=4", "train.profile_steps=3", ranks=1, ds="stage0")
    said = capfd.readouterr().out
    assert "Profile: steps 4 to 4, 1 instead of 3: the run has no more after 3 of warm-up." in said
    assert "mfu           " in said and "not logged: the peak of a CPU is not known" in said
    assert len(metrics(run, "step_seconds")) == 1


@pytest.mark.slow
def test_a_trace_that_cannot_be_written_does_not_stop_a_run(project, capfd):
    def blocked(name):
        folder = project / name
        folder.mkdir()
        (folder / "profile").write_text("in the way")

    blocked("blocked")
    run, _ = train(project, "blocked", "train.profile_steps=1", "train.profile_trace=true", ranks=1, ds="stage0")
    assert "step 4 has no trace: " in capfd.readouterr().err
    assert len(lines(run)) == 6


def test_a_trace_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="train.profile_trace writes a trace of each of train.profile_steps"):
        TrainConfig(profile_trace=True)
