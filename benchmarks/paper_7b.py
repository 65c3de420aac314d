"""The papers' comparison at 7B in parts that can be resumed: MetaMathQA, then GSM-8K, MATH and drift, with their costs.

    python benchmarks/paper_7b.py --plan --gpus 1 --gpu_memory 80GiB        what each part will cost; nothing runs
    python benchmarks/paper_7b.py --output comparisons/paper_7b --math MATH     all of it; MATH is a folder of yours
    python benchmarks/paper_7b.py --output comparisons/paper_7b --math MATH --parts gsm8k,math --seeds 1 \\
        --model FOLDER --data metamath.jsonl --gsm8k gsm8k.jsonl train.save_every=50

Each part is one call of launch/compare.py: the training of each method, and each task for all methods. The same command
goes on where it was stopped. A part that fails is named, and the others go on; the exit code is 2 then. It ends with a
table beside the published figures, which is also OUTPUT/paper_7b.md, and with one line of JSON.
"""

import argparse
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from benchmarks.helpers.common import ROOT, say
from benchmarks.helpers.paper_costs import ASSUMPTIONS, Cost, as_table, costs
from benchmarks.helpers.paper_parts import TRAIN, Part, Work, parts_of
from sorsa_ds.evaluate import options as evaluation
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.options import size
from sorsa_ds.runtime import exit_codes
from sorsa_ds.runtime.console import OptionParser
from sorsa_ds.runtime.files import write_text
from sorsa_ds.runtime.memory import GIB
from sorsa_ds.study.compare import options as comparison
from sorsa_ds.study.compare.request import Request
from sorsa_ds.study.compare.score import Evaluation
from sorsa_ds.study.compare.trials import read_methods

RECIPE = ROOT / "launch" / "recipes" / "llama2_7b_metamath.yaml"
PARTS = (TRAIN, "gsm8k", "math", "drift")
RATES = {"sorsa": 3e-5, "sorsa-no-reg": 3e-5}
"""The papers' learning rates of the methods that do not have `OTHER_RATE`."""

OTHER_RATE = 2e-5
PUBLISHED = {
    "lora": (42.30, 5.50), "pissa": (53.07, 7.44), "adalora": (47.30, 6.48), "sorsa": (56.03, 10.36),
    "full": (49.05, 7.22),
}  # fmt: skip
"""Method -> published accuracy in GSM-8K and MATH, in percent, of Llama 2 7B (320M trained, full fine-tuning 6738M)."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What one command line asks for.

    options: task -> options of launch/evaluate.py.
    hardware: the hardware to plan for.
    """

    request: Request
    parts: list[Part]
    options: dict[str, evaluation.Options]
    hardware: Hardware
    only_plan: bool


