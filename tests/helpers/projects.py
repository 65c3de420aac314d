"""A small real project on disk, a model with a tokenizer and data, and the command that trains on it."""

import json
import os
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedConfig

from sorsa_ds.runtime.ports import free_port
from tests.helpers.architectures import CONFIGS
from tests.helpers.chat_tokenizer import chat_tokenizer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


def make(folder: Path, like: PreTrainedConfig = CONFIGS["llama"]) -> Path:
    """Write a tiny model with a tokenizer, and data of unequal lengths.

    Args:
        like: the model's configuration, but for its vocabulary and length.
    """
    tokenizer = chat_tokenizer()
    config = deepcopy(like)  # other tests use it too
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 256
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"query": f"What is {i} plus {i}?", "response": f"It is {2 * i}." + " Really." * (i % 5)} for i in range(40)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "long.jsonl").write_text((json.dumps({"query": "Why?", "response": "Because. " * 200}) + "\n") * 12)
    return folder


def settings(project: Path, name: str) -> list[str]:
    """The settings of a short run in fp32, whose adapter is not written for PEFT too, which takes seconds."""
    return [
        f"model={project / 'model'}", f"data.path={project / 'data.jsonl'}", "data.eval_size=7",
        f"train.steps={STEPS}", "adapter.rank=4", "train.global_batch_size=8", "train.precision=fp32",
        "train.learning_rate=1e-3", "evaluation.sample_tokens=4",
        f"output.folder={project}", f"output.name={name}", "output.peft_adapter=false",
    ]  # fmt: skip


def words_of(project: Path, name: str, *arguments: str, ds="zero3", job=settings) -> list[str]:
    """The training command from the script's name on. job: the settings of a project's run."""
    given = str(ds if isinstance(ds, Path) else f"ds_configs/{ds}.json")
    return ["launch/train.py", "--ds_config", given, *job(project, name), *arguments]


def environment_of(project: Path, **more: str) -> dict[str, str]:
    """The environment of a command on CPUs, with the project's own cache."""
    return {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1", "SORSA_CACHE": str(project / "cache"), **more,
    }  # fmt: skip


def start(project: Path, name: str, *arguments: str, ranks=2, **options) -> subprocess.Popen:
    """Start launch/train.py through `deepspeed`. options: `ds` and `job` as in `words_of`, or environment variables."""
    asked = {key: options.pop(key) for key in ("ds", "job") if key in options}
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return subprocess.Popen(
        [sys.executable, launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()),
         *words_of(project, name, *arguments, **asked)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment_of(project, **options),
    )  # fmt: skip


def launch(project, name, *arguments, code=0, **options):
    """Run it to its end; returns (everything printed, run folder, seconds)."""
    began = time.monotonic()
    process = start(project, name, *arguments, **options)
    printed, _ = process.communicate(timeout=300)
    assert (process.returncode == 0) == (code == 0), printed[-4000:]
    return printed, project / name, time.monotonic() - began


def metrics(folder, key):
    """One column of metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]
