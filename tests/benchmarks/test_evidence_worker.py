"""What a run of the study measures, against plain torch: a short run on a tiny model, in a rank of its own."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.helpers.evidence_trials import PARTS, Trial
from benchmarks.workers import evidence
from sorsa_ds.data.tokenize import IGNORED
from tests.helpers.small_data import gsm8k
from tests.helpers.worlds import run_ranks

PART = PARTS["small-rank4"]


def measured(project: Path, variant: str) -> tuple[dict, dict]:
    """The figures of a run of six steps, and the same computed here from its weights."""
    rows = [{"instruction": f"Count to {n}.", "input": "", "output": f"One, two, {n}. " * 40} for n in range(64)]
    (project / "text.json").write_text(json.dumps(rows))
    data = {"gsm8k": gsm8k(project / "gsm8k")}
    trial = Trial(PART.name, variant, 0.1, 0)
    trainer, report = evidence.train(trial, PART, str(project / "model"), data, 6, project / "runs")
    base, of_base = evidence.of_base(PART, trainer.config.model, project / "text.json")
    found = evidence.figures(trainer, report, PART, base, of_base)
    model = trainer.engine.module
    linears = [name for name, one in base.named_modules() if isinstance(one, torch.nn.Linear) and name != "lm_head"]
    wanted: dict = {"change": [], "log_kappa": [], "delta_sigma": []}
    for name in linears:
        layer, before = model.get_submodule(name), base.get_submodule(name).weight.double()
        if variant == "lora":
            added = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
            now = layer.base_layer.weight.double() + added.double()
        else:
            now = layer.storage.dense([layer.residual], before.shape, torch.float32).double()
            now = now + (layer.U.double() * layer.s.double()) @ layer.V.double().t()
        s, s_before = (torch.linalg.svdvals(W) for W in (now, before))
        wanted["change"].append(((now - before).norm() / before.norm()).item())
        wanted["log_kappa"].append(math.log(s[0] / s[-1]))
        wanted["delta_sigma"].append((s - s_before).abs().mean().item())
    means = {key: sum(values) / len(values) for key, values in wanted.items()}
    return found, means | {"kappa_W": math.exp(means["log_kappa"]), **plain_texts(model, base, of_base)}


@torch.no_grad()
def plain_texts(model, base, of_base) -> dict:
    """Drift on the base model's samples and the loss on the English windows, text by text."""
    sums, counts = {"drift": 0.0, "english": 0.0}, {"drift": 0, "english": 0}
    for key, texts in (("drift", of_base.samples), ("english", of_base.english)):
        for text in texts:
            ids = torch.tensor(text["input_ids"][None], dtype=torch.long)
            ours, theirs = (one(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for one in (model, base))
            scored = torch.tensor(text["labels"][1:] != IGNORED)
            each = (
                (theirs.exp() * (theirs - ours)).sum(-1) if key == "drift" else -ours.gather(-1, ids[0, 1:, None])[:, 0]
            )
            sums[key] += each[scored].sum().item()
            counts[key] += int(scored.sum())
    return {key: sums[key] / counts[key] for key in sums}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "trailing"])
def test_figures_of_a_run_are_those_of_its_weights(project, variant):
    found, wanted = run_ranks(1, measured, project, variant)[0]
    assert found["steps"] == 6 and 0 <= found["choices"] <= 1
    for key in ("change", "kappa_W", "delta_sigma", "drift", "english"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-3), key
    assert wanted["change"] > 0.1 and wanted["drift"] > 0.1, "so little cannot tell one definition from another"


def learned_word_problems(project: Path) -> tuple[int, list[list[str]]]:
    """The steps of a short run of the part with word problems, and the lines of the two files that it was given."""
    folder = evidence.write_word_problems(project / "words")
    part = PARTS["small-words"]
    trial = Trial(part.name, "lora", 0.01, 0)
    _, report = evidence.train(trial, part, str(project / "model"), {"words": folder}, 2, project / "runs")
    return report["steps"], [(folder / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test")]


@pytest.mark.slow
def test_the_word_problems_that_are_held_out_are_not_learned(project):
    steps, (train, test) = run_ranks(1, learned_word_problems, project)[0]
    assert steps == 2 and (len(train), len(test)) == (3072, 1024)
    questions = [{json.loads(line)["question"] for line in lines} for lines in (train, test)]
    assert len(questions[0]) == 3072 and not questions[0] & questions[1]