def main() -> None:
    """Print the plan, or make the parts that are not finished."""
    asked = read(parser().parse_intermixed_args())
    if asked.only_plan:
        planned = costs(asked.parts, asked.request, asked.options, asked.hardware)
        say(f"{told(asked)}\n\n{as_table(planned, asked.hardware)}\n\n{ASSUMPTIONS}")
        say(line(asked, Work(asked.request), planned))
        return
    planned = costs_if_known(asked)
    work = Work(asked.request)
    with work.stopping():
        for part in asked.parts:
            say(f"{part.name}: {'finished before' if work.is_finished(part) else 'begins, or goes on'}")
            work.make(part)
            if part.name in work.failed:
                say(f"{part.name} failed: {work.failed[part.name]}")
    text = results(asked, work)
    write_text(asked.request.output / "paper_7b.md", f"{text}\n")
    say(f"\n{text}\n\n{line(asked, work, planned)}")
    if work.failed:
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add, defaults = made.add_argument, Hardware()
    add("--plan", action="store_true", help="print what each part will cost, and run nothing")
    add("--output", type=Path, default=Path("comparisons/paper_7b"), help="folder of the comparison")
    add("--model", help="folder or hub name (default: the recipe's)")
    add("--data", help="MetaMathQA's rows: a file, a folder or a hub name (default: the recipe's)")
    add("--gsm8k", metavar="FILE", help="questions of GSM-8K: a file, a folder or a hub name (default: from the hub)")
    add("--math", metavar="FOLDER", help="MATH as published, test/SUBJECT/NUMBER.json, or a file of rows")
    add("--methods", default="sorsa,pissa,lora,adalora")
    add("--seeds", default="1", help="of each method, as in 1,2,3 (default: %(default)s)")
    add("--learning_rates", default="", help="other ones than the papers', as in lora=1e-4,lora=2e-4")
    add("--parts", default=",".join(PARTS), help="which of them to make (default: %(default)s)")
    add("--config", default=str(RECIPE), help="YAML file with the settings of all runs (default: the recipe for 7B)")
    add("--ds_config", default="ds_configs/stage0.json", help="DeepSpeed JSON of all runs (default: %(default)s)")
    add("--task_options", default="", help='of GSM-8K and MATH, as in --task_options="--batch_size 64"')
    add("--drift_options", default="", help='of the drift, as in --drift_options="--samples 32"')
    add("--gpus", type=int, default=1, help="GPUs of this machine, or processes without any (default: %(default)s)")
    add("--gpu_memory", default="80GiB", help="to plan for: memory of a GPU (default: %(default)s)")
    add("--gpu_tflops", type=float, default=defaults.tflops, help="to plan for: in bf16 (default: %(default)s)")
    add("--efficiency", type=float, default=defaults.efficiency, help="to plan for: share of it (default: %(default)s)")
    add("--memory_bandwidth", type=float, default=defaults.memory_bandwidth, help="to plan for: GB/s of a GPU's memory")
    add("settings", nargs="*", metavar="key=value", help="settings of all runs, as train.save_every=50")
    return made


def read(a: argparse.Namespace) -> Asked:
    """What the words ask for.

    Raises:
        ValueError: the words do not go together; the message says which, and what to write.
    """
    kinds = [word for word in a.parts.split(",") if word]
    wrong = [kind for kind in kinds if kind not in PARTS or kinds.count(kind) > 1]
    if wrong or not kinds:
        raise ValueError(f"--parts: {a.parts!r} is no list of some of {', '.join(PARTS)}, each named once; write one")
    if "math" in kinds and a.math is None and not a.plan:
        raise ValueError(
            "--math is missing: MATH does not come with this program; name its folder (test/SUBJECT/NUMBER.json), or "
            "leave the part out, as in --parts train,gsm8k,drift"
        )
    for name in ("gpus", "gpu_tflops", "efficiency", "memory_bandwidth"):
        if not 0 < getattr(a, name) < 1e9:
            raise ValueError(f"--{name}: {getattr(a, name)} is no number above 0 and below 1e9; write such a number")
    methods = read_methods(a.methods)
    words = [
        "--methods", a.methods, "--seeds", a.seeds, "--output", str(a.output), "--config", a.config,
        "--ds_config", a.ds_config, "--num_gpus", str(a.gpus), "--learning_rates", rates(methods, a.learning_rates),
        *([f"model={a.model}"] if a.model else []), *([f"data.path={a.data}"] if a.data else []), *a.settings,
    ]  # fmt: skip
    request = comparison.parse(words)
    texts = {
        "gsm8k": with_data(a.task_options, a.gsm8k, "--gsm8k"), "math": with_data(a.task_options, a.math, "--math"),
        "drift": a.drift_options,
    }  # fmt: skip
    parts = parts_of(kinds, methods, texts)
    options = {part.task: evaluated(request, part) for part in parts if part.task}
    hardware = Hardware(
        gpus=a.gpus, gpu_memory=size(a.gpu_memory), tflops=a.gpu_tflops, efficiency=a.efficiency,
        memory_bandwidth=a.memory_bandwidth,
    )  # fmt: skip
    return Asked(request, parts, options, hardware, a.plan)


def rates(methods: list[str], own: str) -> str:
    """The learning rates in the words of launch/compare.py: the papers', but for the methods that have others in `own`.

    A number without a method's name is for all methods without one.
    """
    given = [word.strip() for word in own.split(",") if word.strip()]
    if any("=" not in word for word in given):
        return ",".join(given)
    named = {word.partition("=")[0] for word in given}
    return ",".join([*given, *(f"{m}={RATES.get(m, OTHER_RATE)}" for m in methods if m not in named)])


