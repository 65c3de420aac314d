"""Micro-batches cut for sequence parallelism (`sorsa_ds.model.sequence_parallel`), and a check that cutting is exact.

Shapes: B sequences, L positions, S positions of a shard.
"""

import torch
from torch import Tensor, nn

from sorsa_ds.data.tokenize import IGNORED
from sorsa_ds.model.sequence_parallel import SequenceParallel
from sorsa_ds.runtime import collectives

CHECKED_TOKENS = 128
"""How many tokens of an example are computed both ways at the start of a run."""

LARGEST_DIFFERENCE, LARGEST_DIFFERENCE_FP32 = 0.05, 1e-3
"""By how much the logits of shards may differ from those of the whole, relatively: by rounding."""


def shard(batch: dict[str, Tensor], sequence: SequenceParallel) -> dict[str, Tensor]:
    """This rank's positions of a collated micro-batch, which is the same on all ranks that compute it together.

    Args:
        batch: input_ids, attention_mask and labels, each (B, L), padded on the right.

    Returns:
        input_ids and attention_mask, (B, S) with S = L / N rounded up, and labels, (B, S + 1). The logits of position i
        are to predict label i + 1, as they are in a whole batch; the last label is the first of the next shard.
    """
    if sequence.size == 1:
        return batch
    length = -(-batch["input_ids"].shape[1] // sequence.size)
    first = sequence.rank * length
    filled = {
        "input_ids": _filled(batch["input_ids"], sequence.size * length, 0),
        "attention_mask": _filled(batch["attention_mask"], sequence.size * length, 0),
        "labels": _filled(batch["labels"], sequence.size * length + 1, IGNORED),
    }
    return {
        name: tensor[:, first : first + length + (name == "labels")].contiguous() for name, tensor in filled.items()
    }


def _filled(tensor_BL: Tensor, length: int, value: int) -> Tensor:
    """A tensor with columns of a value on the right, up to a length."""
    return nn.functional.pad(tensor_BL, (0, length - tensor_BL.shape[1]), value=value)


@torch.no_grad()
def check_shards(
    engine: nn.Module, batch: dict[str, Tensor], sequence: SequenceParallel, device: torch.device, precision: str
) -> None:
    """Compare the logits of a text that ranks compute together with those that each computes alone. A collective call.

    What a model's structure does not show is seen here: another way by which tokens reach others than attention, or
    positions that the model does not take from its caller. Nothing happens without sequence parallelism. The median
    over the positions is compared: where tokens are routed to experts, rounding may send one of them elsewhere.

    Args:
        batch: its longest example is taken; it is the same on all ranks that compute together.
        precision: the run's, `train.precision`.

    Raises:
        ValueError: they differ by more than rounding does.
    """
    if sequence.size == 1:
        return
    mask_BL = batch["attention_mask"].bool()
    longest = int(mask_BL.sum(1).argmax())
    ids_BL = batch["input_ids"][longest, mask_BL[longest]][None, :CHECKED_TOKENS]
    one = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL), "labels": ids_BL}
    mine_BS = shard(one, sequence)["input_ids"].to(device)
    first, real = sequence.rank * mine_BS.shape[1], ids_BL.shape[1]
    training = engine.training
    engine.eval()
    together = engine(input_ids=mine_BS, use_cache=False).logits[0].float()
    with sequence.whole():
        alone = engine(input_ids=ids_BL.to(device), use_cache=False).logits[0].float()
    engine.train(training)
    alone, together = alone[first : first + len(together)], together[: max(0, real - first)]
    gap = ((together - alone).norm(dim=-1) / alone.norm(dim=-1)).median().item() if len(alone) else 0.0
    gap = max(collectives.gather_lists([gap]))
    if not gap <= (LARGEST_DIFFERENCE_FP32 if precision == "fp32" else LARGEST_DIFFERENCE):
        model = getattr(engine, "module", engine)
        raise ValueError(
            f"train.sequence_parallel={sequence.size}: the logits of {type(model).__name__} differ by {gap:.0%} from "
            f"those that one rank computes alone, so its tokens reach one another by another way than attention; set it "
            f"to 1"
        )
