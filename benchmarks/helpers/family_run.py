"""One family of models through the whole product: loaded, trained for two steps, exported, and compared on the way.

Three phases, each in processes of its own (forked, which is quick), so that a crash or a hang is a result like another:
a tiny model is written, ranks train on it, and the run is exported.
"""

import json
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel

import sorsa_ds
from benchmarks.helpers.common import DS_CONFIGS
from benchmarks.helpers.tiny_models import write_tiny_model
from sorsa_ds.model.language_part import in_language_part
from sorsa_ds.model.selection import Selection
from sorsa_ds.runtime.ports import free_port
from tests.helpers.chat_tokenizer import chat_tokenizer
from tests.helpers.worlds import FORK, import_once

INPUT = torch.randint(10, 250, (2, 24), generator=torch.Generator().manual_seed(1))
LARGEST_GAP = 1e-4
"""By how much logits may differ, relatively; training moves them by a hundred times as much."""
SMALLEST_MOVE = 100 * LARGEST_GAP
STEPS, RANK, RATE = 2, 4, 2e-2

Result = Literal["pass", "wrong", "refused", "crash", "not built"]


@dataclass(slots=True)
class Row:
    """What became of a family.

    result: `not built` where transformers itself cannot make or reload the model.
    reason: why the result is not `pass`; empty where it is.
    gaps: relative distances of logits: `start` (step 0 from transformers' own load), `merged` and `lora` (the exports
        from the trained model), and `moved` (the trained model from step 0). `towers`: the share of the parameters
        outside of the language model that the merged export has changed.
    linears: the number of adapted linears, without experts.
    experts, adapted_experts: the number of tensors with a matrix per expert, and of the adapted ones among them.
    share: the share of the body's weights that is adapted.
    said: the warning of a share below a half that the run has printed.
    left_out: what `all-linear` passes over, in words.
    no_lora: why there is no LoRA export, where it is refused.
    causal: how far a change of the last token moves earlier logits, relatively.
    """

    family: str
    result: Result = "pass"
    reason: str = ""
    model: str = ""
    gaps: dict[str, float] = field(default_factory=dict)
    linears: int = 0
    experts: int = 0
    adapted_experts: int = 0
    share: float = 0.0
    said: str = ""
    left_out: str = ""
    no_lora: str = ""
    causal: float = 0.0

    @property
    def silent(self) -> bool:
        """Whether less than a half is adapted, and the run does not say so."""
        return self.result in ("pass", "wrong") and self.share < 0.5 and not self.said


def examine(
    family: str, whole: bool = False, ranks: int = 1, stage: int = 0, seconds: float = 120.0, *words: str
) -> Row:
    """Take a family through the product.

    Args:
        whole: whether its class with vision or audio is taken.
        ranks, stage: the number of ranks and the ZeRO stage of training.
        seconds: the seconds after which a phase counts as hung.
        words: further settings of the run.
    """
    row = Row(f"{family} (whole)" if whole else family)
    _import_all()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        phases: list[tuple[str, int, Callable[..., dict], tuple]] = [
            ("build", 1, _build, (folder, family, whole)),
            ("train", ranks, _train, (folder, stage, *words)),
            ("export", 1, _export, (folder,)),
        ]
        for phase, world, function, arguments in phases:
            found = _in_processes(folder / phase, world, function, arguments, seconds)
            for key, value in found.pop("row", {}).items():
                setattr(row, key, row.gaps | value if key == "gaps" else value)
            if found:
                row.reason = found["reason"].replace(name + "/", "")
                row.result = "not built" if phase == "build" else found["result"]
                return row
    wrong = [
        f"{name}: {row.gaps[name]:.1e}"
        for name in ("start", "merged", "towers", "lora")
        if row.gaps.get(name, 0) > LARGEST_GAP
    ]
    if row.gaps["moved"] < SMALLEST_MOVE:
        wrong.append(f"two steps move the logits by {row.gaps['moved']:.1e} only")
    if wrong:
        row.result, row.reason = "wrong", "; ".join(wrong)
    return row


@cache
def _import_all() -> None:
    """Import what the phases need, once for all of them."""
    import_once()
    import peft  # noqa: F401

    import sorsa_ds.export.command  # noqa: F401


def expert_tensors(model: nn.Module, selection: Selection) -> tuple[int, int]:
    """(adapted, all) parameters of a model that hold the matrices of several experts."""
    adapted = {target.name for target in selection.targets if target.experts}
    others = [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if prefix not in adapted and not isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d)
        for name, parameter in module.named_parameters(recurse=False)
        if not name.endswith("bias") and ("experts" in prefix or "moe" in prefix)
        if len(getattr(parameter, "ds_shape", parameter.shape)) == 3
    ]
    return len(adapted), len(adapted) + len(others)