def with_data(options: str, place: str | None, option: str) -> str:
    """The options of a task, with the place of its questions.

    Raises:
        ValueError: a path is named at which there is nothing.
    """
    if place is None:
        return options
    path = Path(place).expanduser()
    if not path.exists() and (path.is_absolute() or place.count("/") != 1):
        raise ValueError(f"{option}: {place} does not exist; name a file, a folder or a data set of the hub")
    found = str(path.resolve()) if path.exists() else place
    return shlex.join(["--data", found]) + (f" {options}" if options else "")


def evaluated(request: Request, part: Part) -> evaluation.Options:
    """The options of launch/evaluate.py, which are read before anything is trained, so that wrong ones cost nothing.

    Raises:
        ValueError: the options do not go together, or set what the comparison sets.
    """
    assert part.task is not None, "a part that trains measures nothing"
    Evaluation(part.task, part.options)
    words = ["--data", "MATH"] if part.task == "math" and "--data" not in part.options else []
    return evaluation.parse(["--model", request.base.model, "--task", part.task, *words, *shlex.split(part.options)])


def costs_if_known(asked: Asked) -> list[Cost] | None:
    """The planned costs, which are said; None, with the reason, where they cannot be planned."""
    try:
        planned = costs(asked.parts, asked.request, asked.options, asked.hardware)
    except ValueError as error:
        say(f"The costs cannot be planned, and the parts are made without: {error}")
        return None
    say(f"{told(asked)}\n\n{as_table(planned, asked.hardware)}\n")
    return planned


def told(asked: Asked) -> str:
    """A sentence on what is planned, and for what hardware."""
    base, hardware = asked.request.base, asked.hardware
    return (
        f"Planned: {base.model}, rank {base.adapter.rank}, on {hardware.gpus} x {hardware.gpu_memory / GIB:.0f} GiB of "
        f"GPUs that reach {hardware.efficiency:.0%} of {hardware.tflops:g} TFLOP/s."
    )


def results(asked: Asked, work: Work) -> str:
    """What was found, beside what the papers have found, as a table in Markdown."""
    lines = [
        f"{asked.request.base.model} on {asked.request.base.data.path}; published: Llama 2 7B on MetaMathQA. "
        "Accuracies in %, drift in nats per token; mean ± standard deviation over the seeds.",
        "",
        "| method | trained | GSM-8K | published | MATH | published | drift |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("base", *asked.request.methods):
        trained = work.trained_parameters(name)
        published = PUBLISHED.get(name)
        gsm8k, math = ["-", "-"] if published is None else [f"{figure:.2f}" for figure in published]
        cells = [
            name, "-" if trained is None else f"{trained / 1e6:.1f}M", score(asked, work, "gsm8k", name), gsm8k,
            score(asked, work, "math", name), math, score(asked, work, "drift", name, ".4f"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    measured = {task: found["options"] for task in PARTS[1:] if (found := work.measured(task, asked.parts))}
    notes = [f"- {task} was measured with {options}" for task, options in measured.items() if options]
    return "\n".join([*lines, "", *notes]).rstrip()


def score(asked: Asked, work: Work, task: str, name: str, form: str = ".2f") -> str:
    """A model's score in a task; a dash where there is none."""
    found = work.scores(task, asked.parts).get(name)
    if found is None or found["mean"] is None:
        return "-"
    return f"{found['mean']:{form}}" + (f" ± {found['deviation']:{form}}" if found["deviation"] else "")


def line(asked: Asked, work: Work, planned: list[Cost] | None) -> str:
    """The last line: everything as one JSON object."""
    accuracy = {
        task: {name: found["mean"] for name, found in work.scores(task, asked.parts).items()}
        for task in ("gsm8k", "math")
    }
    return json.dumps({
        "parts": [part.name for part in asked.parts],
        "done": [part.name for part in asked.parts if work.is_finished(part)],
        "failed": work.failed,
        "planned_gpu_hours": None if planned is None else round(sum(cost.gpu_hours for cost in planned), 2),
        "accuracy": accuracy,
    })  # fmt: skip


if __name__ == "__main__":
    exit_codes.run(main)
