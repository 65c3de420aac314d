"""SORSA on one page: the paper's equations in plain PyTorch, and a tiny language model that learns by them.

    python examples/sorsa_in_one_page.py

A pre-trained weight is split by its singular values. The r largest triplets are trained, as three matrices that stay
apart; the rest is frozen; a regulariser keeps the singular vectors orthonormal. After training both parts are merged
into a plain linear again. Everything here is computed as it is defined: dense products, and the regulariser's gradient
by autograd in float64. `sorsa_ds` computes the same with less work, on many GPUs; its tests compare it with this page.

Equations are numbered as in arXiv 2409.00055. Shapes: m outputs, n inputs, rank r, k = min(m, n).
"""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor, nn

Sequences = list[tuple[Tensor, Tensor]]
"""Token ids and labels, (B, length) each; label -100 marks a token whose prediction does not count."""

ROUNDING = 32 * 2.0**-24
"""The ||X^T X - I||_F / sqrt(r) up to which the fp32 columns of a U or V are orthonormal but for rounding errors."""


class DenseSorsa(nn.Module):
    """A linear whose weight is W = W_r + U diag(s) V^T: W_r (m, n) frozen; U (m, r), s (r) and V (n, r) trained."""

    def __init__(self, W_r: Tensor, U: Tensor, s: Tensor, V: Tensor):
        super().__init__()
        self.register_buffer("W_r", W_r)
        self.U, self.s, self.V = nn.Parameter(U.clone()), nn.Parameter(s.clone()), nn.Parameter(V.clone())

    @classmethod
    def of(cls, W_0: Tensor, rank: int) -> "DenseSorsa":
        """The layer that computes what the pre-trained weight W_0 (m, n) does."""
        U, s, Vt = torch.linalg.svd(W_0, full_matrices=False)  # eq. 5:  W_0 = U diag(s) V^T, s descending
        U, s, V = U[:, :rank], s[:rank], Vt[:rank].T  # eq. 6:  W_p = U diag(s) V^T, the principal part
        return cls(W_0 - U @ torch.diag(s) @ V.T, U, s, V)  # eq. 7:  W_r = W_0 - W_p, the residual

    def merged(self) -> Tensor:
        """W (m, n), the weight of the plain linear that serves as well."""
        return self.W_r + self.U @ torch.diag(self.s) @ self.V.T

    def forward(self, x: Tensor) -> Tensor:
        """y = W_r x + U diag(s) V^T x, the bias left out."""
        return x @ self.merged().T  # eq. 8


def regularizer_loss(model: nn.Module, form: str = "norm", reduction: str = "mean") -> Tensor:
    """L_reg: how far the U and V of all layers are from orthonormal, by definition, in float64.

    form: `norm` as in eq. 9, or `squared` as in the paper's later version. reduction: over the matrices, `mean` as the
    authors' code takes it, or `sum`. Where E is no more than rounding, as at step 0, it has a value but no gradient:
    that of the norm would have full length in the direction of the rounding errors.
    """
    values = []
    for layer in (module for module in model.modules() if isinstance(module, DenseSorsa)):
        for X in (layer.U, layer.V):
            E = X.double().T @ X.double() - torch.eye(X.shape[1], dtype=torch.float64)
            square = (E**2).sum()
            if square.sqrt() <= ROUNDING * math.sqrt(X.shape[1]):
                square = square.detach()
            values.append(square if form == "squared" else square.sqrt())  # eq. 9:  ||U^T U - I||_F + ||V^T V - I||_F
    return torch.stack(values).mean() if reduction == "mean" else torch.stack(values).sum()


def learning_rate(t: int, peak: float, warmup: int, steps: int) -> float:
    """eta_t, the scheduler's learning rate at step t: a linear warm-up to eta_d, the peak, then half a cosine."""
    if t < warmup:
        return peak * t / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup)))


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """The one optimizer of everything that is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Sequences], *, rate: float, warmup: int,
    steps: int, clip: float, coefficient: float, form: str = "norm", reduction: str = "mean",
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Take one optimizer step per batch; yields its loss, gradient norm and L_reg after each.

    coefficient: gamma / eta_d. clip: largest norm of the loss's gradient; 0 for no clipping. The loss is the mean over
    all tokens that count. The model returns an object with `logits`, as those of transformers do.
    """
    trained = optimizer.param_groups[0]["params"]
    for t, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate(t, rate, warmup, steps)
        optimizer.zero_grad()
        loss, count = 0.0, 0
        for input_ids, labels in batch:
            logits = model(input_ids=input_ids).logits[:, :-1].flatten(0, 1)
            loss = loss + nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
            count += int((labels[:, 1:] != -100).sum())
        (loss / count).backward()  # grad L_train
        norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in trained))
        if clip:
            nn.utils.clip_grad_norm_(trained, clip)
        regularizer = regularizer_loss(model, form, reduction)
        if regularizer.requires_grad:  # some U or V is no longer orthonormal
            for p, gradient in zip(trained, torch.autograd.grad(regularizer, trained, allow_unused=True), strict=True):
                if gradient is not None:  # s is not regularised
                    p.grad += coefficient * gradient  # grad L_train, clipped, + (gamma / eta_d) grad L_reg
        optimizer.step()  # eq. 10, 11:  W_p,t+1 = W_p,t - eta_t (the sum), by AdamW
        yield {"loss": loss.item() / count, "grad_norm": norm.item(), "reg_loss": regularizer.item()}


