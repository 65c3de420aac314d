"""Jobs to plan for the tiny model, and the bytes that a real engine holds."""

import weakref
from collections import Counter

import pytest
import torch

from benchmarks.helpers.flops import flop_counter
from sorsa_ds.config.schema import AdapterConfig, DataConfig, ResidualConfig, RunConfig, TrainConfig
from sorsa_ds.model.packed_attention import packed_attention
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.sorsa.residual_storage import storage_of
from tests.helpers.engines import CASES, EXPERT_RANK, MICRO, build, ds_config, micro_losses, sequences


def job_of(
    stage, precision="fp32", storage="auto", gpus=1, nodes=1, length=12, zero=None, packing=False, **train
) -> Job:
    """A job for the tiny model as `tests.helpers.engines.build` builds it."""
    config = RunConfig(
        adapter=AdapterConfig(rank=5, expert_rank=EXPERT_RANK), residual=ResidualConfig(storage=storage),
        data=DataConfig(max_length=length, packing=packing),
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
    inputs = {"position_ids": torch.arange(length)[None]}
    if packed:
        inputs = packed_attention(engine.module, ids + torch.arange(length) % (length // 4))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        output = engine(input_ids=ids, **inputs, use_cache=False)
    storages = {(s := kept.tensor.untyped_storage()).data_ptr(): s.nbytes() for kept in held}
    del output
    return sum(size for place, size in storages.items() if place not in {p.data_ptr() for p in engine.parameters()})


def live_bytes(folder, cases):
    """Bytes of this rank's tensors by what they are, for each case, after two steps."""
    from sorsa_ds.runtime import collectives

    results, averaged = [], []
    for stage, precision, storage in cases:
        job = job_of(stage, precision, storage)
        ds = ds_config(stage, "", 0.05, 1, precision == "bf16")
        if precision == "mixed":
            ds["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        engine = build(folder, ds, CASES[0], precision, storage_of(job.config.residual, job.precision))
        engine.flatten = _noting(engine.flatten, averaged)
        for t in range(2):
            engine.train_step(micro_losses(engine, sequences(MICRO * collectives.world_size(), seed=t), 1))
        results.append(bytes_by_kind(engine) | {"bucket": max(averaged, default=0)})
        averaged.clear()
        engine.destroy()
    return results


def _noting(flatten, sizes: list[int]):
    """DeepSpeed's flatten, with the bytes of what it makes noted."""

    def flattened(tensors):
        sizes.append(sum(tensor.nbytes for tensor in tensors))
        return flatten(tensors)

    return flattened


def live_saved(folder, length, precision, packed=False):
    """`bytes_saved` of an engine in this world."""
    ds = ds_config(0, "", 0.0, 1)
    if precision == "mixed":
        ds["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return bytes_saved(build(folder, ds, CASES[0], precision), length, packed)


def live_flops(folder, length):
    """The flops of a step's matrix products, without attention's."""
    engine = build(folder, ds_config(0, "", 0.0, 1), CASES[0])
    ids = torch.zeros(MICRO, length, dtype=torch.int64)
    from sorsa_ds.train.loss import summed_loss

    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with flop_counter() as counter:
        engine.backward(summed_loss(engine, batch))
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))


def live_moved(folder, checkpointing):
    """Bytes that this rank receives in a step under ZeRO-3, from all-gathers and for the Gram matrices."""
    from deepspeed import comm as ds_comm

    from sorsa_ds.runtime import collectives
    from sorsa_ds.train.setup import checkpoint_activations

    counted: Counter = Counter()
    backend = ds_comm.comm.cdb
    ds = ds_config(3, "", 0.0, 2)
    ds["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
                                "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}  # fmt: skip
    engine = build(folder, ds, CASES[0])
    if checkpointing:
        checkpoint_activations(engine.module)
    gather, reduce = backend.all_gather_function, torch.distributed.all_reduce

    def gathered(output_tensor, input_tensor, **options):
        counted["gather"] += output_tensor.nbytes - input_tensor.nbytes
        return gather(output_tensor, input_tensor, **options)

    def reduced(tensor, *arguments, **options):
        if tensor.dtype == torch.float64 and tensor.numel() > 100:
            counted["gram"] += tensor.nbytes
        return reduce(tensor, *arguments, **options)

    backend.all_gather_function = gathered
    torch.distributed.all_reduce = reduced
    try:
        engine.train_step(micro_losses(engine, sequences(2 * MICRO * collectives.world_size()), 2))
    finally:
        backend.all_gather_function, torch.distributed.all_reduce = gather, reduce
    return dict(counted)


def live_gathered(folder, zero, checkpointing):
    """The most bytes of parameters that are whole on this rank at any time of three ZeRO-3 steps, and their names."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    from sorsa_ds.runtime import collectives
    from sorsa_ds.train.setup import checkpoint_activations

    ds = ds_config(3, "", 0.0, 1)
    ds["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, **zero}
    engine = build(folder, ds, CASES[0])
    if checkpointing:
        checkpoint_activations(engine.module)
    parameters, most = dict(engine.module.named_parameters()), (0, [])
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def fetched(*arguments, **options):
        nonlocal most
        fetch(*arguments, **options)
        whole = [name for name, p in parameters.items() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
        nbytes = sum(parameters[name].ds_numel * parameters[name].ds_tensor.element_size() for name in whole)
        most = max(most, (nbytes, whole))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", fetched)
        for t in range(3):
            engine.train_step(micro_losses(engine, sequences(MICRO * collectives.world_size(), seed=t), 1))
    return most
