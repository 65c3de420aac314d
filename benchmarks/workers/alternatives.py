"""The parts of benchmarks/alternatives.py on one rank: AdamW's forms, the output head, packed rows.

Rank 0 prints one JSON object last.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.helpers.common import run_side
from benchmarks.helpers.live_bytes import LiveBytes
from benchmarks.helpers.models import RATE
from benchmarks.helpers.padding import data
from benchmarks.helpers.sides import add_engine, add_sizes, engine_step, examples, made
from benchmarks.helpers.turns import in_turns
from sorsa_ds.data.batches import collate
from sorsa_ds.data.order import GlobalOrder, ShuffledPasses
from sorsa_ds.data.packing import balanced, collate_packed
from sorsa_ds.data.tokenize import IGNORED
from sorsa_ds.engine.masters import inner_optimizer
from sorsa_ds.runtime.device import this_device
from sorsa_ds.train.loss import summed_loss

ADAMW = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False, "fused": False}}


def main() -> None:
    """Run the part that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("optimizer", "logits", "packing"))
    add_sizes(parser)
    add_engine(parser)
    parser.add_argument("--chunk", type=int, default=64, help="positions that the chunked head takes at a time")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--global_batch", type=int)
    parser.add_argument("--micro_batch", type=int)
    arguments = parser.parse_args()
    run_side({"optimizer": optimizer, "logits": logits, "packing": packing}[arguments.what], arguments)


def optimizer(a: argparse.Namespace) -> dict:
    """Seconds of AdamW's step in each form, on copies of the tensors that the engine's optimizer holds.

    Beside them the seconds of a training step, and how far each form ends from the loop.
    """
    engine, step = engine_step("sorsa", a)
    masters = [p for group in inner_optimizer(engine).param_groups for p in group["params"]]
    copies = {form: [_with_gradient(p) for p in masters] for form in ADAMW}
    forms = {
        form: torch.optim.AdamW(copies[form], lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **ADAMW[form])
        for form in ADAMW
    }
    seconds = in_turns({form: one.step for form, one in forms.items()} | {"step": step}, a.rounds)
    gaps = {
        form: max(float((p - q).abs().max()) for p, q in zip(copies[form], copies["loop"], strict=True))
        for form in ("fused", "foreach")
    }
    return {"seconds": seconds, "tensors": len(masters), "numbers": sum(p.numel() for p in masters), "gaps": gaps}


def _with_gradient(master: Tensor) -> nn.Parameter:
    generator = torch.Generator(master.device).manual_seed(0)
    twin = nn.Parameter(master.detach().clone())
    twin.grad = torch.randn(twin.shape, generator=generator, device=twin.device)
    return twin


def head_sides(a: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """Functions that give the loss of one batch with each head; of each sequence the last half is learned."""
    model = made("sorsa", a)
    batch, _ = examples(model, a)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, : a.length // 2] = IGNORED
    return {
        "learned": lambda: summed_loss(model, batch),
        "everywhere": lambda: everywhere(model, batch),
        "transformers": lambda: model(**batch, use_cache=False).loss * int((batch["labels"] != IGNORED).sum()),
        "chunked": lambda: chunked(model, batch, a.chunk),
    }


def everywhere(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss on the learned positions, with the output head computed on all of them."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = batch["labels"][:, 1:]
    logits = model(**inputs, use_cache=False).logits[:, :-1][labels != IGNORED]
    return nn.functional.cross_entropy(logits.float(), labels[labels != IGNORED], reduction="sum")


def chunked(model: nn.Module, batch: dict[str, Tensor], chunk: int) -> Tensor:
    """The loss with the head on `chunk` learned positions at a time, recomputed in backward: no logits are kept."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    learned = batch["labels"][:, 1:] != IGNORED
    hidden_KD = model.get_decoder()(**inputs, use_cache=False).last_hidden_state[:, :-1][learned]
    head, labels_K = model.get_output_embeddings(), batch["labels"][:, 1:][learned]

    def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(hidden).float(), labels, reduction="sum")

    parts = zip(hidden_KD.split(chunk), labels_K.split(chunk), strict=True)
    return torch.stack([checkpoint(loss_of, *part, use_reentrant=False) for part in parts]).sum()


def logits(a: argparse.Namespace) -> dict:
    """Seconds of forward and backward with each head, the losses, and the most bytes of live tensors."""
    sides = head_sides(a)
    losses, peaks = {}, {}
    for name, loss in sides.items():
        with LiveBytes() as live:
            value = loss()
            value.backward()
        losses[name], peaks[name] = value.item(), live.peak
    seconds = in_turns({name: _backward(loss) for name, loss in sides.items()}, a.rounds)
    return {"seconds": seconds, "losses": losses, "bytes": peaks}


def _backward(loss: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: loss().backward()


def packing(a: argparse.Namespace) -> dict:
    """Seconds of forward and backward over the first step's examples in each way, in equally many passes.

    Beside them the losses and the positions of each way.
    """
    model = made("sorsa", a)
    name, examples = next(iter(data(a.data, 4 * a.global_batch).items()))
    examples = copy.deepcopy(examples)
    for example in examples:  # the shape may have a smaller vocabulary than the tokenizer
        example["input_ids"] %= model.config.vocab_size
        example["labels"][example["labels"] != IGNORED] %= model.config.vocab_size
    order = GlobalOrder.of_run(ShuffledPasses(len(examples), seed=0), a.global_batch)
    lengths = [len(example["input_ids"]) for example in examples]
    chosen = [order.index(place) for place in range(a.global_batch)]
    rows = balanced([lengths[index] for index in chosen], a.global_batch // a.micro_batch)
    plans = {
        "random": order.micro_batches(0, 0, 1, a.micro_batch),
        "grouped": order.micro_batches(0, 0, 1, a.micro_batch, lengths.__getitem__),
        "packed": [[chosen[i] for i in row] for row in rows],
    }
    device = this_device()
    batches = {
        way: [
            {key: value.to(device) for key, value in collated([examples[i] for i in indices], way).items()}
            for indices in plan
        ]
        for way, plan in plans.items()
    }
    losses = dict.fromkeys(plans, 0.0)

    def side(way: str) -> Callable[[], None]:
        def run() -> None:
            total = 0.0
            for batch in batches[way]:
                loss = summed_loss(model, batch)
                loss.backward()
                total += loss.detach()
            losses[way] = float(total)

        return run

    seconds = in_turns({way: side(way) for way in plans}, a.rounds)
    positions = {way: sum(batch["input_ids"].numel() for batch in found) for way, found in batches.items()}
    return {"seconds": seconds, "losses": losses, "positions": positions, "data": name}


def collated(examples: list, way: str) -> dict[str, Tensor]:
    """A packed row of the examples where the way is `packed`, else a padded micro-batch."""
    return collate_packed([examples], 0) if way == "packed" else collate(examples, 0)


if __name__ == "__main__":
    main()
