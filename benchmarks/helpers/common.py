"""What several benchmarks need: a large model on disk, ranks, the peak of this process's memory, lines at once."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.process import init_distributed


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def write_llama(folder: Path, gib: float, flat: bool) -> int:
    """Write a Llama of about the wanted size in bf16, in shards of 500 MB; returns its number of layers.

    Its linears have singular values that fall like a language model's, so that a decomposition takes as long as there;
    with `flat` they are plain random numbers, which is sooner written.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, vocabulary = 2048, 5632, 4096
    layer = 4 * hidden * hidden + 3 * hidden * inner
    layers = max(1, math.ceil((gib * 2**30 / 2 - 2 * vocabulary * hidden) / layer))
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=vocabulary,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    for linear in (m for m in model.model.modules() if isinstance(m, torch.nn.Linear) and not flat):
        m, n = linear.weight.shape
        fall = torch.arange(1, min(m, n) + 1, dtype=torch.float32).pow(-0.3)
        left, right = (torch.randn(size, min(m, n), dtype=torch.float32) for size in (m, n))
        linear.weight.data = ((left * fall) @ right.t() * 0.02 / hidden**0.5).bfloat16()
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="500MB")
    return layers


def in_ranks(worker: str, world: int, what: str, *arguments: str) -> dict:
    """Run one side of a comparison in fresh processes, on CPUs where there is no GPU; returns the JSON of rank 0.

    worker: a module, like `benchmarks.workers.steps`. what: which of its sides.

    Raises:
        RuntimeError: the processes failed, or their last line is no JSON.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), "-m"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    if torch.cuda.is_available():  # as many as there are ranks: some peers use every GPU that they see
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(seen.split(",")[:world])
    else:
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        [*launcher, worker, what, *arguments], env=environment, text=True, capture_output=True, check=False
    )
    if done.returncode:
        errors = re.findall(r"^(?:\[rank\d+\]: )?(\w*(?:Error|Exception)\b: .*)$", done.stderr, re.MULTILINE)
        raise RuntimeError(f"{what} failed: {errors[0] if errors else ''}\n{done.stderr[-3000:]}")
    try:
        return json.loads(done.stdout.strip().rpartition("\n")[2])
    except json.JSONDecodeError as error:
        raise RuntimeError(f"{what} printed no JSON last: {done.stdout[-300:]!r}") from error


def run_side(side: Callable[[argparse.Namespace], dict], arguments: argparse.Namespace) -> None:
    """What a process of `in_ranks` does: start the process group, run the side, print its JSON on rank 0, and leave."""
    init_distributed()
    result = side(arguments)
    if collectives.rank() == 0:
        print(json.dumps(result), flush=True)
    torch.distributed.barrier()
    os._exit(0)


class Peak:
    """Largest resident memory above the start, in GiB, sampled every few milliseconds; mapped files count."""

    gib = 0.0

    def __enter__(self) -> "Peak":
        self._process = psutil.Process()
        self._start = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.003):
            self.gib = max(self.gib, (self._process.memory_info().rss - self._start) / 2**30)

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
