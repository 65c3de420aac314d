"""Evaluate: `deepspeed launch/evaluate.py --model runs/NAME --task gsm8k`; torchrun or python alone start it too."""

import argparse
from pathlib import Path

from sorsa_ds import failure


def main() -> None:
    """Parse, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="run, adapter (SORSA's or PEFT's), folder of a model, or hub name")
    add("--task", required=True, choices=("gsm8k", "math", "humaneval", "mmlu", "loss"), help="what to measure")
    add("--data", help="folder, file or hub name (default: the task's own on the hub; loss: a run's held-out data)")
    add("--base", help="an adapter's base model, where it has moved")
    add("--limit", type=int, help="so many samples, the first ones")
    add("--num_few_shot", type=int, help="examples before the question (default: mmlu 5, else 0)")
    add("--batch_size", type=int, default=16, help="samples at once on each rank (default: 16)")
    add("--max_new_tokens", type=int, help="the most of an answer (default: gsm8k 1024, math and humaneval 2048)")
    add(
        "--prompt", choices=("papers", "chat", "plain"), default="papers",
        help="papers: the layout of training; chat: the tokenizer's chat template; plain: for a base model",
    )  # fmt: skip
    add("--window", type=int, help="loss: tokens seen at once (default: 1024, or what the model takes)")
    add("--stride", type=int, help="loss: tokens from window to window (default: half; window - 1: chunks)")
    add("--output", type=Path, help="folder of the results (default: RUN/evaluation/TASK or evaluations/MODEL-TASK)")
    add("--backend", choices=("transformers", "vllm"), default="transformers", help="what generates")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the hardware is fast at it")
    add("--allow_code_execution", action="store_true", help="humaneval: run what the model wrote, walled in")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add("--local_rank", type=int, default=0, help="added by DeepSpeed's launcher; ignored")
    given = vars(parser.parse_args())
    del given["local_rank"]

    from sorsa_ds.evaluate.options import Options

    options = Options(**given)
    from sorsa_ds.evaluate.command import evaluate

    evaluate(options)


if __name__ == "__main__":
    failure.run(main)
