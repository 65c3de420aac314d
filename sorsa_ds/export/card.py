"""The model card: where an export comes from, what the run measured, how it is loaded."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, ModelCardData

from sorsa_ds.config.mixing import sources_of
from sorsa_ds.config.schema import EMBEDDED_DATA, DataConfig
from sorsa_ds.export.options import Format
from sorsa_ds.model.language_part import model_class
from sorsa_ds.model.new_tokens import table_rows
from sorsa_ds.model.whole_modules import whole_row
from sorsa_ds.run.source import Source
from sorsa_ds.sorsa.residual_storage import describe_storage

CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a card says of a format.

    what: the format in words, as "This is {what}.".
    library: the library that loads it.
    relation: the model's relation to its base model, by the hub's name.
    """

    what: str
    library: Literal["transformers", "peft", "sorsa_ds"]
    relation: Literal["finetune", "adapter"]


_KINDS = {
    "merged": Kind("a plain model with the trained change merged into its weights", "transformers", "finetune"),
    "lora": Kind("a LoRA for the untouched base model, in PEFT's format", "peft", "adapter"),
    "base": Kind("the model from which its training began, over a quantised residual", "transformers", "finetune"),
}
_ADAPTERS = {
    "sorsa_ds": Kind("U, s and V of every adapted linear, as trained and as they began", "sorsa_ds", "adapter"),
    "peft": Kind("an adapter for the untouched base model, in PEFT's format", "peft", "adapter"),
}
_FIGURES = {
    "steps": "steps",
    "trained parameters": "trainable_parameters",
    "training loss, first tenth": "loss_first",
    "training loss, last tenth": "loss_last",
    "held-out loss before": "eval_loss_start",
    "held-out loss after": "eval_loss_end",
    "orthonormality L_reg at the end": "reg_loss_end",
}
"""Heading of a row -> entry of the run's report."""


def model_card(source: Source, form: Format, notes: list[str]) -> str:
    """README.md of an export. Local folders are named without their paths: it may be published."""
    method = source.method
    kind = _ADAPTERS[method.adapter_library] if form == "adapter" else _KINDS[form]
    base = source.described.base_model if source.from_hub else Path(source.described.base_model).name
    head = ModelCardData(library_name=kind.library, pipeline_tag="text-generation", tags=[method.name])
    if source.from_hub:
        head["base_model"], head["base_model_relation"] = base, kind.relation
    table = "\n".join(f"| {name} | {value} |" for name, value in _rows(source, base))
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {base}, {'before its fine-tuning' if form == 'base' else 'fine-tuned'} with {method.title}",
        f"This is {kind.what}.{method.about}",
        "## Load it\n\n```python\n" + _loading(source, kind, base) + "\n```",
        *notes,
        f"## Training\n\n| | |\n|---|---|\n{table}",
        "## Licence\n\nThat of the base model.",
    ]
    return "\n\n".join(parts) + "\n"


def _loading(source: Source, kind: Kind, base: str) -> str:
    """The Python that loads an export."""
    if kind.library == "sorsa_ds":
        return (
            'from sorsa_ds import load_adapter\n\nmodel = load_adapter("PATH_OF_THIS_FOLDER")  # base="FOLDER": a copy'
        )
    trusted = ", trust_remote_code=True" if source.described.loading.trust_remote_code else ""
    name = "PATH_OF_THIS_FOLDER" if kind.library == "transformers" else base
    kind_of_model = model_class(source.model.config).__name__
    lines = [f'model = {kind_of_model}.from_pretrained("{name}"{trusted})']
    imports = [f"from transformers import {kind_of_model}"]
    if kind.library == "peft":
        imports.insert(0, "from peft import PeftModel")
        if source.described.new_tokens:
            rows = table_rows(source.model)
            lines.append(f"model.resize_token_embeddings({rows}, mean_resizing=False)  # the new tokens")
        lines.append('model = PeftModel.from_pretrained(model, "PATH_OF_THIS_FOLDER")')
    return "\n".join([*imports, "", *lines])


def _rows(source: Source, base: str) -> list[tuple[str, str]]:
    """The table: settings of the run, then what it reported."""
    config, report = source.config, source.report
    rows = [
        ("base model", base),
        ("method", source.method.title),
        *_method_rows(source),
        ("learning rate", f"{config.train.peak_rate:g}"),
        ("global batch", str(config.train.global_batch_size)),
        ("precision", source.precision.name),
        ("data", "; ".join(map(_data, sources_of(config.data).values()))),
    ]
    for name, key in _FIGURES.items():
        if (value := report.get(key)) is not None:
            rows.append((name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"))
    return [*rows, ("versions", ", ".join(f"{name} {number}" for name, number in report.get("versions", {}).items()))]


def _method_rows(source: Source) -> list[tuple[str, str]]:
    """Rows on what was trained: the linears, their adapters, and SORSA's regulariser and residual."""
    method, config, adapter, rows = source.method, source.config, source.described.adapter, []
    if source.targets:
        targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
        linears = sum(len(target.places) for target in source.targets if not target.experts)
        rows.append(("linears", f"{linears} ({targets})"))
        stacks = Counter(target.experts for target in source.targets if target.experts)
        if stacks:
            rows.append(("experts", ", ".join(f"weights of {number} x {count}" for number, count in stacks.items())))
    if source.whole:
        rows.append(("trained whole", whole_row(source.whole)))
    if source.described.new_tokens:
        rows.append(("new tokens", " ".join(f"`{token}`" for token in source.described.new_tokens)))
    if method.has_rank:
        ranks = sorted({method.rank(target, source.described.baseline) for target in source.targets})
        rows.append(("rank", " to ".join(map(str, ranks[:1] + ranks[1:][-1:]))))
        rows.append(
            (
                "scale",
                "1" if adapter.alpha is None else f"{adapter.alpha:g} / {'sqrt(rank)' if adapter.rslora else 'rank'}",
            )
        )
    if (reg := method.regularizer(config)) is not None:
        gamma = reg.coefficient * config.train.peak_rate
        strength = f"gamma = {gamma:.3g}, gamma / eta_d = {reg.coefficient:.4g}"
        rows.append(("regulariser", f"{reg.form}, {reg.reduction}, {strength}{reg.rhythm()}"))
        rows.append(("residual", describe_storage(source.described.residual)))
    return rows


def _data(data: DataConfig) -> str:
    """The data set, without the path of a local one."""
    if data.path == EMBEDDED_DATA:
        return f"{data.path} (generated)"
    local = data.path.startswith("/") or Path(data.path).exists()
    parts = [Path(data.path).name if local else data.path, data.name, data.train_split]
    return ", ".join(part for part in parts if part)


def publish(folder: Path, name: str, private: bool) -> str:
    """Upload an exported folder to the Hugging Face hub as a model; returns its address.

    Raises:
        ValueError: the hub refuses, or cannot be reached; the folder stays as it is.
    """
    hub = HfApi()
    try:
        repository = hub.create_repo(name, private=private, repo_type="model", exist_ok=True)
        hub.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Upload a SORSA export")
    except Exception as error:  # the hub's client, the network and the token fail in many ways
        raise ValueError(
            f"--push_to_hub {name}: {error}\nThe export itself is whole: {folder}. Log in (hf auth login), then export "
            f"again into another folder, or upload it: hf upload {name} {folder}"
        ) from error
    return str(repository)
