"""Engines on tiny models, what they are trained on, and their comparison with plain torch."""

import pytest
import torch

from sorsa_ds.config.schema import AdapterConfig
from sorsa_ds.runtime import digest
from tests.helpers.architectures import exactly
from tests.helpers.reference import plain_model, plain_parameter, train
from tests.helpers.sorsa_models import load_sorsa_model

# No world size above 1 divides the shapes (40, 20, 76) x rank 5 into whole rows everywhere; 3 divides none.
RANK, EXPERT_RANK, STEPS, WARMUP, RATE, MICRO = 5, 3, 10, 2, 3e-3, 2
SORSA = AdapterConfig(rank=RANK, expert_rank=EXPERT_RANK)
"""What is adapted, and at which rank."""

CASES = [
    dict(form="norm", reduction="mean", clip=0.05, accumulation=1, coefficient=0.2),
    dict(form="squared", reduction="sum", clip=0.0, accumulation=4, coefficient=0.7),
]


def sequences(count: int, seed: int = 1):
    """Random sequences of unequal numbers of learned tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(0, 64, (1, 12), generator=generator)
        labels = ids.clone()
        labels[:, : int(torch.randint(1, 11, (1,), generator=generator))] = -100
        made.append((ids, labels))
    return made


def ds_config(stage: int, offload: str, clip: float, accumulation: int, bf16: bool = False) -> dict:
    """What `sorsa_ds.config.deepspeed_json` would make of it, by hand."""
    zero = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload == "both":
        zero["offload_param"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": MICRO, "gradient_accumulation_steps": accumulation, "gradient_clipping": clip,
        "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    if bf16:
        config["bf16"] = {"enabled": True}
        if stage:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def build(
    folder, ds: dict, case: dict, precision: str = "fp32", storage=None, checkpointing: bool = False, adapter=SORSA,
    optimizer="fused", rates=None,
):  # fmt: skip
    """A SorsaEngine on the tiny model, from disk, as the trainer makes it. optimizer: `fused`, or `8bit` moments."""
    from sorsa_ds.engine.engine import SorsaEngine
    from sorsa_ds.engine.optimizers import adamw, adamw_8bit
    from sorsa_ds.engine.schedules import cosine_with_warmup
    from sorsa_ds.model.sharding import Whole, Zero3
    from sorsa_ds.runtime.precision import resolve_precision
    from sorsa_ds.sorsa.regularizer import Regularizer
    from sorsa_ds.train.setup import checkpoint_activations

    device = torch.device("cpu")
    stage3 = ds["zero_optimization"]["stage"] == 3
    loaded = load_sorsa_model(
        folder, adapter=adapter,
        precision=resolve_precision(precision, None, "cpu"),
        placement=Zero3(ds, device) if stage3 else Whole(device), device=device, factor_source=exactly,
        storage=storage,
    )  # fmt: skip
    if checkpointing:
        checkpoint_activations(loaded.model)
    regularizer = Regularizer(case["form"], case["reduction"], case["coefficient"], case.get("reorthonormalize", 0))
    make = {"fused": adamw, "8bit": adamw_8bit}[optimizer]
    return SorsaEngine(
        loaded.model, ds, make(RATE, (0.9, 0.999), 1e-8, 0.0), cosine_with_warmup(STEPS, WARMUP), regularizer,
        loaded.exact_factors, rates,
    )  # fmt: skip


def whole_factors(engine) -> dict[str, torch.Tensor]:
    """All masters, whole, on rank 0."""
    mine = {f.name: f for f in engine.masters.fragments}
    return {
        name: engine.masters.full(name, shape, mine.get(name), engine.device)
        for name, shape in engine.trained_shapes.items()
    }


def micro_losses(engine, batch, accumulation):
    """This rank's micro-batch losses of one global batch, scaled to the mean over the batch's learned tokens."""
    from sorsa_ds.runtime import collectives
    from sorsa_ds.train.loss import summed_loss

    world, rank = collectives.world_size(), collectives.rank()
    count = sum(int((labels[:, 1:] != -100).sum()) for _, labels in batch)
    for micro in range(accumulation):
        first = (micro * world + rank) * MICRO
        ids, labels = (torch.cat(parts) for parts in zip(*batch[first : first + MICRO], strict=True))
        yield summed_loss(engine, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}) * (
            world * accumulation / count
        )


def ten_steps(engine, case):
    """Train on the sequences of `compare`, and destroy the engine; returns factors before and after, and the log."""
    from sorsa_ds.runtime import collectives

    start, log = whole_factors(engine), []
    for t in range(STEPS):
        batch = sequences(MICRO * collectives.world_size() * case["accumulation"], seed=t)
        log.append(engine.train_step(micro_losses(engine, batch, case["accumulation"])))
    end = whole_factors(engine)
    engine.destroy()
    return start, end, log


_TRAINED: dict[tuple, tuple] = {}


def trained_plainly(folder, world, case, start, residuals=None):
    """The plain program's model and figures after its steps from `start`, on the sequences of the engines.

    Engines of all stages begin with the same factors, so one plain run stands for them; it is kept.
    """
    tensors = [*sorted(start.items()), *sorted((residuals or {}).items())]
    begun = digest.of_bytes(b"".join(name.encode() + value.numpy().tobytes() for name, value in tensors))
    key = folder, world, tuple(sorted(case.items())), begun
    if key not in _TRAINED:
        names = {name.rpartition(".")[0] for name in start}
        factors = {name: tuple(start[f"{name}.{leaf}"] for leaf in ("U", "s", "V")) for name in names}
        model = plain_model(folder, factors, residuals)
        count = MICRO * world * case["accumulation"]
        log = train(
            model, [sequences(count, seed=t) for t in range(STEPS)], rate=RATE, clip=case["clip"],
            coefficient=case["coefficient"], form=case["form"], reduction=case["reduction"], steps=STEPS,
            warmup=WARMUP,
        )  # fmt: skip
        _TRAINED[key] = model, log
    return _TRAINED[key]


def compare(folder, world, case, start, end, log, tolerance, residuals=None):
    """Train the plain program from the same start on the same sequences, and compare everything."""
    model, plain_log = trained_plainly(folder, world, case, start, residuals)
    for name, value in end.items():
        expected = plain_parameter(model, name)
        gap = (value - expected).norm() / expected.norm()
        assert gap < tolerance, f"{name}: {gap:.2e}"
        assert (value - start[name]).norm() > 100 * tolerance * expected.norm() or name.endswith(".s"), "did not move"
    for ours, theirs in zip(log, plain_log, strict=bool(log)):
        assert ours.grad_norm == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours.reg_loss == pytest.approx(theirs["reg_loss"], rel=1e-4, abs=1e-9)


BF16_GAP = 0.07
"""How far ten steps in bf16 may end from those in fp32, relative to the way they went (0.034 to 0.038 measured): bf16
rounds the factors' products to 2^-9, and Adam turns a gradient's relative error into one of its updates."""


def distance_from_plain(folder, world, case, start, end):
    """||end - plain end|| / ||plain end - start|| over all trained numbers, plain being fp32."""
    model, _ = trained_plainly(folder, world, {**case, "accumulation": 1}, start)
    moved = torch.cat([(end[n] - start[n]).flatten() for n in end])
    plain = torch.cat([(plain_parameter(model, n) - start[n]).flatten() for n in end])
    return ((moved - plain).norm() / plain.norm()).item()


INPUT = torch.arange(1, 25).view(2, 12) % 64


def logits_and_gradients(model, ds):
    """Run a model in a DeepSpeed engine; returns its logits at step 0, and gradient norms after one backward."""
    import deepspeed

    trainable = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=ds, optimizer=torch.optim.AdamW(trainable))
    engine.eval()
    with torch.no_grad():
        logits = engine(INPUT).logits
    engine.train()
    engine.backward(engine(INPUT).logits.float().logsumexp(-1).mean())
    norms = [deepspeed.utils.safe_get_full_grad(p).norm().item() for p in trainable]
    engine.destroy()
    return logits, norms
