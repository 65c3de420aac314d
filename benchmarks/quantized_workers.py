"""The sides that benchmarks/quantized.py compares, each in fresh processes; rank 0 prints one JSON object last."""

import argparse
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from common import run_side
from transformers import LlamaConfig

from sorsa_ds import cli, comm, digest, residual
from sorsa_ds.assemble import assemble, checkpoint_activations
from sorsa_ds.config import LoadingConfig, ResidualConfig, SorsaConfig
from sorsa_ds.decompose import decompose
from sorsa_ds.embedded import ensure_embedded_model
from sorsa_ds.engine import SorsaEngine, adamw, cosine_with_warmup
from sorsa_ds.factors import factor_source
from sorsa_ds.initialize import SorsaRecipe, fill, parameter_homes
from sorsa_ds.loading import Loaded, load, skeleton
from sorsa_ds.objective import summed_loss
from sorsa_ds.ownership import Item
from sorsa_ds.placement import Whole, Zero3
from sorsa_ds.precision import choose
from sorsa_ds.process import this_device
from sorsa_ds.regularizer import Regularizer
from sorsa_ds.run_folder import read_metrics
from sorsa_ds.surgery import operate, select

RATE, STEPS_AHEAD = 1e-4, 100


def main() -> None:
    """Run the side that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=sorted(SIDES))
    parser.add_argument("--storage", default="nf4")
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128])
    parser.add_argument("--shape", type=Path, help="config.json of a Llama")
    parser.add_argument("--folder", type=Path, help="for the runs")
    arguments = parser.parse_args()
    run_side(SIDES[arguments.what], arguments)


def ds_config(stage: int) -> dict:
    """Mixed precision. Under ZeRO-3 nothing stays gathered, as on a model that needs it."""
    zero = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
                 "stage3_param_persistence_threshold": 0}  # fmt: skip
    return {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "steps_per_print": 10**9,
    }  # fmt: skip


def default_model(storage: str, rank: int, stage: int) -> Loaded:
    """The default model with that residual, factors from the user's cache."""
    device, sorsa, how = this_device(), SorsaConfig(rank=rank), ResidualConfig(storage=storage)
    formats = choose("mixed", None, device.type)
    kept = residual.choose(how, formats, device)
    return load(
        ensure_embedded_model(lambda text: None), loading=LoadingConfig(), sorsa=sorsa, precision=formats,
        placement=Zero3(ds_config(3), device) if stage == 3 else Whole(device), device=device, storage=kept,
        factor_source=factor_source(sorsa, how, kept, formats),
    )  # fmt: skip


def engine_of(model: torch.nn.Module, stage: int) -> SorsaEngine:
    """The trainer's engine around a model."""
    return SorsaEngine(
        model, ds_config(stage), adamw(RATE, (0.9, 0.999), 1e-8, 0.0), cosine_with_warmup(STEPS_AHEAD, 0),
        Regularizer("norm", "mean", 0.2), {},
    )  # fmt: skip


