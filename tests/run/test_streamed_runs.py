"""Runs on several sources and on streams: what the report counts, and going on where a run was stopped."""

import json

import pytest
import torch

from sorsa_ds.train.options import parse
from tests.helpers.projects import settings
from tests.helpers.runs import train, trained


@pytest.fixture(scope="module")
def sources(project):
    """Settings of a mix of the project's questions and of 20 instructions, one of which has no response."""
    lines = [json.dumps({"instruction": f"Say {i}.", "output": f"Well, {i}." * (i != 4)}) for i in range(20)]
    (project / "other.jsonl").write_text("\n".join(lines) + "\n")
    held_out = (project / "data.jsonl").read_text().splitlines()[:6]
    (project / "held_out.jsonl").write_text("\n".join(held_out) + "\n")
    return project


def mix(project, first: str, second: str) -> list[str]:
    one, two = project / "data.jsonl", project / "other.jsonl"
    return [
        "data.path=word-problems",
        f"data.mix=[{{path: {one}, weight: 3{first}}}, {{path: {two}, weight: 1{second}}}]",
    ]


def streamed(project) -> list[str]:
    first = f", eval_path: {project / 'held_out.jsonl'}"
    own = ["data.streaming=true", "data.shuffle_buffer=8", "data.max_length=200", "data.eval_size=5"]
    return [*mix(project, first, ", eval_size: 0"), *own]


def report_of(run) -> dict:
    return json.loads((run / "report.json").read_text())


@pytest.mark.slow
def test_a_mix_is_counted_and_measured_by_source(sources):
    run, _ = train(
        sources, "mixed", *mix(sources, ", eval_size: 4", ""), "data.eval_size=2", "train.eval_every=3", ds="stage0"
    )
    report = report_of(run)
    one, two = report["sources"]["data.jsonl"], report["sources"]["other.jsonl"]
    assert (one["rows"], one["learned_rows"], one["held_out"]["rows"]) == (36, 36, 4)
    assert (two["rows"], two["learned_rows"], two["held_out"]["rows"]) == (18, 17, 2)
    assert (list(two["left_out"].values()), one["left_out"]) == ([1], {})
    assert one["taken"] + two["taken"] == 6 * 6
    assert (report["data"]["training"]["rows"], report["data"]["held-out"]["rows"]) == (54, 6)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in measured] == [0, 3, 6]
    for name, one in report["sources"].items():
        assert (measured[0][f"eval_loss/{name}"], measured[-1][f"eval_loss/{name}"]) == (
            one["eval_loss_start"], one["eval_loss_end"],
        )  # fmt: skip
    weights = {name: one["held_out"]["learned_tokens"] for name, one in report["sources"].items()}
    expected = sum(report["sources"][name]["eval_loss_end"] * n for name, n in weights.items()) / sum(weights.values())
    assert report["eval_loss_end"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_a_stopped_streaming_run_goes_on_bit_for_bit(sources):
    whole, _ = train(sources, "whole", *streamed(sources), ds="stage0")
    cut, said = train(sources, "cut", *streamed(sources), ds="stage0", stop_at=3)
    assert "stopped after step 3 of 6" in said
    train(sources, "cut", *streamed(sources), f"--resume={cut}", ds="stage0")
    ends = trained(whole), trained(cut)
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    reports = report_of(whole), report_of(cut)
    for key in ("sources", "data", "eval_loss_start", "eval_loss_end", "loss_first", "loss_last"):
        assert reports[0][key] == reports[1][key], key
    assert sum(one["taken"] for one in reports[0]["sources"].values()) == 6 * 6


@pytest.mark.slow
def test_a_streaming_run_goes_on_at_other_ranks_with_the_same_batches(sources):
    whole, _ = train(sources, "one_rank", *streamed(sources), ds="stage0", ranks=1)
    cut, _ = train(sources, "one_then_two", *streamed(sources), ds="stage0", ranks=1, stop_at=2)
    train(sources, "one_then_two", *streamed(sources), f"--resume={cut}", ds="stage0", ranks=2)
    assert report_of(cut)["sources"]["other.jsonl"]["taken"] == report_of(whole)["sources"]["other.jsonl"]["taken"]
    assert report_of(cut)["eval_loss_end"] == pytest.approx(report_of(whole)["eval_loss_end"], rel=1e-5)
    assert report_of(cut)["loss_last"] == pytest.approx(report_of(whole)["loss_last"], rel=1e-5)


@pytest.mark.slow
def test_a_row_that_cannot_be_read_stops_every_rank_in_the_middle_of_a_run(sources):
    lines = (sources / "data.jsonl").read_text().splitlines()
    (sources / "broken.jsonl").write_text("\n".join([*lines[:20], "nonsense"]) + "\n")
    own = [f"data.path={sources / 'broken.jsonl'}", "data.streaming=true", "data.shuffle_buffer=8"]
    with pytest.raises(AssertionError, match=r"broken\.jsonl: cannot be read behind row 16: .*broken\.jsonl, line 21"):
        train(sources, "broken", *own, "data.max_length=200", "data.eval_size=0", ds="stage0")


def test_a_stream_needs_steps(sources):
    words = [word for word in settings(sources, "x") if not word.startswith("train.steps")]
    with pytest.raises(ValueError, match=r"data\.streaming: the length of a stream is not known, so train\.steps must"):
        parse([*words, "data.streaming=true", "data.eval_size=0"])
