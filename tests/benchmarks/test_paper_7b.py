"""The papers' comparison in parts: its costs by hand, what a part that fails does to others, and all of it in tiny."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import paper_7b
from benchmarks.helpers import paper_costs
from benchmarks.helpers.paper_costs import Decoding
from benchmarks.helpers.paper_parts import Work
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.runtime.errors import Preempted
from tests.helpers import projects
from tests.helpers.projects import ROOT
from tests.helpers.small_data import QUESTIONS, write_lines

PARTS = ["train-sorsa", "train-lora", "gsm8k", "math"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny random model, and made-up rows as in MetaMathQA, GSM-8K and MATH."""
    folder = projects.make(tmp_path_factory.mktemp("project"))
    rows = [
        {"type": "GSM_Rephrased", "query": f"What is {i} + {i}?", "response": f"It is {2 * i}.\nThe answer is: {2 * i}"}
        for i in range(12)
    ]
    write_lines(folder / "metamath.jsonl", rows)
    write_lines(folder / "gsm8k.jsonl", QUESTIONS)
    for subject in ("algebra", "geometry"):
        for number in (1, 2):
            problem = {
                "problem": f"What is ${number} + {number}$?", "level": f"Level {number}", "type": subject.title(),
                "solution": f"It is $\\boxed{{{2 * number}}}$.",
            }  # fmt: skip
            write_lines(folder / "MATH" / "test" / subject / f"{number}.json", [problem])
    return folder


def words(project: Path, output: Path, *more: str) -> list[str]:
    """The options of a comparison of two methods in two steps."""
    return [
        "--output", str(output), "--model", str(project / "model"), "--data", str(project / "metamath.jsonl"),
        "--gsm8k", str(project / "gsm8k.jsonl"), "--math", str(project / "MATH"), "--methods", "sorsa,lora",
        "--parts", "train,gsm8k,math", "--task_options=--limit 2 --max_new_tokens 8 --dtype fp32",
        "adapter.rank=4", "train.steps=2", "train.global_batch_size=4", "train.micro_batch_size=2",
        "train.precision=fp32", "data.train_split=train[:8]", "data.eval_split=train[8:10]", "data.max_length=128",
        "output.peft_adapter=false", *more,
    ]  # fmt: skip


def asked(project: Path, output: Path, *more: str) -> paper_7b.Asked:
    """What such a command line asks for."""
    return paper_7b.read(paper_7b.parser().parse_intermixed_args(words(project, output, *more)))


