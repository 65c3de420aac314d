"""AdamW with 8-bit moments: every step is bitsandbytes' on the masters, on every stage; and such a run goes on."""

import pytest
import torch

from sorsa_ds.config.schema import RegularizerConfig, RunConfig, TrainConfig
from sorsa_ds.engine.optimizers import moment_bytes_8bit
from tests.helpers.engines import MICRO, RATE, build, ds_config, micro_losses, sequences
from tests.helpers.projects import metrics
from tests.helpers.runs import rewound, trained
from tests.helpers.runs import train as train_run
from tests.helpers.worlds import run_ranks

CASE = dict(form="squared", reduction="mean", clip=0.05, accumulation=1, coefficient=0.2)
SETUPS = {
    1: [(0, "", False), (1, "", True), (2, "optimizer", False), (3, "", False)],
    2: [(0, "", True), (1, "", True), (2, "optimizer", False), (3, "both", False)],
}
"""Number of ranks -> (ZeRO stage, what is offloaded, whether the model is bf16)."""


def _shadowed(folder, setups):
    """How many updates were compared, to the last bit, with an optimizer of its own; and bytes of moments by master."""
    from bitsandbytes.optim import AdamW8bit

    from sorsa_ds.engine.masters import inner_optimizer
    from sorsa_ds.runtime import collectives

    results = []
    for stage, how, bf16 in setups:
        engine = build(
            folder, ds_config(stage, how, CASE["clip"], 1, bf16), CASE, "bf16" if bf16 else "fp32", optimizer="8bit"
        )
        inner, shadows, compared = inner_optimizer(engine), {}, []

        def before(optimizer, args, kwargs, shadows=shadows):
            for master in optimizer.param_groups[0]["params"]:
                if id(master) not in shadows:
                    shadow = torch.nn.Parameter(master.detach().clone())
                    shadows[id(master)] = AdamW8bit([shadow], lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
                [shadow] = shadows[id(master)].param_groups[0]["params"]
                shadow.grad = master.grad.detach().clone()

        def after(optimizer, args, kwargs, shadows=shadows, compared=compared):
            for master in optimizer.param_groups[0]["params"]:
                one = shadows[id(master)]
                one.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
                one.step()
                [shadow] = one.param_groups[0]["params"]
                compared.append(torch.equal(shadow, master.detach()) and master.grad.count_nonzero().item() > 0)

        inner.register_step_pre_hook(before)
        inner.register_step_post_hook(after)
        for t in range(4):
            engine.train_step(micro_losses(engine, sequences(MICRO * collectives.world_size(), seed=t), 1))
        masters = {id(f.master): f.master for f in engine.masters.fragments}.values()
        names = ("state1", "state2", "absmax1", "absmax2")
        held = [sum(inner.state[m][n].nbytes for n in names if n in inner.state[m]) for m in masters]
        results.append((compared, held, [m.numel() for m in masters], {inner.state[m]["step"] for m in masters}))
        engine.destroy()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world", SETUPS)
def test_every_update_is_bitsandbytes_on_the_masters_and_their_gradients(tiny_llama, world):
    for results in run_ranks(world, _shadowed, tiny_llama, SETUPS[world]):
        for (stage, _, _), (compared, held, numel, steps) in zip(SETUPS[world], results, strict=True):
            assert compared
            assert all(compared), f"stage {stage}"
            assert steps == {4}
            assert held == [moment_bytes_8bit(n) for n in numel]
            if world == 1 and stage:  # elsewhere the tiny model's moments are all in fp32
                assert max(numel) > 4096


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_only_on_the_same_ranks_and_stage(project):
    settings = ["train.optimizer=adamw_8bit", "data.eval_size=6", "adapter.rank=16"]
    run, _ = train_run(project, "eight", *settings)
    again = rewound(project, run, "eight-again", 4)
    train_run(project, again.name, *settings, "--resume=auto")
    assert metrics(again, "loss") == metrics(run, "loss")
    for name, tensor in trained(run).items():
        assert torch.equal(trained(again)[name], tensor), name
    for number, other in enumerate(({"ranks": 3}, {"ds": "zero2"})):
        moved = rewound(project, run, f"eight-moved-{number}", 4)
        with pytest.raises(AssertionError, match="train.optimizer=adamw_8bit can only go on with the number of ranks"):
            train_run(project, moved.name, *settings, "--resume=auto", **other)
    with pytest.raises(AssertionError, match="train.optimizer was 'adamw_8bit' and is now 'adamw'"):
        train_run(project, moved.name, *settings[1:], "train.optimizer=adamw", f"--resume={moved}")


def test_turned_moments_and_8_bits_exclude_each_other():
    with pytest.raises(ValueError, match="regularizer.reorthonormalize=2 turns AdamW's first moments"):
        RunConfig(train=TrainConfig(optimizer="adamw_8bit"), regularizer=RegularizerConfig(reorthonormalize=2))
