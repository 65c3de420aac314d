"""What benchmarks/evidence.py runs in fresh processes: one run after the other, trained and measured.

It reads a run as a line of JSON, and answers with a line of JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.helpers.common import DS_CONFIGS
from benchmarks.helpers.evidence_measures import Measures, base_measures, text_measures
from benchmarks.helpers.evidence_trials import PARTS, Part, Trial
from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.data.word_problems import word_problems
from sorsa_ds.evaluate.calibrate import calibrate
from sorsa_ds.evaluate.calibrate_options import CalibrateOptions
from sorsa_ds.model.pretrained import find_model
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.study.analysis import measures
from sorsa_ds.train.options import parse
from sorsa_ds.train.setup import assemble
from sorsa_ds.train.trainer import Trainer

SAMPLES, SAMPLE_TOKENS = 64, 192
"""Of what a base model writes to find the directions that it uses least; it is kept in the cache."""
WORD_PROBLEMS, HELD_OUT_WORD_PROBLEMS = 4096, 1024
"""How many word problems are generated, and how many of them are held out; a third is short enough to be used."""


def main() -> None:
    """Answer runs until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="instructions with answers, as Alpaca has them")
    parser.add_argument("--small_model", required=True)
    parser.add_argument("--steps", type=int, help="of every run, to try it out")
    a = parser.parse_args()
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # what a run prints is no answer
    bases: dict[tuple, tuple[PreTrainedModel, Measures]] = {}
    for line in sys.stdin:
        trial = Trial(**json.loads(line))
        part = PARTS[trial.part]
        model = a.small_model if part.model == "small" else "smollm2-135m-instruct"
        with tempfile.TemporaryDirectory() as folder:
            data = data_of(trial, part, model, a.gsm8k, Path(folder))
            began = time.perf_counter()
            trainer, report = train(trial, part, model, data, a.steps, Path(folder))
        trained = time.perf_counter()
        texts = part.model, part.samples, part.questions
        if texts not in bases:
            bases[texts] = of_base(part, trainer.config.model, a.text)
        row = figures(trainer, report, part, *bases[texts])
        row["train_seconds"], row["measure_seconds"] = trained - began, time.perf_counter() - trained
        trainer.engine.destroy()
        del trainer
        print(json.dumps(row), file=answers, flush=True)


def data_of(trial: Trial, part: Part, model: str, gsm8k: Path, folder: Path) -> dict[str, Path]:
    """What stands in braces in a run's settings -> the folder or file for which it stands; what is asked for is made.

    Args:
        folder: where it is made.
    """
    asked = " ".join((*part.settings, *trial.settings()))
    data = {"gsm8k": gsm8k}
    if "{words}" in asked:
        data["words"] = write_word_problems(folder / "words")
    if "{directions}" in asked:
        data["directions"] = folder / "directions.safetensors"
        calibrate(CalibrateOptions(model, data["directions"], samples=SAMPLES, sample_tokens=SAMPLE_TOKENS))
    return data


@cache
def word_problems_as_lines() -> list[str]:
    """Generated word problems, the same in every process, as lines of JSON."""
    return [json.dumps(row) + "\n" for row in word_problems(seed=0, size=WORD_PROBLEMS)]


def write_word_problems(folder: Path) -> Path:
    """Write a folder with train.jsonl and test.jsonl of generated word problems, and return it."""
    lines = word_problems_as_lines()
    folder.mkdir()
    for name, part in (("test", lines[:HELD_OUT_WORD_PROBLEMS]), ("train", lines[HELD_OUT_WORD_PROBLEMS:])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    return folder


def train(
    trial: Trial, part: Part, model: str, data: dict[str, Path], steps: int | None, folder: Path
) -> tuple[Trainer, dict]:
    """Make a run; its folder may go afterwards.

    Args:
        data: what stands in braces in the settings -> the folder or file for which it stands.
        steps: in place of the part's own steps.
    """
    settings = [*part.settings, *trial.settings()]
    for name, path in data.items():
        settings = [text.replace(f"{{{name}}}", str(path)) for text in settings]
    if steps:
        settings = [s for s in settings if not s.startswith(("train.steps", "train.epochs"))]
        settings.append(f"train.steps={steps}")
    words = [
        f"--ds_config={DS_CONFIGS / 'stage0.json'}", f"model={model}", "train.precision=fp32", "train.eval_every=0",
        "evaluation.samples=0", f"output.folder={folder}", f"output.name={trial.name}", "output.save_every=0",
        "output.peft_adapter=false", *settings,
    ]  # fmt: skip
    if trial.variant not in ("full", "partial"):
        words.append(f"adapter.rank={part.rank}")
    trainer = assemble(parse(words))
    return trainer, trainer.train()


def of_base(part: Part, model: str, text: Path) -> tuple[PreTrainedModel, Measures]:
    """The base model of a part in memory, and what is measured of it once."""
    folder = find_model(model, LoadingConfig())
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return base, base_measures(base, folder, text, part.samples, part.questions)


def figures(trainer: Trainer, report: dict, part: Part, base: PreTrainedModel, of_base: Measures) -> dict[str, Any]:
    """Everything that a row tells of a run that is over."""
    model = trainer.engine.module.eval()
    return {
        "steps": report["steps"],
        "trainable": report["trainable_parameters"],
        "loss_last": report["loss_last"],
        "eval_loss_start": report["eval_loss_start"],
        "eval_loss": report["eval_loss_end"],
        **text_measures(model, of_base),
        **spectra(model, base, part.spectra_every),
        "l_reg": report["reg_loss_end"],
    }


@torch.no_grad()
def spectra(model: PreTrainedModel, base: PreTrainedModel, every: int) -> dict[str, float | None]:
    """Means over the linears: condition numbers, Delta-Sigma and Delta-D, and what became of U, s and V.

    A tuned linear's weight is what the layer makes of the unit vectors. Condition numbers of weights are averaged
    geometrically: in an arithmetic mean one singular value near 0 would outweigh all others.
    """
    names = [
        name for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not base.get_output_embeddings()
    ]  # fmt: skip
    found: dict[str, list[float]] = {"kappa_W": [], "delta_sigma": [], "delta_d": [], "change": []}
    of_factors: dict[str, list[float]] = {"kappa_U": [], "kappa_V": [], "orthonormality": []}
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, SorsaLinear):
            for key, X in (("kappa_U", layer.U), ("kappa_V", layer.V)):
                of_factors[key].append(measures.condition(torch.linalg.svdvals(X.double())))
                of_factors["orthonormality"].append(measures.orthonormality(X.double()))
    for name in names[::every]:
        start = base.get_submodule(name).weight.double()
        now = _weight(model.get_submodule(name), start.shape[1])
        before, after = measures.Spectrum.of(start), measures.Spectrum.of(now)
        found["kappa_W"].append(measures.condition(after.s))
        found["delta_sigma"].append(measures.delta_sigma(after, before))
        found["delta_d"].append(measures.turn(after, before, rank=1).literal)  # a figure that no rank changes
        found["change"].append(((now - start).norm() / start.norm()).item())
    means = {key: _mean(values) for key, values in (found | of_factors).items()}
    return means | {"kappa_W": geometric_mean(found["kappa_W"])}


def _weight(layer: torch.nn.Module, inputs: int) -> torch.Tensor:
    """The matrix (out, in) that a linear layer is, whatever it is made of, in fp64."""
    unit = torch.eye(inputs)
    bias = layer(torch.zeros(1, inputs))
    return (layer(unit) - bias).t().double()


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


if __name__ == "__main__":
    main()