def change(W_t: Tensor, W_0: Tensor) -> tuple[float, float]:
    """How far training has moved a merged weight's singular values (Delta Sigma) and singular vectors (Delta D)."""
    (U_t, s_t, Vt_t), (U_0, s_0, Vt_0) = (torch.linalg.svd(W.double(), full_matrices=False) for W in (W_t, W_0))
    sigma = (s_t - s_0).abs().mean()  # eq. 1:  sum_i |sigma_i(W_t) - sigma_i(W_0)| / k
    alike = (U_t * U_0).sum(0).abs() + (Vt_t * Vt_0).sum(1).abs()  # eq. 2, 3:  |<u_i(t), u_i(0)>|, |<v_i(t), v_i(0)>|
    return sigma.item(), 1 - alike.mean().item() / 2  # eq. 4:  1 - (1 / 2k) times their sum over i


class TinyLanguageModel(nn.Module):
    """Predicts the next of 32 tokens from the last one; its random weights stand for pre-trained ones."""

    def __init__(self):
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(32, 48), nn.Linear(48, 96, False), nn.Linear(96, 32, False)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """Logits (B, length, 32) of token ids (B, length)."""
        return SimpleNamespace(logits=self.down(torch.tanh(self.up(self.embedding(input_ids)))))


def counting_in_threes(count: int) -> Sequences:
    """Sequences like 5, 8, 11, ... modulo 32; the first four tokens are the question, and only the rest is learned."""
    ids = (torch.randint(32, (count, 1)) + 3 * torch.arange(12)) % 32
    return [(ids, torch.where(torch.arange(12) < 4, -100, ids))]


def merge(layer: DenseSorsa) -> tuple[nn.Linear, float]:
    """The plain linear that a layer becomes, and the largest gap between its output and that of the two parts."""
    m, n = layer.W_r.shape
    linear, x = nn.Linear(n, m, bias=False), torch.randn(100, n)
    linear.weight = nn.Parameter(layer.merged())
    in_parts = x @ layer.W_r.T + ((x @ layer.V) * layer.s) @ layer.U.T  # eq. 8 without forming U diag(s) V^T
    return linear, (linear(x) - in_parts).abs().max().item()


def main() -> None:
    """Adapt the model at rank 8, train it without and with the regulariser, and merge it."""
    torch.set_num_threads(1)  # the matrices are so small that threads would only wait for one another
    steps, rate, x = 200, 1e-2, torch.arange(32)[None]
    for coefficient in (0.0, 0.2):
        torch.manual_seed(0)
        model = TinyLanguageModel().requires_grad_(False)
        before, start = model(x).logits, {name: getattr(model, name).weight for name in ("up", "down")}
        for name, W_0 in start.items():
            setattr(model, name, DenseSorsa.of(W_0, rank=8))
        gap = (model(x).logits - before).abs().max()
        print(f"gamma / eta_d = {coefficient}: the adapted model's logits start {gap:.1e} from the model's own")
        print(" step   loss  gradient norm   L_reg")
        batches = [counting_in_threes(8) for _ in range(steps)]
        settings = dict(rate=rate, warmup=5, steps=steps, clip=1.0, coefficient=coefficient)
        for t, line in enumerate(train(model, adamw(model, rate), batches, **settings), start=1):
            if t == 1 or t % 25 == 0:
                print(f"{t:5} {line['loss']:6.3f} {line['grad_norm']:14.4f} {line['reg_loss']:7.4f}")
        for name, W_0 in start.items():
            linear, gap = merge(getattr(model, name))
            sigma, turned = change(linear.weight.detach(), W_0)
            print(f"{name}: Delta Sigma {sigma:.4f}, Delta D {turned:.4f}; merged, its output is within {gap:.1e}")


if __name__ == "__main__":
    main()
