"""What several benchmarks need: paths, small and large models on disk, fresh processes, the peak of their memory."""

import argparse
import contextlib
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

from sorsa_ds.model.embedded import ensure_embedded_model
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.process import init_distributed

ROOT = Path(__file__).resolve().parents[2]
DS_CONFIGS = ROOT / "ds_configs"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128,
}  # fmt: skip
"""The config.json of a model that every benchmark gets through in a moment."""


def say(text: str) -> None:
    """Print a line without waiting for the buffer to fill."""
    print(text, flush=True)


def write_llama(folder: Path, gib: float, flat: bool) -> int:
    """Write a Llama of about the wanted size in bf16, in shards of 500 MB; returns its number of layers.

    Its linears have singular values that fall like a language model's, so that a decomposition takes as long as on one.
    flat: plain random numbers instead, which take less time to write.
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
        linear.weight.data = heavy_tailed(*linear.weight.shape)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="500MB")
    return layers


def write_small_llama(folder: Path) -> None:
    """Write a small random Llama with the embedded model's tokenizer, for runs that last seconds."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ensure_embedded_model(lambda text: None))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def heavy_tailed(
    m: int, n: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> torch.Tensor:
    """A random bf16 matrix (m, n) whose singular values fall about as i^-0.3, as a language model's do."""
    k = min(m, n)
    fall = torch.arange(1, k + 1, dtype=torch.float32, device=device).pow(-0.3)
    left, right = (torch.randn(size, k, dtype=torch.float32, device=device, generator=generator) for size in (m, n))
    return ((left * fall) @ right.t() * (0.02 / k**0.5)).bfloat16()


def launch_environment() -> dict[str, str]:
    """The environment of a launcher: this Python's commands, by default one thread per rank, and CPUs without a GPU."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": path}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def train_command(ranks: int, ds_config: str | Path, *words: str, port: int | None = None) -> list[str]:
    """The command that trains with DeepSpeed's launcher.

    words: further options and settings of the training command, as `train.steps=1`. port: the master's.
    """
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    launcher += [] if port is None else ["--master_port", str(port)]
    return [*launcher, str(ROOT / "launch" / "train.py"), "--ds_config", str(ds_config), *words]


def in_ranks(worker: str, world: int, what: str, *arguments: str) -> dict:
    """Run one side of a comparison in fresh processes, on CPUs where there is no GPU; returns the JSON of rank 0.

    worker: a module, like `benchmarks.workers.steps`.
    what: the name of one of the module's sides.

    Raises:
        RuntimeError: the processes failed, or their last line is no JSON.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), "-m"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = launch_environment() | {"PYTHONPATH": path}
    if torch.cuda.is_available():  # as many as there are ranks: some peers use every GPU that they see
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(seen.split(",")[:world])
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
    """Run a side in a process of `in_ranks`: start the process group, print the side's JSON on rank 0, and exit."""
    init_distributed()
    result = side(arguments)
    if collectives.rank() == 0:
        print(json.dumps(result), flush=True)
    torch.distributed.barrier()
    os._exit(0)


def autocast_to(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast to a dtype; nothing for float32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


class Peak:
    """Context that measures `gib`, the largest resident memory above that at its start, mapped files included.

    It is sampled every few milliseconds.
    """

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
