"""The engine's step against plain torch: the same numbers on every ZeRO stage, world size, accumulation and clip."""

import pytest
import torch

from benchmarks.helpers.live_bytes import LiveBytes
from benchmarks.helpers.wire import Wire
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
    ten_steps,
    whole_factors,
)
from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow

MORE_CASES = [
    dict(form="norm", reduction="sum", clip=0.05, accumulation=4, coefficient=0.1),
    dict(form="squared", reduction="mean", clip=0.0, accumulation=1, coefficient=0.0),
]
STAGES = [(0, ""), (1, ""), (1, "optimizer"), (2, ""), (2, "optimizer"), (3, ""), (3, "optimizer"), (3, "both")]
RUNS = [(stage, offload, case) for stage, offload in STAGES for case in CASES]
RUNS += [(stage, "", case) for stage in (0, 2, 3) for case in MORE_CASES]
ONE_OF_EACH = [(stage, offload, CASES[number % 2]) for number, (stage, offload) in enumerate(STAGES)]
"""Every stage, with one case: three ranks on two cores take as long for these as two ranks for all."""


def train_with_engine(folder, cases, precision="fp32"):
    """Run every (stage, offload, case) in this world; returns start, end and log of each on rank 0."""
    from sorsa_ds.runtime import collectives

    results = []
    for stage, offload, case in cases:
        bf16 = precision == "bf16"
        ds = ds_config(stage, offload, case["clip"], case["accumulation"], bf16)
        if precision == "mixed":
            ds["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        results.append(ten_steps(build(folder, ds, case, precision), case))
    return results if collectives.rank() == 0 else None


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ten_steps_equal_plain_torch(tiny_llama, world):
    runs = ONE_OF_EACH if world == 3 else RUNS
    results = run_ranks(world, train_with_engine, tiny_llama, runs)[0]
    for (stage, offload, case), (start, end, log) in zip(runs, results, strict=True):
        try:
            compare(tiny_llama, world, case, start, end, log, tolerance=1e-5)
        except AssertionError as error:
            raise AssertionError(f"stage {stage}, offload {offload!r}, {case}: {error}") from error


def train_in_varying_passes(folder, stages):
    """Ten steps of a case with four accumulation steps on each stage, in four, one, two, four, ... passes."""
    from sorsa_ds.runtime import collectives
    from sorsa_ds.train.loss import summed_loss

    case, world, rank = CASES[1], collectives.world_size(), collectives.rank()

    def losses(engine, batch, passes):
        count = sum(int((labels[:, 1:] != -100).sum()) for _, labels in batch)
        own = batch[rank::world]
        for at in range(passes):
            ids, labels = (torch.cat(parts) for parts in zip(*own[at::passes], strict=True))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            yield summed_loss(engine, inputs) * (world * passes / count)

    results = []
    for stage, offload in stages:
        engine = build(folder, ds_config(stage, offload, case["clip"], case["accumulation"]), case)
        start, log = whole_factors(engine), []
        for t in range(STEPS):
            batch, passes = sequences(MICRO * world * case["accumulation"], seed=t), (4, 1, 2)[t % 3]
            log.append(engine.train_step(losses(engine, batch, passes), passes))
        results.append((start, whole_factors(engine), log))
        engine.destroy()
    return results if rank == 0 else None


def test_steps_of_fewer_passes_than_accumulation_steps_are_the_same_steps(tiny_llama):
    results = run_ranks(2, train_in_varying_passes, tiny_llama, STAGES)[0]
    for (stage, offload), (start, end, log) in zip(STAGES, results, strict=True):
        try:
            compare(tiny_llama, 2, CASES[1], start, end, log, tolerance=1e-5)
        except AssertionError as error:
            raise AssertionError(f"stage {stage}, offload {offload!r}: {error}") from error


def _second_backward(folder, case):
    """Ten steps on ZeRO-3 as the published code is built: the regulariser by a backward of its own."""
    import deepspeed

    engine = build(folder, ds_config(3, "", case["clip"], 1), case)
    start = whole_factors(engine)
    engine._regularizer.add_to = lambda masters: None
    factors = [p for n, p in engine.module.named_parameters() if n.endswith((".U", ".V"))]
    for t in range(STEPS):
        for loss in micro_losses(engine, sequences(MICRO, seed=t), 1):
            engine.backward(loss)
            with deepspeed.zero.GatheredParameters(factors):
                terms = [torch.linalg.matrix_norm(p.T @ p - torch.eye(p.shape[1])) for p in factors]
                engine.backward(case["coefficient"] * torch.stack(terms).mean())
            engine.step()
    return start, whole_factors(engine)


def test_a_second_backward_would_lose_the_loss_under_zero3(tiny_llama):
    """Why the gradient is taken in closed form: this trains on something else, and the comparison above sees it."""
    case = {**CASES[0], "clip": 0.0}
    ((start, end),) = run_ranks(1, _second_backward, tiny_llama, case)
    with pytest.raises(AssertionError, match=r"(U|V|s): \d"):
        compare(tiny_llama, 1, case, start, end, [], tolerance=1e-3)


def _most_bytes(folder, stages):
    """The largest number of bytes that building an engine and its first step hold at once, by stage."""
    found = {}
    for stage in stages:
        ds = ds_config(stage, "", 0.0, 1)
        ds["zero_optimization"] |= {"reduce_bucket_size": 10**8, "overlap_comm": True}
        with LiveBytes() as live:
            engine = build(folder, ds, CASES[0])
            engine.train_step(micro_losses(engine, sequences(2 * MICRO), 1))
        found[stage] = live.peak
    return found


def test_buckets_for_gradients_are_not_larger_than_the_gradients(tiny_llama):
    for stage, most in run_ranks(2, _most_bytes, tiny_llama, (1, 2, 3))[0].items():
        assert most < 10 * 2**20, f"stage {stage}"  # the model is 100 KB


def _sent(folder, stages):
    """A step's collectives on each stage, with buckets that fit and with buckets as the JSON has them."""
    from sorsa_ds.engine import engine as room

    found = []
    for fit in (room.fit_buckets, lambda ds, trained: ds):
        room.fit_buckets = fit
        for stage in stages:
            ds = ds_config(stage, "", 0.0, 1)
            ds["zero_optimization"]["reduce_bucket_size"] = 10**6
            engine = build(folder, ds, CASES[0])
            with Wire() as wire:
                engine.train_step(micro_losses(engine, sequences(2 * MICRO), 1))
            found.append([(one.kind, one.nbytes) for one in wire.seen])
    return found


def test_what_is_reduced_together_does_not_change_with_the_buckets(tiny_llama):
    stages = (1, 2, 3)
    found = run_ranks(2, _sent, tiny_llama, stages)[0]
    assert found[: len(stages)] == found[len(stages) :]
    assert all(found)


def test_an_unknown_layout_of_the_masters_is_refused(tiny_llama):
    with pytest.raises(AssertionError, match="elsewhere than is known here|exactly once"):
        run_ranks(2, _round_robin, tiny_llama)


def _round_robin(folder):
    ds = ds_config(2, "", 0.0, 1)
    ds["zero_optimization"]["round_robin_gradients"] = True
    build(folder, ds, CASES[0])


MOVED = 2
"""The first step before which U and V are no longer orthonormal to rounding: the rate of step 0 is 0."""


def _bf16_terms(folder, stages):
    """Per stage: masters at the start, before step MOVED and at the end, what the regulariser adds in step MOVED, and
    Adam's count after the first step."""
    from sorsa_ds.engine.masters import inner_optimizer
    from sorsa_ds.runtime import collectives

    case, results = CASES[0], []
    for stage in stages:
        engine = build(folder, ds_config(stage, "", case["clip"], 1, bf16=True), case, "bf16")
        start, added = whole_factors(engine), {}
        add_to = engine._regularizer.add_to

        def recording(masters, engine=engine, added=added, add_to=add_to):
            mine = [f for f in engine.masters.fragments if any(f.master is master for master in masters)]
            before = [f.gradient().clone() for f in mine]
            add_to(masters)
            if engine.global_steps == MOVED:
                for fragment, old in zip(mine, before, strict=True):
                    added[fragment.name] = (fragment.start, fragment.gradient() - old)

        engine._regularizer.add_to = recording
        for t in range(STEPS):
            if t == MOVED:
                moved = whole_factors(engine)
            engine.train_step(micro_losses(engine, sequences(MICRO * collectives.world_size(), seed=t), 1))
            if t == 0:
                counts = {float(state["step"]) for state in inner_optimizer(engine).state.values()}
        results.append((start, moved, added, counts, whole_factors(engine)))
        engine.destroy()
    return results


@pytest.mark.parametrize("world", [1, 3])
def test_bf16_engine_adds_the_regulariser_in_fp32(tiny_llama, world):
    stages = [0, 1, 2, 3]
    per_rank = run_ranks(world, _bf16_terms, tiny_llama, stages)
    for i, stage in enumerate(stages):
        start, moved, _, counts, end = per_rank[0][i]
        assert counts == {1.0}, f"stage {stage}: Adam starts at {counts}"
        leaves = {n: v.double().requires_grad_() for n, v in moved.items() if n[-1] in "UV"}
        eye = {n: torch.eye(v.shape[1], dtype=torch.float64) for n, v in leaves.items()}
        value = torch.stack([(v.T @ v - eye[n]).norm() for n, v in leaves.items()]).mean()
        expected = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
        for name, gradient in expected.items():
            got = torch.zeros(gradient.numel())
            for rank_results in per_rank:
                if name in rank_results[i][2]:
                    first, term = rank_results[i][2][name]
                    got[first : first + len(term)] = term
            wanted = CASES[0]["coefficient"] * gradient.flatten()
            assert (got - wanted).norm() < 1e-5 * wanted.norm(), f"stage {stage}: {name}"
        # Masters start from the exact fp32 factors, not from their bf16 roundings: columns are orthonormal to fp32.
        for name in leaves:
            v = start[name].double()
            assert (v.T @ v - eye[name]).norm() < 1e-5, f"stage {stage}: {name} was rounded"
        gap = distance_from_plain(tiny_llama, world, CASES[0], start, end)
        assert gap < BF16_GAP, f"stage {stage}: {gap}"


@pytest.mark.parametrize("world", [1, 2])
def test_mixed_precision_ends_where_fp32_does_but_for_rounding(tiny_llama, world):
    runs = [(stage, "", CASES[0]) for stage in (0, 2, 3)]
    results = run_ranks(world, train_with_engine, tiny_llama, runs, "mixed")[0]
    for (stage, _, case), (start, end, _) in zip(runs, results, strict=True):
        gap = distance_from_plain(tiny_llama, world, case, start, end)
        assert gap < BF16_GAP, f"stage {stage}: {gap}"
