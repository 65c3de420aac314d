"""MFU: the flops of real steps, counted where PyTorch dispatches them, against the plan's; and the peaks of GPUs."""

import pytest

from sorsa_ds.plan.hardware import Hardware, peak_tflops
from sorsa_ds.plan.speed import ModelFlops
from sorsa_ds.plan.utilisation import Utilisation, peak_of
from tests.helpers.projects import make, settings
from tests.helpers.worlds import run_ranks


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA B200", 2250), ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GH200 480GB", 989),
    ],
)  # fmt: skip
def test_peaks_are_known_by_the_names_that_cuda_gives(name, tflops):
    assert peak_tflops(name) == tflops
    assert peak_tflops(name, tf32=True) == tflops / 2


@pytest.mark.parametrize(
    "name",
    ["a CPU", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "Tesla T4", "NVIDIA L400"],
)
def test_no_peak_is_guessed(name):
    assert peak_tflops(name) is None
    found = peak_of(["NVIDIA H200", name], tf32=False)
    assert found == Utilisation(f"not logged: the peak of {name} is not known")
    assert found.mfu(1, 1, 1, 1.0) is None


def test_the_peak_is_that_of_all_ranks():
    found = peak_of(["NVIDIA H200", "NVIDIA H200", "NVIDIA L4"], tf32=True)
    assert found.peak == (989 + 989 + 121) / 2 * 1e12
    assert found.told == "of 1,049.5 dense TF32 TFLOP/s (NVIDIA H200: 494.5, NVIDIA L4: 60.5 each)"
    assert peak_of(["NVIDIA H200"], tf32=False).peak == Hardware().tflops * 1e12


def test_mfu_is_needed_over_possible():
    flops = ModelFlops(body=100.0, head=10.0, attention=2.0)
    assert Utilisation("", 1e4, flops).mfu(7, 5, 49, 0.5) == pytest.approx((700 + 50 + 98) / (0.5 * 1e4))


def counted_step(project, checkpointing):
    """A real step of a LoRA, which has no regulariser: (flops counted, those of the plan, what the plan does not know).

    The devices get a peak here, so that the run computes MFU. Attention is eager: its products are all counted.
    """
    from benchmarks.helpers.flops import flop_counter
    from sorsa_ds.plan import utilisation
    from sorsa_ds.train.options import parse
    from sorsa_ds.train.setup import assemble
    from tests.helpers.projects import ROOT

    utilisation.peak_tflops = lambda name, tf32: 1e-6  # in this rank's process alone
    trainer = assemble(parse([
        *settings(project, f"counted-{checkpointing}"), "method=lora", "loading.attn_implementation=eager",
        "train.micro_batch_size=1", f"train.gradient_checkpointing={checkpointing}",
        f"--ds_config={ROOT}/ds_configs/stage0.json",
    ]))  # fmt: skip
    trainer.prepare()
    with flop_counter() as counter, trainer.meter.step(0):
        _, ready, _ = trainer.step(0)
    needed = trainer.meter._utilisation.flops
    seconds = ready.tokens / trainer.meter.figures(ready)["tokens_per_second"]
    logged = trainer.meter.figures(ready)["mfu"] * seconds * 1e6
    assert logged == pytest.approx(needed.of_batch(ready.tokens, ready.learned, ready.squares))
    # Eager attention computes the whole square. The first block's input needs no gradient: of q, k and v there.
    first = [t for t in trainer.beginning.loaded.targets if ".layers.0.self_attn" in t.name and "o_proj" not in t.name]
    assert len(first) == 3
    spared = sum(2 * t.out_features * t.in_features + 2 * 4 * t.in_features for t in first)
    whole = needed.of_batch(ready.tokens, ready.learned, 2 * ready.squares)
    return counter.get_total_flops(), whole - ready.tokens * spared, needed.attention * ready.squares / whole


@pytest.mark.slow
def test_a_steps_flops_are_those_that_pytorch_counts(tmp_path):
    project = make(tmp_path)
    [(counted, planned, attention)] = run_ranks(1, counted_step, project, False)
    assert attention > 0.01  # it is seen
    assert planned == pytest.approx(counted, rel=1e-6)
    [(recomputed, again, _)] = run_ranks(1, counted_step, project, True)
    assert again == planned and recomputed > 1.2 * planned  # what is computed once more is not needed
