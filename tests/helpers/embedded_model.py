"""The embedded model, converted once for all tests, and its first layers as a model of its own."""

import json
import os
import time
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from sorsa_ds.model.embedded import ensure_embedded_model
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.cache import cache_folder
from tests.helpers.worlds import run_ranks


def convert_once(cache: Path) -> list[list[str]]:
    """Convert it into `cache`, whichever of pytest's processes comes first; what was told to each of two ranks.

    The two ranks ask for it together, the second one a moment earlier.
    """
    told = cache.with_suffix(".json")
    with FileLock(cache.with_suffix(".lock")):
        if not told.exists():
            told.write_text(json.dumps(run_ranks(2, _ask, str(cache))))
    return json.loads(told.read_text())


def _ask(cache: str) -> list[str]:
    os.environ["SORSA_CACHE"] = cache
    messages: list[str] = []
    while collectives.rank() == 0 and not any(cache_folder().glob("*.lock")):
        time.sleep(0.05)
    ensure_embedded_model(messages.append)
    return messages


def first_layers(whole: Path, folder: Path, layers: int = 2) -> Path:
    """A model in fp32 of the embedded model's first layers, with its tokenizer: real weights, and soon computed."""
    config = AutoConfig.from_pretrained(whole)
    config.num_hidden_layers, config.dtype = layers, torch.float32
    config.save_pretrained(folder)
    with safe_open(whole / "model.safetensors", "pt") as file:
        kept = [n for n in file.keys() if not n.startswith("model.layers.") or int(n.split(".")[2]) < layers]  # noqa: SIM118
        save_file(
            {name: file.get_tensor(name).float() for name in kept}, folder / "model.safetensors", {"format": "pt"}
        )
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    return folder
