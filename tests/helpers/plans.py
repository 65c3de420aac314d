"""Jobs to plan for the tiny model, and the bytes that a real engine holds."""

import weakref
from collections import Counter

import torch

from sorsa_ds.config.schema import DataConfig, ResidualConfig, RunConfig, SorsaConfig, TrainConfig
from sorsa_ds.model.packed_attention import packed_attention
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from tests.helpers.engines import MICRO


def job_of(stage, precision="fp32", storage="auto", gpus=1, nodes=1, length=12, zero=None, **train) -> Job:
    """A job for the tiny model as `tests.helpers.engines.build` builds it."""
    config = RunConfig(
        sorsa=SorsaConfig(rank=5), residual=ResidualConfig(storage=storage), data=DataConfig(max_length=length),
        train=TrainConfig(precision=precision, micro_batch_size=MICRO, **train),
    )  # fmt: skip
    given = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **(zero or {})}}
    return Job.of(config, given, Hardware(gpus=gpus, nodes=nodes))


def fake_gpu(monkeypatch, total: int, free: int, held: int = 0) -> None:
    """Let the plan of a run find a GPU of so many bytes; everything is computed on the CPU all the same."""
    monkeypatch.setattr("sorsa_ds.plan.check.device_type", lambda: "cuda")
    monkeypatch.setattr("sorsa_ds.plan.check.this_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free, total))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: held)


def bytes_by_kind(engine) -> dict[str, int]:
    """Bytes of this rank's tensors after a step."""
    from sorsa_ds.engine.masters import inner_optimizer

    found: Counter = Counter()
    places = {"residual": set(), "frozen": set(), "trained": set()}
    for name, p in engine.module.named_parameters():
        kind = "trained" if p.requires_grad else "residual" if ".residual" in name else "frozen"
        tensor = getattr(p, "ds_tensor", p.data)
        storage = tensor.untyped_storage()
        if kind != "trained" or hasattr(p, "ds_tensor"):
            found[kind] += tensor.nbytes
        elif storage.data_ptr() not in places[kind]:  # stages 1 and 2: views of one flat tensor
            places[kind].add(storage.data_ptr())
            found[kind] += storage.nbytes()
    state = inner_optimizer(engine).state
    for master in {id(f.master): f.master for f in engine.masters.fragments}.values():
        if master.untyped_storage().data_ptr() not in places["trained"]:
            found["masters"] += master.nbytes
        found["moments"] += sum(state[master][name].nbytes for name in ("exp_avg", "exp_avg_sq"))
    return dict(found)


def bytes_saved(engine, length: int, packed: bool = False) -> int:
    """Bytes that autograd holds at the end of a forward pass without the loss, each tensor once.

    packed: whether each sequence is a full row of examples.
    """
    held = weakref.WeakSet()

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            held.add(self)

    ids = torch.zeros(MICRO, length, dtype=torch.int64)
    # With padding, as the batches of a run: without any, k and v would not be repeated for every head.
    inputs = {"attention_mask": (ids + torch.arange(length) < length - 3).long()}
    if packed:
        inputs = packed_attention(engine.module, ids + torch.arange(length) % (length // 4))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        output = engine(input_ids=ids, **inputs, use_cache=False)
    storages = {(s := kept.tensor.untyped_storage()).data_ptr(): s.nbytes() for kept in held}
    del output
    return sum(size for place, size in storages.items() if place not in {p.data_ptr() for p in engine.parameters()})
