"""Finished runs with snapshots, made without a trainer, and their measures computed by hand."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from sorsa_ds.config.schema import AdapterConfig, LoadingConfig, ResidualConfig, RunConfig, TrainConfig
from sorsa_ds.config.yaml_io import to_yaml
from sorsa_ds.model import adapter_file
from sorsa_ds.model.selection import select_targets
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.run.snapshots import snapshot_path, stored_linears
from tests.helpers.architectures import save


def by_hand(now: np.ndarray, start: np.ndarray) -> dict[str, float]:
    """Equations 1 to 4 and the rest written out in numpy, float64."""
    (U, s, Vt), (U0, s0, Vt0) = (np.linalg.svd(W.astype(np.float64), full_matrices=False) for W in (now, start))
    p = s / s.sum()
    return {
        "delta_sigma": sum(abs(a - b) for a, b in zip(s, s0, strict=True)) / len(s),
        "delta_d": 1 - sum(abs(U[:, i] @ U0[:, i]) + abs(Vt[i] @ Vt0[i]) for i in range(len(s))) / (2 * len(s)),
        "condition_w": s[0] / s[-1],
        "effective_rank": math.exp(-sum(p * np.log(p))),
        "stable_rank": np.linalg.norm(now) ** 2 / np.linalg.norm(now, 2) ** 2,
    }


STEPS = {0: 0.0, 2: 0.05, 4: 0.1, 6: 0.2}


def handmade(folder: Path, architecture: str, method: str, **settings) -> tuple[Path, dict]:
    """A finished run without a trainer, with snapshots, and (linear, step) -> its weight (M, N), computed here."""
    base = folder / f"base-{architecture}"
    if not base.exists():
        save(architecture, base)
    run = folder / f"{architecture}-{method}"
    config = RunConfig(
        model=str(base), method=method, adapter=AdapterConfig() if method == "full" else AdapterConfig(rank=4),
        residual=ResidualConfig(storage="fp32"), train=TrainConfig(precision="fp32", learning_rate=1e-3), **settings,
    )  # fmt: skip
    model = skeleton(base, LoadingConfig())
    targets = [] if method == "full" else select_targets(model, config.adapter)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    tensors, weights = {step: {} for step in STEPS}, {}
    for target in stored_linears(model, RunConfig(method=method, adapter=config.adapter)):
        name = target.name
        W = whole.get_submodule(name).weight.detach().double()
        W = W.T if target.transposed else W
        noise = [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in W.shape]
        for step, size in STEPS.items():
            if method == "sorsa":
                U, s, Vt = torch.linalg.svd(W, full_matrices=False)
                first = [U[:, :4], s[:4], Vt[:4].T]
                U, s, V = (x.float().double() for x in first)
                now = [U + size * noise[0] * 0.1, s * (1 + size), V + size * noise[1] * 0.1]
                now = [x.float() for x in now]
                tensors[step] |= {f"{name}.{k}": x.contiguous() for k, x in zip("UsV", now, strict=True)}
                now = [x.double() for x in now]
                weights[name, step] = W - (U * s) @ V.T + (now[0] * now[1]) @ now[2].T
            elif method == "lora":
                A, B = noise[1].T.float().contiguous(), (size * noise[0]).float()
                tensors[step] |= {f"{name}.lora_A.default.weight": A, f"{name}.lora_B.default.weight": B}
                weights[name, step] = W + B.double() @ A.double()
            else:
                W_t = (W + size * noise[0] @ noise[1].T).float()
                tensors[step][f"{name}.weight"] = (W_t.T if target.transposed else W_t).contiguous()
                weights[name, step] = W_t.double()
    *_, last = STEPS
    (run / "adapter").mkdir(parents=True)
    if method != "full":
        save_file(tensors[0], run / "adapter" / adapter_file.INITIAL)
    save_file(tensors[last], run / "adapter" / adapter_file.TRAINED)
    wanted = tuple(f"{target.name}." for target in stored_linears(model, config))
    for step in [step for step in STEPS if 0 < step < last]:
        snapshot_path(run, step).parent.mkdir(exist_ok=True)
        save_file({name: x for name, x in tensors[step].items() if name.startswith(wanted)}, snapshot_path(run, step))
    adapter_file.describe_adapter(run / "adapter", config, targets, {})
    adapter_file.record_digests(run / "adapter")
    (run / "config.yaml").write_text(to_yaml(config))
    lines = [{"step": t, "loss": 3 / t, "grad_norm": 1 / t} for t in range(1, last + 1)]
    lines = [line | ({"reg_loss": 0.1 * line["step"]} if method == "sorsa" else {}) for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = {"steps": last, "loss_last": 0.5, "eval_loss_start": 2.0, "eval_loss_end": None}
    (run / "report.json").write_text(json.dumps(report | {"trainable_parameters": 1234}))
    return run, weights


def table(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))