def batch_of(length: int, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    """One sequence of random tokens, all of them learned; another one on each rank."""
    generator = torch.Generator().manual_seed(comm.rank())
    ids = torch.randint(0, vocabulary, (1, length), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def live_bytes(a: argparse.Namespace) -> dict:
    """Bytes of the residuals' blocks on every rank under ZeRO-3, and the loss of quantising."""
    loaded = default_model(a.storage, a.rank, 3)
    held = sum(p.ds_tensor.nbytes for name, p in loaded.model.named_parameters() if ".residual" in name)
    losses = [report.loss for report in loaded.reports if report.loss]
    numbers = sum(target.out_features * target.in_features for target in loaded.targets)
    return {
        "bytes": comm.gather_lists([held]), "numbers": numbers,
        "error": statistics.fmean(x.error for x in losses) if losses else None,
        "plain_error": statistics.fmean(x.plain_error for x in losses) if losses else None,
    }  # fmt: skip


def gathered_bytes(a: argparse.Namespace) -> dict:
    """Bytes by dtype that this rank's all-gathers deliver in one step under ZeRO-3."""
    counted: Counter = Counter()
    gather = torch.distributed.all_gather_into_tensor

    def counting(output_tensor, input_tensor, **options):
        counted[str(output_tensor.dtype)] += output_tensor.nbytes
        return gather(output_tensor, input_tensor, **options)

    loaded = default_model(a.storage, a.rank, 3)
    engine = engine_of(loaded.model, 3)
    batch = batch_of(a.lengths[0], loaded.model.config.vocab_size, engine.device)
    from deepspeed import comm as ds_comm

    backend = ds_comm.comm.cdb
    assert backend.all_gather_function is gather, "DeepSpeed gathers with another function"
    backend.all_gather_function = counting
    engine.train_step([summed_loss(engine, batch) / a.lengths[0]])
    backend.all_gather_function = gather
    assert counted, "nothing was gathered"
    return counted


def step_seconds(a: argparse.Namespace) -> dict:
    """Median seconds of a step of one sequence, the sides in turns in one process: bf16, quantised, PEFT's QLoRA."""
    engines = {storage: engine_of(default_model(storage, a.rank, 0).model, 0) for storage in ("bf16", a.storage)}
    device = this_device()
    sides = {}
    for storage, engine in engines.items():
        sides[storage] = lambda batch, engine=engine: engine.train_step([summed_loss(engine, batch) / a.lengths[0]])
    sides["qlora"] = qlora_step(a, device)
    batch = batch_of(a.lengths[0], 1000, device)
    seconds: dict = {name: [] for name in sides}
    for step in range(a.steps + 1):
        for name, side in sides.items():
            synchronise()
            began = time.perf_counter()
            side(batch)
            synchronise()
            if step:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def train(a: argparse.Namespace) -> dict:
    """A training run of the default model and data with that residual: its losses and its report."""
    settings = [
        f"--ds_config={Path(__file__).parents[1] / 'ds_configs/zero2.json'}", f"output.folder={a.folder}",
        f"output.name={a.storage}", "output.save_every=0", f"sorsa.rank={a.rank}", "train.precision=mixed",
        f"train.learning_rate={a.learning_rate}",
        f"residual.storage={a.storage}", f"residual.iterations={a.iterations}",
        *([] if a.steps is None else [f"train.steps={a.steps}"]),
    ]  # fmt: skip
    report = assemble(cli.parse(settings)).train()
    losses = [line["loss"] for line in read_metrics(a.folder / a.storage) if "loss" in line] if comm.rank() == 0 else []
    return {"losses": losses, **{key: report[key] for key in ("start_loss", "base_loss", "eval_loss_end")}}


def qlora_step(a: argparse.Namespace, device: torch.device):
    """A training step of PEFT's LoRA over bitsandbytes' 4-bit linears, in bf16 autocast as ours."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=a.storage == "nf4_double",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        ensure_embedded_model(lambda text: None), dtype=torch.bfloat16, quantization_config=quantisation,
        device_map={"": device},
    )  # fmt: skip
    model = get_peft_model(model, LoraConfig(r=a.rank, lora_alpha=a.rank, target_modules="all-linear")).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)

    def step(batch: dict) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = summed_loss(model, batch) / a.lengths[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


class Generated:
    """Weights made on the device when their turn comes, from their names: a large model needs no checkpoint."""

    def __init__(self, device: torch.device):
        self._device = device

    def exchange(self, items: list[Item | None]) -> None:
        """Nothing to do."""

    def read(self, item: Item) -> tuple[torch.Tensor, None]:
        """Normal numbers, as large as a trained model's; ones for the norms."""
        if len(item.shape) == 1:
            return torch.ones(item.shape, dtype=torch.bfloat16, device=self._device), None
        seed = int(digest.of_tensor(torch.tensor(list(item.name.encode()))), 16) % 2**31
        generator = torch.Generator(self._device).manual_seed(seed)
        return torch.randn(item.shape, generator=generator, device=self._device, dtype=torch.bfloat16) * 0.02, None


def shaped(a: argparse.Namespace) -> dict:
    """A model of a shape with made-up weights: initialised, quantised, trained a few steps; its peak memory."""
    device, sorsa, how = this_device(), SorsaConfig(rank=a.rank), ResidualConfig(storage=a.storage)
    formats = choose("mixed", None, device.type)
    kept = residual.choose(how, formats, device)
    LlamaConfig.from_json_file(a.shape).save_pretrained(a.shape.parent)
    model = skeleton(a.shape.parent, LoadingConfig())
    targets = select(model, sorsa)
    operate(model, targets, sorsa, formats, kept)
    names = {t.name for t in targets}
    homes = parameter_homes(model)
    frozen = {n: getattr(*places[0]).shape for n, places in homes.items() if n.rpartition(".")[0] not in names}
    began = time.perf_counter()

    def found(target, weight):
        return decompose(weight, target.rank, target.name, sorsa.svd, sorsa.svd_tolerance, sorsa.svd_max_iterations)

    fill(
        model, targets, frozen, Generated(device), recipe=SorsaRecipe(model, formats, kept, device, found),
        placement=Whole(device), device=device, progress=iter,
    )  # fmt: skip
    synchronise()
    result: dict = {"initialisation_seconds": time.perf_counter() - began, "initialisation_gib": peak_gib()}
    result["frozen_gib"] = sum(p.nbytes for p in model.parameters() if not p.requires_grad) / 2**30
    result["trainable"] = sum(target.trainable for target in targets)
    model.to(device)  # its buffers
    checkpoint_activations(model)
    engine = engine_of(model, 0)
    for length in a.lengths:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        batch, seconds = batch_of(length, model.config.vocab_size, device), []
        for _ in range(a.steps):
            began = time.perf_counter()
            engine.train_step([summed_loss(engine, batch) / length])
            synchronise()
            seconds.append(time.perf_counter() - began)
        result |= {f"peak_gib_{length}": peak_gib(), f"seconds_{length}": statistics.median(seconds[1:] or seconds)}
    return result


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib() -> float | None:
    """Peak of what PyTorch has allocated on the GPU; None without one."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


SIDES = {"bytes": live_bytes, "gather": gathered_bytes, "steps": step_seconds, "shaped": shaped, "train": train}


if __name__ == "__main__":
    main()
