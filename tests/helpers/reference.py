"""What training is compared with: the method as `examples/sorsa_in_one_page.py` has it, and PEFT's loop for the others.

Both run in one process of plain torch and are written independently of the package: no DeepSpeed, no closed form, no
fragments.
"""

from itertools import permutations

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from examples import sorsa_in_one_page as page
from examples.sorsa_in_one_page import DenseSorsa


class BiasedSorsa(DenseSorsa):
    """A layer with a frozen bias."""

    def __init__(self, W_r, U, s, V, bias):
        super().__init__(W_r, U, s, V)
        self.bias = bias

    def forward(self, x):
        return super().forward(x) + self.bias


class DenseExperts(nn.Module):
    """A layer for each expert, in the place of the parameter that holds the weights of all (torch's parametrization).

    Where the given parameter is W, they compute with W - U_0 diag(s_0) V_0^T + U diag(s) V^T.
    """

    def __init__(self, U, s, V, transposed: bool):
        super().__init__()
        zero = torch.zeros(U.shape[1], V.shape[1], dtype=U.dtype)
        self.layers = nn.ModuleList(DenseSorsa(zero, *own) for own in zip(U, s, V, strict=True))
        self.start = torch.stack([layer.merged().detach() for layer in self.layers])
        self.transposed = transposed

    def forward(self, W):
        """The weights (E, M, N), or (E, N, M) where the model has them transposed."""
        change = torch.stack([layer.merged() for layer in self.layers]) - self.start
        return W + (change.mT if self.transposed else change)


def plain_parameter(model: nn.Module, name: str) -> torch.Tensor:
    """A trained tensor of a plain model by its name in ours: those of experts one after the other."""
    layer, _, leaf = name.rpartition(".")
    holder, _, stack = layer.rpartition(".")
    parent = model.get_submodule(holder)
    if not hasattr(parent, "parametrizations"):
        return model.get_parameter(name).detach()
    layers = parent.parametrizations[stack][0].layers
    return torch.stack([getattr(one, leaf).detach() for one in layers])


def plain_model(folder, factors: dict, residuals: dict | None = None) -> nn.Module:
    """The pre-trained model in float64 with dense SORSA layers that start from the given factors (name -> U, s, V).

    In float32 it would be as far from the truth as what it is the judge of: where L_reg begins at rounding, up to 2e-5
    after ten steps. transformers' grouped products of experts know no float64.

    residuals: name -> W_r, where it is not W - U diag(s) V^T.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    model = model.double().requires_grad_(False)
    for name, own in factors.items():
        U, s, V = (factor.double() for factor in own)
        parent, _, leaf = name.rpartition(".")
        if U.dim() == 3:
            stack = DenseExperts(U, s, V, transposed=model.get_parameter(name).shape[1:] != (U.shape[1], V.shape[1]))
            parametrize.register_parametrization(model.get_submodule(parent), leaf, stack, unsafe=True)
            continue
        linear = model.get_submodule(name)
        W_r = linear.weight.detach() - (U * s) @ V.T if residuals is None else residuals[name].double()
        layer = DenseSorsa(W_r, U, s, V) if linear.bias is None else BiasedSorsa(W_r, U, s, V, linear.bias)
        setattr(model.get_submodule(parent), leaf, layer)
    return model.train()


def train(model, batches, *, rate, reorthonormalized=0, **settings) -> list[dict]:
    """Train as the page does; returns the figures of each step.

    batches: `batches[t]` are the sequences of step t, each (input_ids, labels).
    reorthonormalized: after how many steps U and V are made orthonormal, again and again; 0 for never.
    settings: further arguments of the page's `train`.
    """
    optimizer, log = page.adamw(model, rate), []
    for figures in page.train(model, optimizer, batches, rate=rate, **settings):
        log.append(figures)
        if reorthonormalized and len(log) % reorthonormalized == 0:
            reorthonormalize(model, optimizer)
    return log


@torch.no_grad()
def reorthonormalize(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make U and V orthonormal and leave U diag(s) V^T as it is: QR and SVD of whole matrices in float64.

    Columns get the order and the signs in which they look most like the old ones; all orders are tried. The first
    moments turn with them.
    """
    for module in model.modules():
        if isinstance(module, DenseSorsa):
            old = [module.U.double().clone(), module.V.double().clone()]
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


def peft_loop(model, batches, *, rate, clip, steps, warmup) -> list[float]:
    """Train any model that gives its own loss, as PEFT's documentation shows it, in one process; returns the losses.

    AdaLoRA's model adds its orthogonal term to that loss, and allocates after each step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for t, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = page.learning_rate(t, rate, warmup, steps)
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
