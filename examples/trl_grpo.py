"""SORSA in TRL's GRPOTrainer: reinforcement learning from a reward that a program gives.

    python examples/trl_grpo.py --tiny                           the embedded model, a minute on a CPU, no network
    python examples/trl_grpo.py --model Qwen/Qwen3-0.6B --data my.jsonl --output grpo

Each line of the data is {"prompt": "...", "answer": "..."}. A completion is rewarded if the last number in it is the
answer, and a little for every digit, so that a small model learns something. What is SORSA's here are two lines:
`peft_config=SorsaConfig(...)` and `callbacks=[SorsaCallback()]`. The last line of the output is one JSON object.
"""

import argparse
import json
import re

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from sorsa_ds.data.word_problems import word_problems
from sorsa_ds.model.embedded import ensure_embedded_model
from sorsa_ds.peft import SorsaCallback, SorsaConfig


def rows(options: argparse.Namespace) -> Dataset:
    """The user's data, or a few generated word problems."""
    if not options.tiny:
        return load_dataset("json", data_files=options.data, split="train")
    return Dataset.from_list([{"prompt": f"{row['question']}\n", "answer": row["gold"]} for row in word_problems(0, 8)])


def reward(completions: list[str], answer: list[str], **_) -> list[float]:
    """1 for each completion whose last number is the answer, and the share of digits among its characters."""
    numbers = [re.findall(r"-?\d+(?:\.\d+)?", text) for text in completions]
    digits = [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]
    return [float(found[-1:] == [gold]) + few for found, gold, few in zip(numbers, answer, digits, strict=True)]


def main() -> None:
    """Train, save the adapter, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the embedded model and generated data, three steps")
    parser.add_argument("--model", help="folder or hub name")
    parser.add_argument("--data", help="a file of JSON lines")
    parser.add_argument("--output", default="trl_grpo", help="folder of the adapter (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1, help="times that the data are seen (default: %(default)s)")
    options = parser.parse_args()
    if not options.tiny and not (options.model and options.data):
        parser.error("give --model and --data, or --tiny")

    gpu = torch.cuda.is_available()
    base = str(ensure_embedded_model()) if options.tiny else options.model
    arguments = GRPOConfig(
        output_dir=options.output, learning_rate=5e-5, warmup_steps=0.03, lr_scheduler_type="cosine", max_grad_norm=1.0,
        num_train_epochs=options.epochs, max_steps=3 if options.tiny else -1, num_generations=4 if options.tiny else 8,
        per_device_train_batch_size=4 if options.tiny else 8, max_completion_length=8 if options.tiny else 512,
        bf16=gpu, use_cpu=not gpu, activation_checkpointing=gpu,
        logging_steps=1 if options.tiny else 10, save_strategy="no", report_to="none", disable_tqdm=options.tiny,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if gpu else torch.float32),
        args=arguments,
        reward_funcs=reward,
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=rows(options),
        peft_config=SorsaConfig(
            r=16, target_modules=["q_proj", "v_proj"] if options.tiny else "all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[SorsaCallback()],
    )
    SorsaCallback.log_to_trackers(trainer)  # where report_to names some, they see L_reg too
    trainer.train()
    trainer.save_model(options.output)  # the adapter alone

    log = [line for line in trainer.state.log_history if "loss" in line]
    done = {
        "example": "trl_grpo", "steps": trainer.state.global_step, "loss_first": log[0]["loss"],
        "loss_last": log[-1]["loss"], "reward_first": log[0]["reward"], "reward_last": log[-1]["reward"],
        "l_reg": log[-1]["l_reg"],
        "trained_parameters": trainer.model.get_nb_trainable_parameters()[0], "adapter": options.output,
    }  # fmt: skip
    print(json.dumps(done))


if __name__ == "__main__":
    main()
