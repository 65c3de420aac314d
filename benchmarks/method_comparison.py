"""SORSA as an entry of PEFT's method comparison: one experiment for each method, and results in PEFT's form.

    python benchmarks/method_comparison.py --output results      the default model on generated word problems
    python benchmarks/method_comparison.py --model meta-llama/Llama-3.2-3B --data metamath.jsonl --steps 5000 \
        --batch 4 --rank 32 --limit 768 --output results         nearer to PEFT's own sizes, on one GPU

The rows of --data have `question` and `answer`. Every method is trained by TRL's trainer on the same rows in the same
order, with its own learning rate, and measured on rows that are held out. Each writes OUTPUT/METHOD.json with the
sections of the files in PEFT's method_comparison/MetaMathQA/results. The last line is one JSON object.
"""

import argparse
import json
import platform
import re
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from benchmarks.helpers.common import say
from sorsa_ds.data.word_problems import word_problems
from sorsa_ds.model.embedded import ensure_embedded_model
from sorsa_ds.peft import SorsaCallback, SorsaConfig

TEMPLATE = "Question: {} Think step by step.\nAnswer:"
"""How PEFT's comparison puts a question."""

RATES = {"lora": 3.6e-3, "pissa": 4e-4, "sorsa": 1.3e-4}
"""The best of the learning rates that were tried on the default model (docs/results/comparison.md)."""


def config_of(method: str, rank: int) -> PeftConfig:
    """The adapter of a method on all linears but the output head."""
    shared = {"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method == "sorsa":
        return SorsaConfig(**shared)
    return LoraConfig(lora_alpha=rank, init_lora_weights="pissa" if method == "pissa" else True, **shared)


def rows_of(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The rows to learn from, as prompts and completions, and those that are held out."""
    if options.data is None:
        rows = word_problems(options.seed, options.steps * options.batch + options.held_out)
    else:
        rows = load_dataset("json", data_files=options.data, split="train")
    rows = rows.map(
        lambda row: {"prompt": TEMPLATE.format(row["question"]), "completion": f" {row['answer']}"},
        remove_columns=rows.column_names,
    )
    return rows.select(range(options.held_out, len(rows))), rows.select(range(options.held_out))


def accuracy(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Dataset, tokens: int) -> float:
    """The share of rows whose greedy answer ends with the same number as theirs."""
    right = 0
    for row in rows:
        asked = tokenizer(row["prompt"], return_tensors="pt").to(model.device)
        with torch.no_grad():
            out = model.generate(**asked, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answer = tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        found, wanted = (re.findall(r"-?\d[\d,]*\.?\d*", text) for text in (answer, row["completion"]))
        right += bool(found) and found[-1].rstrip(".") == wanted[-1].rstrip(".")
    return right / len(rows)


def experiment(method: str, options: argparse.Namespace, base: str) -> dict:
    """Train and measure one method; returns the result in PEFT's form."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    train, held_out = rows_of(options)
    tokenizer, config = AutoTokenizer.from_pretrained(base), config_of(method, options.rank)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if gpu else torch.float32),
            args=SFTConfig(
                output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.batch,
                per_device_eval_batch_size=options.batch, learning_rate=RATES[method] * options.rate_factor,
                lr_scheduler_type="cosine", warmup_steps=0.03, max_grad_norm=1.0, max_length=options.limit,
                seed=options.seed, bf16=gpu, use_cpu=not gpu, logging_steps=max(1, options.steps // 8),
                save_strategy="no", report_to="none", disable_tqdm=True,
            ),
            processing_class=tokenizer,
            train_dataset=train,
            eval_dataset=held_out,
            peft_config=config,
            callbacks=[SorsaCallback()] if method == "sorsa" else [],
        )  # fmt: skip
        before = trainer.evaluate()["eval_loss"]
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        after = trainer.evaluate()["eval_loss"]
        trainer.save_model(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("adapter_model*"))
        right = accuracy(trainer.model.eval(), tokenizer, held_out, options.answer)
    trained, total = trainer.model.get_nb_trainable_parameters()
    log = [line for line in trainer.state.log_history if "loss" in line]
    metrics = [
        {"step": line["step"], "train loss": line["loss"], "train samples": line["step"] * options.batch}
        for line in log
    ]  # fmt: skip
    metrics += [{"step": options.steps, "valid loss": after, "valid loss before": before, "test accuracy": right}]
    return {
        "run_info": {
            "experiment_name": f"{method}/{Path(base).name}-rank{options.rank}",
            "train_config": {
                "model_id": Path(base).name, "max_seq_length": options.limit, "batch_size": options.batch,
                "max_steps": options.steps, "seed": options.seed, "grad_norm_clip": 1.0, "lr_scheduler": "cosine",
                "query_template": TEMPLATE, "optimizer_kwargs": {"lr": RATES[method] * options.rate_factor},
            },
            "peft_config": {"peft_type": config.peft_type.value, "r": options.rank, "target_modules": "all-linear"},
        },
        "train_info": {
            "train_time": seconds, "accelerator_memory_max": torch.cuda.max_memory_allocated() if gpu else None,
            "file_size": size, "num_trainable_params": trained,
            "num_total_params": total, "status": "success", "metrics": metrics,
        },
        "meta_info": {
            "package_info": {name: version(name) for name in ("torch", "transformers", "peft", "trl")},
            "system_info": {"machine": platform.machine(), "gpu": torch.cuda.get_device_name() if gpu else None},
        },
    }  # fmt: skip


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", default="lora,pissa,sorsa", help=f"of {', '.join(RATES)} (default: %(default)s)")
    add("--model", help="folder or hub name (default: the embedded model)")
    add("--data", help="a file of JSON lines with question and answer (default: generated word problems)")
    add("--steps", type=int, default=64)
    add("--batch", type=int, default=4)
    add("--rank", type=int, default=16)
    add("--limit", type=int, default=256, help="tokens of an example (default: %(default)s)")
    add("--held_out", type=int, default=16, help="the first rows, on which is measured (default: %(default)s)")
    add("--answer", type=int, default=128, help="most tokens of an answer (default: %(default)s)")
    add("--rate_factor", type=float, default=1.0, help="on the learning rates, which fit the embedded model")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("method_comparison"), help="folder of the results (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Make the experiments, and print what came out."""
    options = parse()
    base = options.model or str(ensure_embedded_model())
    options.output.mkdir(parents=True, exist_ok=True)
    done = {}
    say("| method | test accuracy | held-out loss | trained numbers | file | seconds |\n|---|---|---|---|---|---|")
    for method in options.methods.split(","):
        result = experiment(method, options, base)
        (options.output / f"{method}.json").write_text(json.dumps(result, indent=2) + "\n")
        info, end = result["train_info"], result["train_info"]["metrics"][-1]
        say(
            f"| {method} | {end['test accuracy']:.3f} | {end['valid loss before']:.4f} -> {end['valid loss']:.4f} | "
            f"{info['num_trainable_params']:,} | {info['file_size'] / 2**20:.1f} MiB | {info['train_time']:.0f} |"
        )
        done[method] = {"test_accuracy": end["test accuracy"], "valid_loss": round(end["valid loss"], 4)}
    say(json.dumps({"steps": options.steps, "methods": done}))


if __name__ == "__main__":
    main()
