"""The method in one process of plain torch, written independently of the package: what the engine is compared with.

No DeepSpeed, no closed form, no fragments: dense products, autograd of L_reg in float64, torch's clip and AdamW.
"""

import math
from itertools import permutations

import torch
from torch import nn
from transformers import AutoModelForCausalLM


class DenseSorsa(nn.Module):
    """W = W_r + U diag(s) V^T formed in full."""

    def __init__(self, rest, U, s, V):
        super().__init__()
        self.register_buffer("rest", rest)
        self.U, self.s, self.V = nn.Parameter(U.clone()), nn.Parameter(s.clone()), nn.Parameter(V.clone())

    def forward(self, x):
        return x @ (self.rest + self.U @ torch.diag(self.s) @ self.V.T).T


def plain_model(folder, factors: dict, residuals: dict | None = None) -> nn.Module:
    """The pre-trained model with dense SORSA layers that start from the given factors (name -> U, s, V).

    residuals: name -> W_r, where it is not W - U diag(s) V^T.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    for name, (U, s, V) in factors.items():
        parent, _, leaf = name.rpartition(".")
        weight = model.get_submodule(name).weight.detach()
        rest = weight - (U * s) @ V.T if residuals is None else residuals[name]
        setattr(model.get_submodule(parent), leaf, DenseSorsa(rest, U, s, V))
    return model.train()


def penalty(model: nn.Module, form: str, reduction: str) -> torch.Tensor:
    """L_reg by definition, in float64."""
    values = []
    for module in model.modules():
        if isinstance(module, DenseSorsa):
            for X in (module.U, module.V):
                E = X.double().T @ X.double() - torch.eye(X.shape[1], dtype=torch.float64)
                square = (E**2).sum()
                values.append(square if form == "squared" else square.sqrt())
    stacked = torch.stack(values)
    return stacked.mean() if reduction == "mean" else stacked.sum()


@torch.no_grad()
def reorthonormalize(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """U, V orthonormal, U diag(s) V^T the same: QR and SVD of whole matrices in float64, columns in the order and with
    the signs that look most alike (all orders are tried). The first moments turn with them."""
    for module in model.modules():
        if isinstance(module, DenseSorsa):
            old = [module.U.double(), module.V.double()]
            (q_u, r_u), (q_v, r_v) = map(torch.linalg.qr, old)
            a, s, b = torch.linalg.svd(r_u @ torch.diag(module.s.double()) @ r_v.T)
            new = [q_u @ a, q_v @ b.T]
            alike = sum((x.T @ y).abs() for x, y in zip(old, new, strict=True))
            columns = range(len(s))
            order = list(max(permutations(columns), key=lambda p: sum(alike[i, p[i]] for i in columns)))
            new, s = [x[:, order] for x in new], s[order]
            for parameter, before, after in zip((module.U, module.V), old, new, strict=True):
                sign = (before * after).sum(0).sign()
                parameter.copy_(after * sign)
                s = s * sign
                moment = optimizer.state[parameter]["exp_avg"]
                moment.copy_(moment.double() @ torch.linalg.pinv(before) @ (after * sign))
            module.s.copy_(s)


def train(
    model, batches, *, rate, clip, coefficient, form, reduction, steps, warmup, reorthonormalized=0
) -> list[dict]:
    """`batches[t]`: the sequences of step t, each (input_ids, labels). The loss is the mean over all learned tokens.

    reorthonormalized: after every so many steps; 0: never.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    log = []
    for t, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * (t / warmup if t < warmup else
                                  0.5 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup))))  # fmt: skip
        optimizer.zero_grad()
        loss, count = 0.0, 0
        for input_ids, labels in batch:
            logits = model(input_ids=input_ids).logits[:, :-1].flatten(0, 1)
            loss = loss + nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
            count += int((labels[:, 1:] != -100).sum())
        (loss / count).backward()
        norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in parameters))
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        reg = penalty(model, form, reduction)
        for p, g in zip(parameters, torch.autograd.grad(reg, parameters, allow_unused=True), strict=True):
            if g is not None:
                p.grad += coefficient * g
        log.append({"loss": loss.item() / count, "grad_norm": norm.item(), "reg_loss": reg.item()})
        optimizer.step()
        if reorthonormalized and (t + 1) % reorthonormalized == 0:
            reorthonormalize(model, optimizer)
    return log


def peft_loop(model, batches, *, rate, clip, steps, warmup) -> list[float]:
    """Any model that gives its own loss, PEFT's too: the loop that PEFT's documentation shows, in one process.

    AdaLoRA's model adds its orthogonal term to that loss, and allocates after each step. Returns the losses.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for t, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * (t / warmup if t < warmup else
                                  0.5 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup))))  # fmt: skip
        input_ids, labels = (torch.cat(parts) for parts in zip(*batch, strict=True))
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        tuner = getattr(model, "base_model", None)
        if hasattr(tuner, "update_and_allocate") and (tuner.rankallocator.init_bgt > tuner.rankallocator.target_bgt):
            tuner.update_and_allocate(t + 1)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
