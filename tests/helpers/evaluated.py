"""A tiny model that has learned to answer, and questions for it, in fp32."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sorsa_ds.data.batches import collate
from sorsa_ds.data.formats import Rendered, prompt_for
from sorsa_ds.data.tokenize import encode
from sorsa_ds.evaluate.command import evaluate
from sorsa_ds.evaluate.options import Options
from sorsa_ds.evaluate.prompts import STEP_BY_STEP
from sorsa_ds.evaluate.records import read_samples
from sorsa_ds.train.loss import summed_loss
from tests.helpers import projects

QUESTIONS = [f"What is {number} plus {number}" + " and nothing" * (number % 4) + "?" for number in range(1, 12)]


def make(folder: Path) -> Path:
    """A project whose model was trained, in plain torch, on answers of unequal lengths in the papers' layout."""
    projects.make(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    examples = []
    for number, question in enumerate(QUESTIONS, start=1):
        prompt = prompt_for(question)
        text = f"{prompt}{STEP_BY_STEP}{' Well.' * (number % 3)}\n#### {2 * number}"
        examples.append(encode(Rendered(text, ((len(prompt), len(text)),), closed=True), tokenizer, 256))
    batch = collate(examples, 0)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(150):
        loss = summed_loss(model, batch) / (batch["labels"] != -100).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    rows = [{"question": q, "answer": f"So.\n#### {2 * n}"} for n, q in enumerate(QUESTIONS, start=1)]
    (folder / "questions").mkdir()
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "questions" / f"{split}.jsonl").write_text(lines)
    return folder


def asked(project: Path, name: str, **changes) -> Options:
    """The options of an evaluation on its questions."""
    options = dict(
        model=str(project / "model"), task="gsm8k", data=str(project / "questions"), output=project / name,
        dtype="fp32", max_new_tokens=24, batch_size=4,
    )  # fmt: skip
    return Options(**{**options, **changes})


def run(options: Options) -> tuple[dict, list[dict]]:
    """Evaluate; (results, samples)."""
    results = evaluate(options)
    return results, read_samples(options.output)
