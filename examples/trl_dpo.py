"""SORSA in TRL's DPOTrainer: learning which of two answers people prefer.

    python examples/trl_dpo.py --tiny                                  the embedded model, a minute on a CPU, no network
    python examples/trl_dpo.py --model Qwen/Qwen3-0.6B --data my.jsonl --output dpo

Each line of the data is {"prompt": "...", "chosen": "...", "rejected": "..."}. The reference model is the model itself
with its adapter disabled, which is the base model bit for bit; nothing else is loaded. What is SORSA's here are two
lines: `peft_config=SorsaConfig(...)` and `callbacks=[SorsaCallback()]`. The last line of the output is one JSON object.
"""

import argparse
import json

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from sorsa_ds.data.word_problems import word_problems
from sorsa_ds.model.embedded import ensure_embedded_model
from sorsa_ds.peft import SorsaCallback, SorsaConfig


def rows(options: argparse.Namespace) -> Dataset:
    """The user's data, or a few generated word problems with the answer to another one as the rejected one."""
    if not options.tiny:
        return load_dataset("json", data_files=options.data, split="train")
    made = list(word_problems(0, 8))
    return Dataset.from_list(
        [
            {"prompt": f"{row['question']}\n", "chosen": row["answer"], "rejected": other["answer"]}
            for row, other in zip(made, made[1:] + made[:1], strict=True)
        ]
    )


def main() -> None:
    """Train, save the adapter, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the embedded model and generated data, four steps")
    parser.add_argument("--model", help="folder or hub name")
    parser.add_argument("--data", help="a file of JSON lines")
    parser.add_argument("--output", default="trl_dpo", help="folder of the adapter (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1, help="times that the data are seen (default: %(default)s)")
    options = parser.parse_args()
    if not options.tiny and not (options.model and options.data):
        parser.error("give --model and --data, or --tiny")

    gpu = torch.cuda.is_available()
    base = str(ensure_embedded_model()) if options.tiny else options.model
    arguments = DPOConfig(
        output_dir=options.output, beta=0.1,
        learning_rate=5e-5, warmup_steps=0.03, lr_scheduler_type="cosine", max_grad_norm=1.0,
        num_train_epochs=options.epochs, max_steps=4 if options.tiny else -1, max_length=96 if options.tiny else 2048,
        per_device_train_batch_size=1 if options.tiny else 4, bf16=gpu, use_cpu=not gpu, activation_checkpointing=gpu,
        logging_steps=1 if options.tiny else 10, save_strategy="no", report_to="none", disable_tqdm=options.tiny,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if gpu else torch.float32),
        args=arguments,
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
        "example": "trl_dpo", "steps": trainer.state.global_step, "loss_first": log[0]["loss"],
        "loss_last": log[-1]["loss"], "margin_first": log[0]["rewards/margins"],
        "margin_last": log[-1]["rewards/margins"], "l_reg": log[-1]["l_reg"],
        "trained_parameters": trainer.model.get_nb_trainable_parameters()[0], "adapter": options.output,
    }  # fmt: skip
    print(json.dumps(done))


if __name__ == "__main__":
    main()
