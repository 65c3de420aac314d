"""GaLore: what it is to this program. Its optimizer is galore-torch's own (`methods.galore_engine`)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from sorsa_ds.config.schema import BaselineConfig, RunConfig
from sorsa_ds.methods.families.whole_weights import Partial
from sorsa_ds.methods.method import ADAPTER_SETTINGS, EXPERT_SETTINGS, SORSA_SETTINGS
from sorsa_ds.model.targets import Target

_CUT = "GaLore projects the gradient of a whole matrix, and ZeRO shows the optimizer flat pieces of matrices"


class Galore(Partial):
    """GaLore: the whole weights of the targets are trained, with moments of gradients projected to a low rank."""

    name, title = "galore", "GaLore"
    ignored_settings = (
        *SORSA_SETTINGS, *EXPERT_SETTINGS, *ADAPTER_SETTINGS, "train.optimizer", "baseline.loraplus_*",
        "baseline.pissa_*", "baseline.adalora_*",
    )  # fmt: skip
    refused_stages: Mapping[int, str] = dict.fromkeys((1, 2, 3), _CUT)
    package = "galore_torch"

    def engine(self, config: RunConfig, steps: int) -> Callable:
        from sorsa_ds.methods.galore_engine import GaloreEngine  # imports DeepSpeed and bitsandbytes

        return partial(GaloreEngine, config=config)

    def rows(self, config: RunConfig, targets: Sequence[Target], trained: int, reg: object) -> list[tuple[str, str]]:
        baseline = config.baseline
        told = f"rank {baseline.galore_rank}, new every {baseline.galore_update_gap} steps, x {baseline.galore_scale:g}"
        return [*super().rows(config, targets, trained, None), ("projection", told)]

    def moment_numbers(self, config: RunConfig, targets: Sequence[Target], trainable: int) -> int:
        """Both moments of a projected matrix have its longer side x r numbers, and its projection the shorter x r."""
        projected = sum(_moments(target, config.baseline) for target in targets)
        return projected + 2 * (trainable - sum(target.numel for target in targets))


def _moments(target: Target, baseline: BaselineConfig) -> int:
    sides = target.out_features, target.in_features
    rank = min(*sides, baseline.galore_rank)
    return rank * (2 * max(sides) + min(sides))
