"""Micro-batches cut for sequence parallelism (`sorsa_ds.model.sequence_parallel`), and a check that cutting is exact.

Shapes: B sequences, L positions, S positions of a shard.
"""

import torch
from torch import Tensor, nn

from sorsa_ds.config.batch_size import shard_length
from sorsa_ds.data.tokenize import IGNORED
from sorsa_ds.model.packed_attention import known_rows
from sorsa_ds.model.sequence_parallel import SequenceParallel
from sorsa_ds.runtime import collectives
from sorsa_ds.train.padding import Padding, is_rounding, logits_move
from sorsa_ds.train.tried_model import eval_mode, model_of

PROBED = 8
"""How many tokens each rank of a group computes both ways at the start of a run."""


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
    length = shard_length(batch["input_ids"].shape[1], sequence.size)
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
    engine: nn.Module, sequence: SequenceParallel, device: torch.device, precision: str, padding: Padding
) -> None:
    """Compare the logits of tokens that ranks compute together with those that each computes alone. A collective call.

    What a model's structure does not show is seen here: another way by which tokens reach others than attention, or
    positions that the model does not take from its caller. Nothing happens without sequence parallelism.

    Args:
        precision: the run's, `train.precision`.
        padding: what the model needs for the sake of right padding.

    Raises:
        ValueError: the logits differ by more than rounding does, or the model needs a mask.
    """
    if sequence.size == 1:
        return
    model = model_of(engine)
    name = f"train.sequence_parallel={sequence.size}: {type(model).__name__}"
    if padding is Padding.MASK:
        raise ValueError(f"{name} needs a mask where its sequences are padded, and shards have none; set it to 1")
    vocabulary = model.config.get_text_config().vocab_size
    same = torch.Generator().manual_seed(0)  # on all ranks
    ids_BL = torch.randint(vocabulary, (1, PROBED * sequence.size), generator=same)
    mask_BL = torch.ones_like(ids_BL)
    mine = shard({"input_ids": ids_BL, "attention_mask": mask_BL, "labels": ids_BL}, sequence)
    with eval_mode(engine), known_rows(packed=False):
        together = engine(input_ids=mine["input_ids"].to(device), use_cache=False).logits[0].float()
        with sequence.whole():
            alone = engine(input_ids=ids_BL.to(device), use_cache=False).logits[0].float()
    first = sequence.rank * PROBED
    move = max(collectives.gather_lists([logits_move(together, alone[first : first + PROBED], precision)]))
    if not is_rounding(move, precision):
        raise ValueError(
            f"{name} gives logits in shards that differ by {move:.1%} from those of the whole sequence: its tokens "
            f"reach one another by another way than attention, or its positions are its own; set it to 1"
        )