def _in_processes(
    place: Path, world: int, function: Callable[..., dict], arguments: tuple, seconds: float
) -> dict[str, Any]:
    """What rank 0 of some forked processes has found; `result` and `reason` where one of them failed."""
    place.mkdir()
    port = free_port()
    processes = [
        FORK.Process(target=_process, args=(place, rank, world, port, function, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    hung = False
    for process in processes:
        process.join(seconds)
        hung |= process.is_alive()
    for process in processes:
        process.kill()
        process.join()
    found = [_read(place / f"{rank}.json") for rank in range(world)]
    failed = [one for one in found if one and "result" in one]
    if failed:
        return next((one for one in failed if one["result"] != "peer"), failed[0])
    if hung:
        return {"result": "crash", "reason": f"hangs after {seconds:.0f} s"}
    if not all(found):
        return {"result": "crash", "reason": f"a process ends with code {processes[0].exitcode}"}
    return found[0] or {}


def _read(file: Path) -> dict | None:
    return json.loads(file.read_text()) if file.exists() else None


def _process(place: Path, rank: int, world: int, port: int, function: Callable[..., dict], arguments: tuple) -> None:
    """One rank of a phase; what it prints goes to a file."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), SORSA_CACHE=str(place / "cache"), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    printed = os.open(place / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(printed, standard)
    # What stands there in the process that was forked may write elsewhere, as pytest's does.
    sys.stdout, sys.stderr = (os.fdopen(standard, "w", buffering=1, closefd=False) for standard in (1, 2))
    try:
        found = function(place / f"{rank}.txt", *arguments)
    except BaseException as error:
        traceback.print_exc()
        found = _failure(error)
    (place / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)


def _failure(error: BaseException) -> dict[str, Any]:
    """A message of our own is a refusal; everything else is a crash."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(sorsa_ds.__file__).parent
    ours = isinstance(error, ValueError) and Path(frames[-1].filename).is_relative_to(package)
    if type(error).__name__ == "PeerError":
        return {"result": "peer", "reason": str(error)}
    if ours:
        return {"result": "refused", "reason": str(error)}
    return {"result": "crash", "reason": f"{type(error).__name__}: {error}"}


def _build(printed: Path, folder: Path, family: str, whole: bool) -> dict:
    """Write the model, its tokenizer and data; the model must compute, and be the same when it is loaded again."""
    base = folder / "model"
    write_tiny_model(family, base, whole)
    chat_tokenizer().save_pretrained(base)
    rows = [
        {"query": f"What is {n} plus {n}?", "response": f"It is {2 * n}." + " Really." * (n % 3)} for n in range(12)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = (logits_of(load(base)) for _ in range(2))
    if not first.isfinite().all() or relative(first, second) > 0:
        raise ValueError("transformers does not load the same model twice: some of its weights are not stored")
    torch.save(first, folder / "base.pt")
    model, changed = load(base), INPUT.clone()
    changed[:, -1] = 300
    with torch.no_grad():
        after = model(input_ids=changed, attention_mask=torch.ones_like(INPUT), use_cache=False).logits
    return {"row": {"model": type(model).__name__, "causal": relative(after[:, :-1], first[:, :-1])}}


def _train(printed: Path, folder: Path, stage: int, *more: str) -> dict:
    """Two steps with the trainer itself."""
    from sorsa_ds.runtime import collectives
    from sorsa_ds.train.options import parse
    from sorsa_ds.train.setup import assemble

    json_file = DS_CONFIGS / (f"zero{stage}.json" if stage else "stage0.json")
    words = [
        f"--ds_config={json_file}", f"model={folder / 'model'}", f"data.path={folder / 'data.jsonl'}",
        "data.eval_size=2", "data.max_length=64", f"train.steps={STEPS}", f"adapter.rank={RANK}",
        "train.global_batch_size=4", "train.micro_batch_size=2", "train.precision=fp32", "train.warmup_ratio=0",
        f"train.learning_rate={RATE}", "train.gradient_checkpointing=false", f"output.folder={folder}",
        "output.name=run", *more,
    ]  # fmt: skip
    trainer = assemble(parse(words))
    model, selection = trainer.engine, trainer.beginning.loaded.selection
    start = logits_of(model)
    adapted, experts = expert_tensors(model.module, selection)
    linears = sum(not target.experts for target in selection.targets)
    trainer.train()
    trained = logits_of(model)
    if collectives.rank() == 0:
        torch.save(trained, folder / "trained.pt")
    base = torch.load(folder / "base.pt")
    sys.stdout.flush()
    text, warning = printed.read_text(), selection.warning or ""
    return {
        "row": {
            "gaps": {"start": relative(start, base), "moved": relative(trained, start)},
            "linears": linears, "experts": experts, "adapted_experts": adapted,
            "share": selection.share, "said": warning if warning in text else "",
            "left_out": next((value for name, value in selection.rows() if name == "left out"), ""),
        }
    }  # fmt: skip


def _export(printed: Path, folder: Path) -> dict:
    """The merged model and the LoRA, loaded by transformers and PEFT."""
    from peft import PeftModel

    from sorsa_ds.export.command import Options, export

    trained = torch.load(folder / "trained.pt")
    export(Options(folder / "run", "merged", folder / "merged", dtype="float32"))
    base, merged = load(folder / "model"), load(folder / "merged")
    gaps = {"merged": relative(logits_of(merged), trained), "towers": _towers_moved(base, merged)}
    try:
        export(Options(folder / "run", "lora", folder / "lora"))
    except ValueError as error:
        return {"row": {"gaps": gaps, "no_lora": str(error)}}
    gaps["lora"] = relative(logits_of(PeftModel.from_pretrained(base, folder / "lora")), trained)
    return {"row": {"gaps": gaps}}


def _towers_moved(base: PreTrainedModel, merged: PreTrainedModel) -> float:
    """The share of the parameters outside of the language model that the merged model has otherwise than its base."""
    is_text = in_language_part(base)
    outside = [name for name, _ in base.named_parameters() if not is_text(name)]
    moved = [name for name in outside if not torch.equal(base.get_parameter(name), merged.get_parameter(name))]
    return len(moved) / max(1, len(outside))


def load(folder: Path) -> PreTrainedModel:
    """A model of a folder in fp32, by transformers alone, in the class that its configuration names."""
    kind = getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    """A model's logits on a fixed input, in eval mode."""
    training = model.training
    model.eval()
    logits = model(input_ids=INPUT, attention_mask=torch.ones_like(INPUT), use_cache=False).logits
    model.train(training)
    return logits.float()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative Frobenius distance."""
    return ((a - b).norm() / b.norm()).item()
