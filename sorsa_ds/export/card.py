"""The model card: where an export comes from, what the run measured, how it is loaded."""

from pathlib import Path

import yaml
from huggingface_hub import HfApi

from sorsa_ds.config.schema import EMBEDDED_DATA, DataConfig
from sorsa_ds.methods import METHODS
from sorsa_ds.run.source import Source
from sorsa_ds.sorsa import regularizer
from sorsa_ds.sorsa.residual_storage import describe_storage

CARD = "README.md"
_KINDS = {
    "merged": ("a plain model with the trained change merged into its weights", "transformers", "finetune"),
    "lora": ("a LoRA for the untouched base model, in PEFT's format", "peft", "adapter"),
    "base": ("the model from which its training began, over a quantised residual", "transformers", "finetune"),
    "adapter": ("U, s and V of every adapted linear, as trained and as they began", "sorsa_ds", "adapter"),
}


_SORSA = (
    " [SORSA](https://arxiv.org/abs/2409.00055) trains the leading singular triplets of each weight, "
    "`W = W_r + U diag(s) Vᵀ`, over a frozen residual `W_r`, and keeps `U` and `V` near-orthonormal."
)


def card(source: Source, form: str, notes: list[str]) -> str:
    """README.md of an export. Local folders are named without their paths: it may be published."""
    what, library, relation = _KINDS[form]
    base = source.described.base_model if source.from_hub else Path(source.described.base_model).name
    method = source.described.method
    if form == "adapter" and method != "sorsa":
        what, library = "an adapter for the untouched base model, in PEFT's format", "peft"
    head: dict = {"library_name": library, "pipeline_tag": "text-generation", "tags": [method]}
    if source.from_hub:
        head |= {"base_model": base, "base_model_relation": relation}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {base}, {'before its fine-tuning' if form == 'base' else 'fine-tuned'} with {METHODS[method]}",
        f"This is {what}.{_SORSA if method == 'sorsa' else ''}",
        "## Load it\n\n```python\n" + _loading(source, form, base) + "\n```",
        *notes,
        "## Training\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in _rows(source, base)),
        "## Licence\n\nThat of the base model.",
    ]
    return "\n\n".join(parts) + "\n"


def _loading(source: Source, form: str, base: str) -> str:
    if form == "adapter" and source.described.method == "sorsa":
        return (
            'from sorsa_ds import load_adapter\n\nmodel = load_adapter("PATH_OF_THIS_FOLDER")  # base="FOLDER": a copy'
        )
    trusted = ", trust_remote_code=True" if source.described.loading.trust_remote_code else ""
    name = "PATH_OF_THIS_FOLDER" if form in ("merged", "base") else base
    lines = [f'model = AutoModelForCausalLM.from_pretrained("{name}"{trusted})']
    imports = ["from transformers import AutoModelForCausalLM"]
    if form in ("lora", "adapter"):
        imports.insert(0, "from peft import PeftModel")
        lines.append('model = PeftModel.from_pretrained(model, "PATH_OF_THIS_FOLDER")')
    return "\n".join([*imports, "", *lines])


def _rows(source: Source, base: str) -> list[tuple[str, str]]:
    """The table: settings of the run, then what it reported."""
    config, sorsa, report = source.config, source.described.sorsa, source.report
    method, rows = source.described.method, [("base model", base), ("method", METHODS[source.described.method])]
    if source.targets:
        targets = sorsa.targets if isinstance(sorsa.targets, str) else ", ".join(sorsa.targets)
        rows.append(("linears", f"{len(source.targets)} ({targets})"))
    if method not in ("full", "partial"):
        ranks = sorted({source.peft.rank(target) for target in source.targets})
        rows.append(("rank", " to ".join(map(str, ranks[:1] + ranks[1:][-1:]))))
        rows.append(("scale", "1" if sorsa.alpha is None else f"{sorsa.alpha:g} / rank"))
    if method == "sorsa":
        reg = regularizer.resolve_regularizer(
            config.regularizer,
            learning_rate=config.train.learning_rate,
            accumulation_steps=config.train.gradient_accumulation_steps or 1,
        )
        gamma = reg.coefficient * config.train.learning_rate
        strength = f"gamma = {gamma:.3g}, gamma / eta_d = {reg.coefficient:.4g}"
        rows.append(("regulariser", f"{reg.form}, {reg.reduction}, {strength}{reg.rhythm()}"))
        rows.append(("residual", describe_storage(source.described.residual)))
    rows += [
        ("learning rate", f"{config.train.learning_rate:g}"),
        ("global batch", str(config.train.global_batch_size)),
        ("precision", source.precision.name),
        ("data", _data(config.data)),
    ]
    numbers = {
        "steps": "steps",
        "trained parameters": "trainable_parameters",
        "training loss, first tenth": "loss_first",
        "training loss, last tenth": "loss_last",
        "held-out loss before": "eval_loss_start",
        "held-out loss after": "eval_loss_end",
        "orthonormality L_reg at the end": "reg_loss_end",
    }
    for name, key in numbers.items():
        if (value := report.get(key)) is not None:
            rows.append((name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"))
    return [*rows, ("versions", ", ".join(f"{name} {number}" for name, number in report.get("versions", {}).items()))]


def _data(data: DataConfig) -> str:
    if data.path == EMBEDDED_DATA:
        return f"{data.path} (generated)"
    local = data.path.startswith("/") or Path(data.path).exists()
    parts = [Path(data.path).name if local else data.path, data.name, data.train_split]
    return ", ".join(part for part in parts if part)


def publish(folder: Path, name: str, private: bool) -> str:
    """Upload an exported folder as a model; returns its address.

    Raises:
        ValueError: the hub refuses, or cannot be reached; the folder stays as it is.
    """
    hub = HfApi()
    try:
        repository = hub.create_repo(name, private=private, repo_type="model", exist_ok=True)
        hub.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Upload a SORSA export")
    except Exception as error:  # of the hub's client, of the network, of the token
        raise ValueError(
            f"--push_to_hub {name}: {error}\nThe export itself is whole: {folder}. Log in (hf auth login), then export "
            f"again into another folder, or upload it: hf upload {name} {folder}"
        ) from error
    return str(repository)