def test_the_papers_learning_rates_are_the_default():
    assert paper_7b.rates(["sorsa", "lora"], "") == "sorsa=3e-05,lora=2e-05"
    assert paper_7b.rates(["sorsa", "lora"], "lora=1e-4,lora=2e-4") == "lora=1e-4,lora=2e-4,sorsa=3e-05"
    assert paper_7b.rates(["sorsa", "lora"], "1e-4") == "1e-4"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--parts", "train,maths"], "--parts: 'train,maths' is no list of some of train, gsm8k, math, drift"),
        (["--gsm8k", "nowhere.jsonl"], "--gsm8k: nowhere.jsonl does not exist"),
        (["--task_options=--model x"], "--model is set by the comparison"),
        (["--efficiency", "0"], "--efficiency: 0.0 is no number above 0"),
        (["train.stesp=3"], "did you mean .*train.steps"),
    ],
)
def test_a_bad_command_is_refused_by_name(project, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        asked(project, tmp_path, *more)
    assert not any(tmp_path.iterdir())


def test_math_is_the_users_own_but_the_plan_needs_none():
    options = paper_7b.parser()
    with pytest.raises(ValueError, match="--math is missing.*--parts train,gsm8k,drift"):
        paper_7b.read(options.parse_intermixed_args([]))
    found = paper_7b.read(options.parse_intermixed_args(["--plan"]))
    assert [part.name for part in found.parts][-3:] == ["gsm8k", "math", "drift"]
    assert found.request.rates == {"sorsa": [3e-5], "pissa": [2e-5], "lora": [2e-5], "adalora": [2e-5]}


def test_the_seconds_of_generating_are_the_longest_of_three():
    model = Decoding(parameters=7 * 10**9, blocks=32, token_bytes=2**19)
    one, eight = Hardware(), Hardware(gpus=8)
    by_host = 32 * paper_costs.BLOCK_SECONDS
    assert model.seconds(1319, 16, 100, one) == pytest.approx(83 * 100 * by_host)
    assert model.seconds(1319, 16, 100, eight) == pytest.approx(11 * 100 * by_host)
    slow = Hardware(memory_bandwidth=100)
    weights, kept = 14e9, 16 * (256 + 50) * 2**19
    assert model.seconds(16, 16, 100, slow) == pytest.approx(100 * (weights + kept) / 100e9)
    assert model.seconds(16, 16, 100, Hardware(tflops=1)) == pytest.approx(100 * 2 * 7e9 * 16 / 0.4e12)


@pytest.mark.slow
def test_the_plan_of_llama_2_7b_is_the_planners(tmp_path):
    options = paper_7b.parser().parse_intermixed_args(
        ["--plan", "--output", str(tmp_path), "--methods", "lora", "--seeds", "1,2", "--parts", "train,gsm8k"]
    )
    found = paper_7b.read(options)
    train, gsm8k = paper_costs.costs(found.parts, found.request, found.options, found.hardware)
    assert (train.models, train.fits) == (2, True) and 60 < train.gib < 80
    # 782 steps of 128 x 512 tokens, with two products (forward, and the input's gradient) of 6.6e9 frozen weights.
    assert train.hours == pytest.approx(2 * 782 * 128 * 512 * 4 * 6.6e9 / (0.4 * 989e12) / 3600, rel=0.15)
    # The base model writes 1,024 tokens and each of two runs half of them, in 83 batches.
    assert gsm8k.models == 3 and gsm8k.hours == pytest.approx(83 * 1024 * 2 * 32 * paper_costs.BLOCK_SECONDS / 3600)
    table = paper_costs.as_table([train, gsm8k], found.hardware)
    assert f"| all |  | {train.gib:.1f} | {train.hours + gsm8k.hours:.2f} |" in table


def test_rows_that_are_not_counted_cannot_be_planned(project, tmp_path):
    whole = asked(project, tmp_path, "data.train_split=train", "train.steps=null").request.base
    with pytest.raises(ValueError, match=r"data.train_split: 'train' does not say .* write a slice"):
        paper_costs.steps_of(whole, 128)


def stand_in(work: Work, broken: str):
    """A stand-in for launch/compare.py, in which the training of one method fails."""

    def launch(_work, given, name):
        methods = given[given.index("--methods") + 1].split(",")
        failed = [{"method": m, "reason": "out of memory"} for m in methods if m == broken and "--task" not in given]
        made = [
            {"method": m, "score": {"mean": 50.0, "deviation": None, "count": 1},
             "figures": {"trainable_parameters": {"mean": 1000}}}
            for m in methods if m != broken
        ]  # fmt: skip
        work.request.output.mkdir(exist_ok=True)
        found = {"methods": made, "failed": failed, "score_before": 10.0}
        (work.request.output / "comparison.json").write_text(json.dumps(found))
        launched.append((name, methods))
        return 2 if failed else 0

    launched: list = []
    return launch, launched


def test_a_part_that_fails_is_named_and_the_others_go_on(project, tmp_path, monkeypatch):
    wanted = asked(project, tmp_path)
    for broken, expected in (("lora", PARTS), ("nothing", PARTS[1:]), ("nothing", [])):
        work = Work(wanted.request)
        launch, launched = stand_in(work, broken)
        monkeypatch.setattr(Work, "_launch", launch)
        for part in wanted.parts:
            work.make(part)
        assert [name for name, _ in launched] == expected
        if broken == "lora":
            assert work.failed["train-lora"] == "lora: out of memory"
            assert work.failed["math"].startswith("lora: not trained, so not measured")
            assert dict(launched)["math"] == ["sorsa"]
            told = json.loads(paper_7b.line(wanted, work, None))
            assert told["done"] == ["train-sorsa"] and told["accuracy"]["math"] == {"base": 10.0, "sorsa": 50.0}
    assert not work.failed and json.loads(paper_7b.line(wanted, work, None))["done"] == PARTS
    table = paper_7b.results(wanted, work)
    assert "| sorsa | 0.0M | 50.00 | 56.03 | 50.00 | 10.36 | - |" in table and "--limit 2" in table
    other = asked(project, tmp_path, "train.warmup_ratio=0.5")
    assert not any(Work(other.request).is_finished(part) for part in other.parts)
    assert "50.00" not in paper_7b.results(other, Work(other.request)), "another command's scores are not this one's"


def test_a_signal_between_two_parts_is_heard_before_the_next_begins(project, tmp_path):
    wanted = asked(project, tmp_path)
    work = Work(wanted.request)
    with work.stopping():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted, match="SIGTERM: stopped in the part train-sorsa; the same command goes on"):
            work.make(wanted.parts[0])
    assert not (tmp_path / "runs").exists()


def start(project: Path, output: Path) -> subprocess.Popen:
    """The real command, for one task."""
    return subprocess.Popen(
        [sys.executable, "benchmarks/paper_7b.py", *words(project, output, "--parts", "train,gsm8k")],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=projects.environment_of(project),
    )  # fmt: skip


@pytest.mark.slow
def test_it_is_stopped_and_goes_on_to_the_end(project, tmp_path):
    process = start(project, tmp_path)
    while not (tmp_path / "parts" / "train-sorsa.json").exists():
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 75 and "stopped in the part train-lora" in printed, printed[-4000:]

    printed, _ = start(project, tmp_path).communicate(timeout=600)
    assert "train-sorsa: finished before" in printed
    told = json.loads(printed.strip().rpartition("\n")[2])
    assert (told["parts"], told["done"], told["failed"]) == (PARTS[:3], PARTS[:3], {}), printed[-4000:]
    assert told["planned_gpu_hours"] >= 0
    measured = {task: set(found) for task, found in told["accuracy"].items()}
    assert measured == {"gsm8k": {"base", "sorsa", "lora"}, "math": set()}
    table = (tmp_path / "paper_7b.md").read_text()
    assert "| 56.03 |" in table and table.rstrip() in printed
    counts = [json.loads(file.read_text())["total"] for file in tmp_path.glob("evaluations/*/*/results.json")]
    assert counts == [2] * 3
