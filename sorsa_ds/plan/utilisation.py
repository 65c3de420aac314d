"""Model flops utilisation of a run: the flops that a step's tokens need, by the plan, over those of the ranks' GPUs."""

from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from sorsa_ds.config.deepspeed_json import Resolved
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.plan.hardware import Hardware, peak_tflops
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.micro_batch import NoEstimateError, size_micro_batch
from sorsa_ds.plan.speed import ModelFlops
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.device import this_device
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.residual_storage import Storage


@dataclass(frozen=True, slots=True)
class Utilisation:
    """What MFU is computed from.

    told: what the run says of it: the peak that it is taken of, or why there is none.
    peak: flop/s of the GPUs of all ranks together. flops: what the model needs. Both None: no MFU is known.
    """

    told: str
    peak: float | None = None
    flops: ModelFlops | None = None

    def mfu(self, tokens: int, logits: int, squares: int, seconds: float) -> float | None:
        """The share of the peak that a batch of all ranks took in so many seconds; see `ModelFlops.of_batch`."""
        if self.peak is None or self.flops is None:
            return None
        return self.flops.of_batch(tokens, logits, squares) / (seconds * self.peak)


def find_utilisation(
    folder: Path, config: RunConfig, given: dict, resolved: Resolved, formats: Precision, storage: Storage
) -> Utilisation:
    """What MFU of a run can be computed from. A collective call.

    Args:
        folder: the model's.
        config: the settings, with what was left open filled in.
        given: the DeepSpeed JSON as the user wrote it, and `resolved` as it was resolved for this job.
    """
    device, job = this_device(), Job(config, given, resolved, formats, storage, Hardware())
    names = collectives.gather_json(torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU")
    found = peak_of(names, tf32=formats.compute_dtype == torch.float32)
    if found.peak is None:
        return found

    def needed() -> tuple[list[float], str]:
        """The model's flops, or why they are not known."""
        try:
            return list(astuple(ModelFlops.of(size_micro_batch(folder, job).facts))), ""
        except (NoEstimateError, ValueError) as error:  # a run goes on without this number
            return [], f"not logged: the model's flops cannot be estimated ({error})"

    flops, why = collectives.on_rank_0(needed, device)
    return replace(found, flops=ModelFlops(*flops)) if flops else Utilisation(why)


def peak_of(names: list[str], *, tf32: bool) -> Utilisation:
    """The peak of the devices of all ranks; without one where any is unknown, and no model's flops yet.

    Args:
        names: the name of each rank's device; a GPU's as `torch.cuda.get_device_name` gives it.
        tf32: whether products are of fp32 numbers, which are rounded to TF32, instead of bf16.
    """
    peaks = {name: peak_tflops(name, tf32=tf32) for name in sorted(set(names))}
    if unknown := [name for name, peak in peaks.items() if peak is None]:
        return Utilisation(f"not logged: the peak of {', '.join(unknown)} is not known")
    total = sum(peaks[name] or 0.0 for name in names)
    each = ", ".join(f"{name}: {peak:g}" for name, peak in peaks.items())
    return Utilisation(f"of {total:,g} dense {'TF32' if tf32 else 'bf16'} TFLOP/s ({each} each)", total * 1e12)
