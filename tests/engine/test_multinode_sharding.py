"""Frozen tensors cut inside a node only (`zero_hpz_partition_size`): the same training, and less between nodes.

A node of one rank and nodes of two, on gloo: DeepSpeed groups ranks by their numbers alone.
"""

import json
import math
import os
from dataclasses import replace

import pytest
import torch

from benchmarks.helpers.wire import Wire
from sorsa_ds.config import deepspeed_json as settings
from sorsa_ds.plan.advice import Way, advice
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import HEADROOM, memory
from sorsa_ds.plan.model_facts import facts
from sorsa_ds.plan.traffic import traffic
from tests.helpers.engines import (
    BF16_GAP,
    CASES,
    MICRO,
    STEPS,
    build,
    compare,
    distance_from_plain,
    ds_config,
    micro_losses,
    sequences,
    whole_factors,
)
from tests.helpers.plans import job_of
from tests.helpers.projects import ROOT, metrics
from tests.helpers.residuals import PACKED, packed_of, residuals_by_hand
from tests.helpers.runs import rewound, train_rank, trained
from tests.helpers.worlds import run_ranks

NODES = pytest.mark.parametrize(("world", "size"), [(2, 1), (4, 2)])
NOTHING_STAYS = {
    "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}  # fmt: skip
SMALL_ONES_STAY: dict = {}  # DeepSpeed's defaults: all parameters of so small a model
OFFLOADED = {name: {"device": "cpu"} for name in ("offload_param", "offload_optimizer")}
RUNS = [
    # precision, storage, gradient checkpointing, case, further ZeRO settings
    ("fp32", None, False, CASES[0], NOTHING_STAYS),
    ("fp32", None, False, CASES[0], NOTHING_STAYS | OFFLOADED),
    ("fp32", "nf4", True, CASES[1], SMALL_ONES_STAY),
    ("mixed", "nf4", False, CASES[0], NOTHING_STAYS),
    ("bf16", "nf4", True, CASES[0], NOTHING_STAYS),
    ("bf16", None, False, CASES[0], NOTHING_STAYS),
    ("mixed", None, True, CASES[0], SMALL_ONES_STAY),
]


def engine_of(folder, size, precision="fp32", storage=None, checkpointing=False, case=CASES[1], zero=NOTHING_STAYS):
    """An engine under ZeRO-3, frozen tensors cut among `size` ranks; None: among all."""
    ds = ds_config(3, "", case["clip"], case["accumulation"], bf16=precision == "bf16")
    ds["zero_optimization"] |= zero | ({} if size is None else {"zero_hpz_partition_size": size})
    if precision == "mixed":
        ds["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return build(folder, ds, case, precision, PACKED.get(storage), checkpointing)


def step(engine, number, case=CASES[1]):
    """An optimizer step on a batch of its own."""
    batch = sequences(MICRO * torch.distributed.get_world_size() * case["accumulation"], seed=number)
    return engine.train_step(micro_losses(engine, batch, case["accumulation"]))


def held_loss(engine):
    """The loss of a batch without gradients, between steps: as an evaluation, or the check of the start."""
    with torch.no_grad():
        return torch.stack(list(micro_losses(engine, sequences(MICRO * 4, seed=99), 1))).sum().item()


def _train_both(folder, size, runs):
    """Runs, first with frozen tensors cut inside nodes, then among all ranks: on rank 0, start, end, losses between
    the steps, log, and the packed tensors."""
    import deepspeed

    results = []
    for precision, storage, checkpointing, case, zero in runs:
        pair = []
        for cut in (size, None):
            engine = engine_of(folder, cut, precision, storage, checkpointing, case, zero)
            start, log, losses = whole_factors(engine), [], [held_loss(engine)]
            for number in range(STEPS):
                log.append(step(engine, number, case))
                losses.append(held_loss(engine))
            end = whole_factors(engine)
            with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
                frozen = packed_of(engine.module)
            pair.append((start, end, losses, log, frozen))
            engine.destroy()
        results.append(pair)
    return results


@pytest.mark.slow
@NODES
def test_training_is_that_of_plain_zero3_and_of_plain_torch(tiny_llama, world, size):
    runs = RUNS if world == 2 else RUNS[::3]  # four ranks on two cores take long
    results = run_ranks(world, _train_both, tiny_llama, size, runs)[0]
    for run, (ours, theirs) in zip(runs, results, strict=True):
        precision, storage, _, case, _ = run
        start, end, losses, log, packed = ours
        for name, tensor in theirs[1].items():
            assert torch.equal(end[name], tensor), f"{run}: {name} differs from plain ZeRO-3's"
        assert losses == theirs[2], f"{run}: losses between the steps"
        assert [s.grad_norm for s in log] == [s.grad_norm for s in theirs[3]], run
        assert len(set(losses[1:])) == STEPS, f"{run}: an evaluation saw factors of an earlier step"
        residuals = residuals_by_hand(packed, start) if storage else None
        try:
            if precision == "fp32":
                compare(tiny_llama, world, case, start, end, log, tolerance=1e-5, residuals=residuals)
            elif storage is None:
                assert distance_from_plain(tiny_llama, world, case, start, end) < BF16_GAP
        except AssertionError as error:
            raise AssertionError(f"{run}: {error}") from error


def padded_bytes(parameters, blocks):
    """Bytes of parameters that are each cut into so many equal blocks."""
    return sum(-(-p.ds_numel // blocks) * blocks * p.ds_tensor.itemsize for p in parameters)


def _count(folder, size, storage, checkpointing):
    """By how frozen tensors are cut: what crosses the wire in a step and in two evaluations after it, by kind, over all
    ranks and inside this node; what this rank holds."""
    world, found = torch.distributed.get_world_size(), {}
    for cut in (size, None):
        engine = engine_of(folder, cut, storage=storage, checkpointing=checkpointing)
        factors = [p for p in engine.module.parameters() if p.requires_grad]
        frozen = [p for p in engine.module.parameters() if not p.requires_grad]
        step(engine, 0)
        with Wire() as training:
            step(engine, 1)
        with Wire() as evaluating:
            held_loss(engine)
            held_loss(engine)
        assert all(p.ds_secondary_tensor is None for p in frozen), "a frozen tensor is held twice"
        blocks = {"frozen": [p.ds_tensor for p in frozen], "factors": [p.ds_tensor for p in factors]}
        if cut:
            blocks["secondary"] = [p.ds_secondary_tensor for p in factors]
        found[cut] = {
            "wires": [(wire.bytes_by_kind(world), wire.bytes_by_kind(size)) for wire in (training, evaluating)],
            "groups": training.ranks() | evaluating.ranks(),
            "held": {name: sum(t.nbytes for t in tensors if t is not None) for name, tensors in blocks.items()},
            "factors": padded_bytes(factors, world),
            "frozen": padded_bytes(frozen, cut or world),
        }
        engine.destroy()
    return found


GRAMS = 8 * 14 * 2 * 5**2
"""Bytes of the Gram matrices, in fp64; on 2 and 4 ranks no row of a factor is cut."""


@pytest.mark.slow
@NODES
@pytest.mark.parametrize(("storage", "checkpointing"), [("auto", False), ("nf4", True)])
def test_between_nodes_travel_gradients_factors_once_a_step_and_gram_matrices(
    tiny_llama,
    world,
    size,
    storage,
    checkpointing,
):
    case = CASES[1]
    job = job_of(
        3, storage=storage, gpus=size, nodes=world // size, zero={"zero_hpz_partition_size": "auto"},
        gradient_accumulation_steps=case["accumulation"], gradient_checkpointing=checkpointing,
    )  # fmt: skip
    model = facts(tiny_llama, job)
    planned, moved, share = memory(job, model).gpu, traffic(job, model), (world // size - 1) / (world // size)
    for rank, found in enumerate(run_ranks(world, _count, tiny_llama, size, storage, checkpointing)):
        ours, plain = found[size], found[None]
        factors, (between, inside), (evaluated, _) = ours["factors"], *ours["wires"]
        assert between == {
            "_allgather_base_": factors,
            "_reduce_scatter_base_": case["accumulation"] * factors,
            "allreduce_": GRAMS + 8,  # and the gradient's norm
        }
        assert evaluated == {"_allgather_base_": factors}, "two evaluations after a step"
        plain_between, plain_gathered = plain["wires"][0][0], plain["wires"][0][0]["_allgather_base_"]
        assert plain_gathered > 2 * case["accumulation"] * plain["frozen"], "there the residual travels all the time"
        assert {**plain_between, "_allgather_base_": factors} == between
        assert plain["held"]["frozen"] * world == plain["frozen"]
        node = tuple(range(rank // size * size, rank // size * size + size))
        assert ours["groups"] == {tuple(range(world)), node} - {(rank,)}

        held = ours["held"]
        assert held == {"frozen": ours["frozen"] // size, "factors": factors // world, "secondary": factors // size}
        assert planned["residual"] + planned["frozen"] == held["frozen"]
        assert (planned["trained"], planned["secondary"]) == (held["factors"], held["secondary"])
        gradients, grams = between["_reduce_scatter_base_"], 2 * GRAMS
        crossing = {"trained parameters": factors, "gradients": gradients, "Gram matrices": grams}
        crossing = {name: share * size_all for name, size_all in crossing.items()}
        assert moved.between == pytest.approx(crossing, rel=0.01)  # factors are filled up to equal blocks
        if size > 1:
            assert set(inside) == {"_allgather_base_"}
            if plain["frozen"] == ours["frozen"]:  # else blocks are filled up differently
                assert inside["_allgather_base_"] + factors == plain_gathered
            gathered = moved.inside["frozen parameters"] + moved.inside["trained parameters"]
            once = moved.between["trained parameters"]
            gathered -= once * (world - 1) / world / share - once / size
            received = inside["_allgather_base_"] * (size - 1) / size
            # What was gathered last is still there for its backward (tests/plan); a tied head comes once more.
            assert (0.8 if checkpointing else 0.95) * gathered < received <= 1.05 * gathered


def test_what_does_not_fit_is_advised_to_be_cut_over_all_ranks(tiny_llama):
    inside = job_of(3, gpus=2, nodes=8, zero={"zero_hpz_partition_size": "auto", "reduce_bucket_size": 10**8})
    model, file = facts(tiny_llama, inside), settings.read_ds_config(ROOT / "ds_configs" / "zero3.json")
    over_all = memory(Job.of(inside.config, file, inside.hardware), model)
    assert memory(inside, model).total > over_all.total
    tight = replace(inside, hardware=replace(inside.hardware, gpu_memory=math.ceil(over_all.total / (1 - HEADROOM))))
    way = Way("--ds_config ds_configs/zero3.json", over_all.total, 2 * over_all.total_host)
    assert way in advice(tiny_llama, tight)


def _ranks_of_each_node():
    """What is found where the launcher says 2, another number to each rank, or nothing."""
    from sorsa_ds.runtime.process import ranks_of_each_node

    found = []
    for said in ("2", os.environ["RANK"], None):
        for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
            os.environ.pop(name, None)
        if said is not None:
            os.environ["LOCAL_WORLD_SIZE"] = said
        found.append(ranks_of_each_node())
    return found


@pytest.mark.slow
def test_nodes_of_unequal_or_unknown_size_are_seen_on_every_rank():
    assert run_ranks(2, _ranks_of_each_node) == [[2, 0, 0]] * 2


def _run(project, name, ds, arguments, stop_at, node_ranks):
    """One rank of a run of the real trainer, on a node of so many ranks."""
    os.environ["LOCAL_WORLD_SIZE"] = str(node_ranks)
    return train_rank(project, name, ds, ["train.steps=6", "output.save_every=2", *arguments], stop_at)


@pytest.mark.slow
@NODES
def test_a_run_saves_and_goes_on_to_and_from_plain_zero3(project, world, size):
    """The whole command: the check of the start, evaluations, checkpoints, factors at the end."""
    settings = ["train.eval_every=2", "output.keep_checkpoints=9"]

    def run(name, *more, nodes, stop_at=None):
        ds, node_ranks = ("zero3_multinode", size) if nodes else ("zero3", world)
        run_ranks(world, _run, project, name, ds, [*settings, *more], stop_at, node_ranks)
        zero = json.loads((project / name / "ds_config.json").read_text())["zero_optimization"]
        assert zero.get("zero_hpz_partition_size") == (size if nodes else None)
        return project / name

    plain = run(f"plain-{world}", nodes=False)
    whole = run(f"nodes-{world}", nodes=True)
    there = rewound(project, plain, f"there-{world}", 2)
    run(there.name, "--resume=auto", nodes=True, stop_at=4)
    run(there.name, "--resume=auto", nodes=False)
    back = rewound(project, whole, f"back-{world}", 4)
    run(back.name, "--resume=auto", nodes=False)
    for path in (whole, there, back):
        for key in ("loss", "eval_loss"):
            assert metrics(path, key) == metrics(plain, key), f"{path.name}: {key}"
        for name, tensor in trained(plain).items():
            assert torch.equal(trained(path)[name], tensor), f"{path.name}: {name}"
