"""The commands that the README and docs/ show: those of the walk are run, and every other one is understood."""

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from sorsa_ds.cli.completion import SHELLS
from sorsa_ds.cli.sorsa import COMMANDS
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.train.options import TRAIN_OPTIONS, parse
from tests.helpers.documented import blocks, commands, section
from tests.helpers.forked import run_forked
from tests.helpers.projects import ROOT

README = ROOT / "README.md"
PAGES = [
    README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md")),
]  # fmt: skip
EVERY = [
    pytest.param(words, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    for number, words in enumerate(commands(page))
]
NOT_OURS = {
    "source",
    "printf",
    "cat",
    "cd",
    "mkdir",
    "pip",
    "vllm",
    "apt-get",
    "git",
    "pre-commit",
    "export",
    "for",
    "done",
    "docker",
    "kubectl",
}
PARTS = [field.name for field in fields(RunConfig)]
TRAINING = {"train.py", "single_gpu.sh", "multi_gpu.sh", "multi_node.sh", "train.sbatch"}
"""Scripts that take the settings of a run."""
SETTING = re.compile(r"(model|method|({}))=".format("|".join(rf"{part}\.\w+" for part in PARTS)))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder as a user has it: the repository's scripts, a configuration file and a run."""
    for name in ("launch", "ds_configs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "run.yaml").write_text("train: {steps: 3}\n")
    shutil.copytree(ROOT / "tests" / "fixtures" / "run_of_0.1.0", tmp_path / "runs" / "NAME")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@functools.cache
def help_of(script: str) -> str:
    """What a script says to `--help`."""
    if script.endswith(".py"):
        return run_forked(ROOT, [script, "--help"])[0]
    return subprocess.run(
        ["bash", ROOT / script, "--help"], cwd=ROOT, text=True, capture_output=True, check=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    ).stdout  # fmt: skip


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Split a command that starts one of our scripts into (the script, the words given to it); None for others.

    A command of `sorsa` is that of its script.
    """
    if words[0] == "sorsa" and words[1:2] and words[1] in COMMANDS.keys() - {"completion"}:
        given = words[2:]
        if words[1] == "train" and "--gpus" in given:
            del given[given.index("--gpus") : given.index("--gpus") + 2]
        return f"launch/{words[1]}.py", given
    for place, word in enumerate(words):
        if re.fullmatch(r"(\./)?(launch|benchmarks|examples|tests)/[\w/]+\.(py|sh|sbatch)", word):
            before = [one for one in words[:place] if one.startswith("--")] if words[0] == "sbatch" else []
            return word.removeprefix("./"), [one for one in words[place + 1 :] if one not in before]
    return None


def _is_our_module(words: list[str]) -> bool:
    """Whether a command starts a module of this repository with `python -m`."""
    if words[:2] != ["python", "-m"]:
        return False
    place = ROOT.joinpath(*words[2].split("."))
    return place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()


def training_words(given: list[str]) -> list[str]:
    """Keep only the settings and the options of the training command."""
    kept = [word for word in given if "=" in word and not word.startswith("--") and "$" not in word]
    for place, word in enumerate(given):
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in TRAIN_OPTIONS:
            value = value if equals else given[place + 1]
            kept.append(f"--{name}={re.sub(r'runs/[^/ ]+', 'runs/NAME', value)}")
    return kept


@pytest.mark.parametrize("words", [one for one in EVERY if one.values[0][0] != "python" or one.values[0][1] != "-c"])
def test_a_documented_command_is_understood(words, place):
    found = script_of(words)
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    elif words[:2] == ["sorsa", "completion"]:
        assert words[2] in SHELLS
    elif found is None:
        assert words[0] in NOT_OURS or _is_our_module(words), f"neither ours nor one that is known: {' '.join(words)}"
    else:
        script, given = found
        assert (ROOT / script).is_file(), f"there is no {script}"
        parse(training_words(given) if Path(script).name in TRAINING else [w for w in given if SETTING.match(w)])


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_that_a_page_shows_is_one_of_its_script(page):
    for words in commands(page):
        script, given = script_of(words) or ("", [])
        options = {word.strip("[]").partition("=")[0] for word in given if word.strip("[]").startswith("--")} - {"--"}
        if Path(script).name in TRAINING:
            options -= {f"--{name}" for name in TRAIN_OPTIONS}
        if "--" in given:  # what stands before it is sbatch's
            options -= set(given[: given.index("--")])
        unknown = {option for option in options if not re.search(rf"{option}\b", help_of(script))}
        assert not unknown, f"{page.name}: {script} has no {', '.join(sorted(unknown))}"


def test_documented_python_is_python():
    for one in EVERY:
        words = one.values[0]
        if words[0] == "python" and words[1] == "-c":
            compile(words[2], "README", "exec")


def run(script: str, folder: Path) -> str:
    """Shell code, as a user types it into an activated environment on a machine without GPUs and without network."""
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, text=True, capture_output=True, check=False,
        env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_walk_of_the_readme_ends_with_an_answer_and_two_exports(place, small_real_model):
    """Run the walk on two of the default model's layers instead of all thirty."""
    walk = "".join(blocks(section(README.read_text(encoding="utf-8"), "## Your own data")))
    shorter = walk.replace("data.path=mine.jsonl", f"data.path=mine.jsonl model='{small_real_model}'")
    assert shorter != walk and "my-model" in walk and "my-lora" in walk
    printed = run(shorter, place)
    assert (place / "my-model" / "model.safetensors").is_file()
    assert (place / "my-lora" / "adapter_config.json").is_file()
    assert printed.strip()


@pytest.mark.slow
def test_the_plan_of_the_readme_fits(place):
    plans = [block for block in blocks(README.read_text(encoding="utf-8")) if block.startswith("python launch/plan.py")]
    assert plans
    for block in plans:
        assert "fits" in run(block, place)


@pytest.mark.parametrize(
    "words",
    [
        ["make", "no-such-target"],
        ["deepspeed", "launch/train.py", "sorsa.rnk=3"],
        ["python", "launch/nothing.py"],
        ["python", "-m", "sorsa_ds.nothing"],
        ["sorsa", "trian"],
        ["sorsa", "train", "sorsa.rnk=3"],
        ["torchrun", "train.py"],
    ],
)
def test_a_wrong_command_is_found(words, place):
    with pytest.raises((AssertionError, ValueError)):
        test_a_documented_command_is_understood(words, place)
