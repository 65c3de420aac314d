"""The callback in Hugging Face's Trainer: ten steps are those of the engine and of plain torch; what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.engines import (
    CASES,
    MICRO,
    RANK,
    RATE,
    STEPS,
    WARMUP,
    build,
    compare,
    ds_config,
    sequences,
    ten_steps,
    trained_plainly,
)
from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow

STAGES = (0, 2, 3)
"""ZeRO stages. The Trainer's two groups of parameters are stepped one after the other on stage 2."""


def factors_of(model, initial=False) -> dict[str, torch.Tensor]:
    """Copies of the factors of a PEFT model, under the names that the trainer gives them."""
    from sorsa_ds.peft import SorsaLayer

    return {
        f"{name.removeprefix('base_model.model.')}.{leaf}": getattr(holder["default"], leaf).detach().clone()
        for name, layer in model.named_modules()
        if isinstance(layer, SorsaLayer)
        for holder in [layer.sorsa_initial if initial else layer.sorsa_factors]
        for leaf in ("U", "s", "V")
    }


def trainer_of(folder, case, deepspeed=None, out="/nonexistent", callbacks=None, **arguments):
    """A Trainer that sees in each step the sequences that the engine sees."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from sorsa_ds.peft import SorsaCallback, SorsaConfig
    from sorsa_ds.runtime import collectives

    settings = TrainingArguments(**{
        "output_dir": out, "per_device_train_batch_size": MICRO, "max_steps": STEPS, "learning_rate": RATE,
        "gradient_accumulation_steps": case["accumulation"], "max_grad_norm": case["clip"], "warmup_steps": WARMUP,
        "lr_scheduler_type": "cosine", "train_sampling_strategy": "sequential", "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "deepspeed": deepspeed, **arguments,
    })  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, SorsaConfig(r=RANK, target_modules="all-linear", svd="exact"))
    count = MICRO * collectives.world_size() * case["accumulation"]
    rows = [
        {"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0]), "labels": labels[0]}
        for t in range(STEPS)
        for ids, labels in sequences(count, seed=t)
    ]
    own = SorsaCallback(f"{case['coefficient']}*lr", form=case["form"], reduction=case["reduction"])
    return Trainer(model, settings, train_dataset=rows, callbacks=[own] if callbacks is None else callbacks)


def train(folder, case, deepspeed=None):
    """Ten steps of a Trainer; returns factors before and after, and the log, as `ten_steps` of an engine does."""
    trainer = trainer_of(folder, case, deepspeed)
    start = factors_of(trainer.model, initial=True)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    log = [SimpleNamespace(grad_norm=line.get("grad_norm"), reg_loss=line["l_reg"]) for line in lines]
    return start, whole(trainer, factors_of, deepspeed), log


def whole(trainer, read, deepspeed):
    """The factors after training, gathered where ZeRO-3 has cut them."""
    if deepspeed is None:
        return read(trainer.model)
    import deepspeed as library

    with library.zero.GatheredParameters([p for p in trainer.model.parameters() if p.requires_grad]):
        return read(trainer.model)


def by_itself(folder, cases):
    """In this rank: each case with the Trainer, as if it had been started without a launcher, and with the engine."""
    import os

    from benchmarks.helpers.hf_trainer import LAUNCHER

    engines = [ten_steps(build(folder, ds_config(0, "", case["clip"], case["accumulation"]), case), case)
               for case in cases]  # fmt: skip
    torch.distributed.destroy_process_group()
    launched = {key: os.environ.pop(key) for key in LAUNCHER if key in os.environ}
    trained = [train(folder, case) for case in cases]
    os.environ |= launched
    torch.distributed.init_process_group("gloo")
    return engines, trained


def in_ranks(folder, cases, stages):
    """Each case with DDP, then with DeepSpeed on each stage; on rank 0 the results."""
    from sorsa_ds.runtime import collectives

    results = []
    for case in cases:
        runs = [None] if stages is None else [deepspeed_json(stage, case) for stage in stages]
        results += [train(folder, case, run) for run in runs]
    return results if collectives.rank() == 0 else None


def deepspeed_json(stage, case):
    """What the Trainer is given for a ZeRO stage."""
    return {
        "train_micro_batch_size_per_gpu": MICRO, "gradient_accumulation_steps": case["accumulation"],
        "gradient_clipping": case["clip"], "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip


def test_ten_steps_on_one_device_are_those_of_the_engine_and_of_plain_torch(tiny_llama):
    [(engines, trained)] = run_ranks(1, by_itself, tiny_llama, CASES)
    for case, (_, engine_end, _), (start, end, log) in zip(CASES, engines, trained, strict=True):
        compare(tiny_llama, 1, case, start, end, log, tolerance=1e-5)
        assert len(log) == STEPS
        assert end.keys() == engine_end.keys()
        for name, value in end.items():
            gap = (value - engine_end[name]).norm() / engine_end[name].norm()
            assert gap < 1e-5, f"{name}: {gap:.2e}"


def test_ten_steps_with_ddp_are_those_of_plain_torch(tiny_llama):
    results = run_ranks(2, in_ranks, tiny_llama, CASES, None)[0]
    for case, (start, end, log) in zip(CASES, results, strict=True):
        compare(tiny_llama, 2, case, start, end, log, tolerance=1e-5)


def test_ten_steps_with_deepspeed_are_those_of_plain_torch(tiny_llama):
    results = run_ranks(2, in_ranks, tiny_llama, CASES, STAGES)[0]
    runs = [(case, stage) for case in CASES for stage in STAGES]
    for (case, stage), (start, end, log) in zip(runs, results, strict=True):
        _, plain = trained_plainly(tiny_llama, 2, case, start)
        for ours, theirs in zip(log, plain, strict=True):
            if stage == 0:  # DeepSpeed tells no norm in fp32
                assert ours.grad_norm is None
                ours.grad_norm = theirs["grad_norm"]
        compare(tiny_llama, 2, case, start, end, log, tolerance=1e-5)


def refused(folder):
    """In one rank without a launcher: what the callback says to each thing that it does not support."""
    import os

    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    from benchmarks.helpers.hf_trainer import LAUNCHER
    from sorsa_ds.peft import SorsaCallback, regularised

    torch.distributed.destroy_process_group()
    launched = {key: os.environ.pop(key) for key in LAUNCHER if key in os.environ}
    case, said = CASES[0], {}

    def told(name, act):
        with pytest.raises(ValueError) as error:
            act()
        said[name] = str(error.value)

    plain = trainer_of(folder, case)
    plain.model = plain.model.unload()
    told("nothing", plain.train)
    frozen = trainer_of(folder, case)
    frozen.model.requires_grad_(False)
    told("frozen", lambda: regularised.trained_factors(frozen.model))
    cut = torch.nn.Parameter(torch.ones(4, 2))
    cut.__class__ = type("Cut", (torch.nn.Parameter,), {})
    real, regularised.DTensor = DTensor, cut.__class__
    told("cut", lambda: regularised.regulariser_of_parameters({"layer.U": cut}, None))
    regularised.DTensor = real
    state, regularised.AcceleratorState = (
        regularised.AcceleratorState,
        lambda: SimpleNamespace(distributed_type=DistributedType.FSDP),
    )
    told("fsdp", trainer_of(folder, case).train)
    regularised.AcceleratorState = state
    told("gamma", lambda: SorsaCallback("strong"))
    os.environ |= launched
    torch.distributed.init_process_group("gloo")
    return said


def test_what_it_does_not_support_is_refused_by_name(tiny_llama):
    [said] = run_ranks(1, refused, tiny_llama)
    assert "no SORSA factors that are trained" in said["nothing"]
    assert "is_trainable=True" in said["frozen"]
    assert "layer.U is cut into shards" in said["cut"]
    assert "does not work with FSDP" in said["fsdp"]
    assert "DeepSpeed" in said["fsdp"]
    assert "strong" in said["gamma"]


@pytest.mark.parametrize("unscaled", [True, False])
def test_fp16s_loss_scale_must_be_gone(unscaled):
    """What accelerate's optimizer has in fp16: the Trainer removes the scale as it takes the gradients' norm."""
    from sorsa_ds.peft.callback import _check_unscaled

    parameter = torch.nn.Parameter(torch.ones(3))
    inner, scaler = torch.optim.SGD([parameter]), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((parameter * 2).sum()).backward()
    wrapped = SimpleNamespace(optimizer=inner, scaler=scaler)
    if unscaled:
        scaler.unscale_(inner)
        _check_unscaled(wrapped)
    else:
        with pytest.raises(ValueError, match="fp16's loss scale"):
            _check_unscaled(wrapped)
    _check_unscaled(SimpleNamespace(optimizer=inner, scaler=None))


def test_a_factor_that_no_loss_came_by_is_kept_orthonormal_all_the_same():
    """As in the paper's equation: L_reg is of all layers, whichever the loss has reached."""
    from sorsa_ds.peft import SorsaCallback, regularised

    torch.manual_seed(0)
    U, V = torch.nn.Parameter(torch.randn(6, 2)), torch.nn.Parameter(torch.randn(5, 2))
    U.grad = torch.ones(6, 2)
    callback = SorsaCallback("0.5*lr", form="squared", reduction="sum")
    callback.regularizer = regularised.Regularizer("squared", "sum", 0.5)
    callback._trained = [U, V]
    callback._of_parameters = regularised.regulariser_of_parameters({"a.U": U, "a.V": V}, callback.regularizer)
    callback.on_step_begin(None, None, None)
    callback.on_pre_optimizer_step(None, None, None, optimizer=SimpleNamespace())
    wide = [one.detach().double().requires_grad_() for one in (U, V)]
    value = sum(((one.T @ one - torch.eye(2, dtype=torch.float64)) ** 2).sum() for one in wide)
    value.backward()
    torch.testing.assert_close(U.grad.double(), 1 + 0.5 * wide[0].grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(V.grad.double(), 0.5 * wide[1].grad, rtol=1e-5, atol=1e-5)
    assert callback.l_reg == pytest.approx(value.item())


def without_launcher(act):
    """In one rank: what `act` returns as a program computes it that no launcher has started."""
    import os

    from benchmarks.helpers.hf_trainer import LAUNCHER

    torch.distributed.destroy_process_group()
    launched = {key: os.environ.pop(key) for key in LAUNCHER if key in os.environ}
    found = act()
    os.environ |= launched
    torch.distributed.init_process_group("gloo")
    return found


def with_own_optimizers(folder):
    """In one rank: what the callback makes of gamma with optimizers that bring rates of their own."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from sorsa_ds.peft import SorsaCallback, SorsaConfig

    settings = TrainingArguments(output_dir="/nonexistent", use_cpu=True, report_to="none", max_steps=1)

    def coefficient(split=None, schedule=None, rate=1e-2, arguments=settings, **own):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = get_peft_model(model, SorsaConfig(r=RANK, target_modules="all-linear"))
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": trained}] if split is None else split(trained)
        optimizer = torch.optim.AdamW(groups, lr=rate) if rate is not None else None
        scheduler = schedule(optimizer) if schedule else None
        callback = SorsaCallback(**own)
        trainer = Trainer(model, arguments, callbacks=[callback], optimizers=(optimizer, scheduler))
        trainer.create_optimizer_and_scheduler(1)
        optimizer = SimpleNamespace(optimizer=trainer.optimizer)  # accelerate's is around it
        callback.on_train_begin(arguments, None, None, model=model, optimizer=optimizer)
        return callback.regularizer.coefficient

    def told(**options):
        with pytest.raises(ValueError) as error:
            coefficient(**options)
        return str(error.value)

    def act():
        two = lambda trained: [{"params": trained[:3]}, {"params": trained[3:], "lr": 1e-3}]  # noqa: E731
        apart = lambda trained: [{"params": [*trained]}, {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 1.0}]  # noqa: E731
        cycle = lambda one: torch.optim.lr_scheduler.OneCycleLR(one, max_lr=0.1, total_steps=10)  # noqa: E731
        zero = TrainingArguments(output_dir="/nonexistent", use_cpu=True, report_to="none", learning_rate=0)
        return {
            "own": coefficient(preset="reference"),
            "trainers": coefficient(preset="reference", rate=None),
            "apart": coefficient(preset="reference", split=apart),
            "cycle": coefficient(preset="reference", schedule=cycle),
            "relative": coefficient(split=two),
            "nothing": coefficient(gamma=0, rate=None, arguments=zero),
            "several": told(preset="reference", split=two),
            "zero": told(gamma=4e-4, rate=None, arguments=zero),
        }

    return without_launcher(act)


def test_gamma_is_divided_by_the_rate_that_the_optimizer_trains_with(tiny_llama):
    [found] = run_ranks(1, with_own_optimizers, tiny_llama)
    assert found["own"] == pytest.approx(4e-4 / 1e-2)
    assert found["trainers"] == pytest.approx(4e-4 / 5e-5)
    assert found["apart"] == pytest.approx(4e-4 / 1e-2), "another group, without U and V"
    assert found["cycle"] == pytest.approx(4e-4 / 0.1)
    assert (found["relative"], found["nothing"]) == (0.2, 0.0)
    assert "2 learning rates, and gamma is a number" in found["several"]
    assert "the learning rate is 0, and gamma is a number" in found["zero"]
    assert "gamma='0.2*lr'" in found["zero"]


def numeric_gamma(folder, stages):
    """In each rank: the coefficient after a step under DeepSpeed with a number as gamma."""
    from sorsa_ds.peft import SorsaCallback

    found = []
    for stage in stages:
        own = SorsaCallback(preset="reference", divide_by_accumulation=False)
        trainer_of(folder, CASES[0], deepspeed_json(stage, CASES[0]), callbacks=[own], max_steps=1).train()
        found.append(own.regularizer.coefficient)
    return found


def test_under_deepspeed_gamma_is_divided_by_the_trainers_rate(tiny_llama):
    assert run_ranks(1, numeric_gamma, tiny_llama, STAGES) == [[pytest.approx(4e-4 / RATE)] * len(STAGES)]


def tracked(folder):
    """In one rank: the log's lines as a tracker's callback sees them, before and after it stands behind ours."""
    from transformers import TrainerCallback

    from sorsa_ds.peft import SorsaCallback

    class Tracker(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    def act():
        lines = []
        for moves in (False, True):
            tracker = Tracker()
            trainer = trainer_of(folder, CASES[0], callbacks=[tracker, SorsaCallback()], max_steps=2)
            if moves:
                SorsaCallback.log_to_trackers(trainer)
            trainer.train()
            lines.append([line["l_reg"] for line in tracker.seen if "l_reg" in line])
        plain = trainer_of(folder, CASES[0], callbacks=[])
        with pytest.raises(ValueError, match="give the trainer callbacks"):
            SorsaCallback.log_to_trackers(plain)
        return lines

    return without_launcher(act)


def test_trackers_see_l_reg_where_they_are_to(tiny_llama):
    [(before, after)] = run_ranks(1, tracked, tiny_llama)
    assert before == []
    assert len(after) == 2
