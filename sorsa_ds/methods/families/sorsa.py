"""SORSA: W = W_r + scale * U diag(s) V^T with a frozen residual W_r, and U, s and V trained (eq. 8 of the paper).

Shapes, used as suffixes of tensor names: M out_features, N in_features, R rank.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sorsa_ds.config.batch_size import AUTO
from sorsa_ds.config.schema import RunConfig, SorsaConfig
from sorsa_ds.methods.method import Making, Method, Settings, TrainedRun
from sorsa_ds.model import factor_source, sorsa_recipe
from sorsa_ds.model.adapter_file import FactorFile
from sorsa_ds.model.fill import Recipe
from sorsa_ds.model.init_report import LayerReport
from sorsa_ds.model.input_directions import InputDirections
from sorsa_ds.model.selection import Selection
from sorsa_ds.model.sorsa_recipe import adapt_to_sorsa
from sorsa_ds.model.targets import Target, counted
from sorsa_ds.runtime.numerics import full_fp32_products
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa import regularizer, residual_storage
from sorsa_ds.sorsa.decompose import Factors, as_used, residual
from sorsa_ds.sorsa.expert_layer import SorsaExperts
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.sorsa.regularizer import Regularizer
from sorsa_ds.sorsa.residual_storage import Storage
from sorsa_ds.sorsa.sides import Sides, kept_bytes
from sorsa_ds.sorsa.step_size import suggested_rate


class Sorsa(Method):
    """SORSA: some singular triplets, the leading ones if not said otherwise, are trained over a frozen residual."""

    name, title = "sorsa", "SORSA"
    about = (
        " [SORSA](https://arxiv.org/abs/2409.00055) trains some of the singular triplets of each weight, "
        "`W = W_r + U diag(s) Vᵀ`, over a frozen residual `W_r`, and keeps `U` and `V` near-orthonormal."
    )
    ignored_settings = ("baseline.*",)
    variants: Mapping[str, Mapping[str, object]] = {"sorsa-no-reg": {"regularizer.gamma": 0.0}}
    refused_exports: Mapping[str, str] = {}
    adapter_library = "sorsa_ds"
    decomposes = True
    suggests_rate = True
    refused_experts = ""
    layers_cast_weights = True

    def adapt(self, model: PreTrainedModel, making: Making) -> tuple[Selection, Recipe]:
        settings, precision, storage = making.settings, making.precision, making.storage
        targets = self.choose(model, settings.adapter).targets
        _check_window(settings.sorsa, targets)
        begins = making.initial is None and making.device.type != "meta"  # on which nothing is decomposed
        if settings.sorsa.directions is not None and begins:
            InputDirections(settings.sorsa.directions).check(targets)
        if making.initial is None:
            start = factor_source.factor_source(settings.sorsa, settings.adapter, settings.residual, storage, precision)
        else:
            start = factor_source.from_values(making.initial.values)
        now = None if making.trained is None else factor_source.from_values(making.trained)
        return adapt_to_sorsa(model, settings.adapter, precision, storage, making.device, start, now)

    def engine(self, config: RunConfig, steps: int) -> Callable:
        from sorsa_ds.engine.engine import SorsaEngine  # imports DeepSpeed

        return partial(SorsaEngine, rates=config.sorsa)

    def working_set(self, settings: Settings, targets: Sequence[Target], largest: int, storage: Storage) -> int:
        refined = settings.residual.iterations > 1
        return max(sorsa_recipe.working_set(target, settings.sorsa, storage, refined) for target in targets)

    def check_decomposed(self, settings: Settings, reports: Sequence[LayerReport]) -> None:
        """Rates that follow from singular values have no bound where these are rounding, and log s does not move."""
        own = settings.sorsa
        asked = [f"sorsa.column_rates={own.column_rates}"] if own.column_power else []
        asked += ["sorsa.s_space=log"] if own.s_space == "log" else []
        rounding = next((report for report in reports if report.is_rounding), None)
        if asked and rounding is not None:
            raise ValueError(
                f"{' and '.join(asked)}: {rounding.name} lacks rank, and the {rounding.rank} singular values that are "
                f"trained of it are rounding ({rounding.captured:.1e} of its energy), from which no rate follows; "
                f"train other triplets (sorsa.triplets=window), or leave this out"
            )

    def suggested_rate(self, settings: Settings, reports: Sequence[LayerReport]) -> float:
        power = settings.sorsa.column_power
        layers = [r for r in reports if not r.is_rounding]
        return suggested_rate([(settings.adapter.scale(r.rank) * r.s_rms ** (1 - power), r.rank) for r in layers])

    def regularizer(self, config: RunConfig) -> Regularizer:
        return regularizer.resolve_regularizer(
            config.regularizer,
            # A strength that depends on the rate is refused where the rate is not known yet.
            learning_rate=1.0 if config.train.learning_rate == AUTO else config.train.learning_rate,
            accumulation_steps=config.train.gradient_accumulation_steps or 1,
        )

    def rows(
        self, config: RunConfig, targets: Sequence[Target], trained: int, reg: Regularizer | None
    ) -> list[tuple[str, str]]:
        assert reg is not None
        return [
            ("method", self.name),
            ("trained", f"{counted(targets)}, {trained:,} parameters"),
            ("residual", residual_storage.describe_storage(config.residual)),
            *_told_choices(config.sorsa),
            ("regulariser", f"{reg.form}, {reg.reduction}, gamma / eta_d = {reg.coefficient:.4g}{reg.rhythm()}"),
        ]

    def summary(self, settings: Settings, precision: Precision) -> str:
        resolved = residual_storage.resolve_residual(settings.residual, precision)
        return f"residual {residual_storage.describe_storage(resolved)}"

    def residual_names(self, target: Target, storage: Storage) -> list[str]:
        return [f"{target.name}.{leaf}" for leaf in storage.names]

    def step_copies_bytes(self, targets: Sequence[Target], compute: torch.dtype, held: torch.dtype) -> int:
        shapes = [(one.matrices, one.out_features, one.in_features, one.rank) for one in targets]
        return sum(kept_bytes(*shape, compute, held) for shape in shapes)

    def step_scratch_bytes(self, config: RunConfig, ranks: Iterable[int], trainable: int) -> int:
        """Gram matrices, errors and factors of U and V in fp64, all of them at once.

        With rates of their own, U, s and V are there once more while the optimizer steps.
        """
        return 8 * 3 * sum(2 * rank**2 for rank in ranks) + 4 * trainable * config.sorsa.has_own_rates

    def step_traffic(self, config: RunConfig, targets: Sequence[Target], zero_stage: int) -> dict[str, float]:
        """One all-reduce of the fp64 Gram matrices per step where ZeRO cuts the masters.

        A re-orthonormalisation sends Gram matrices once more, and as many numbers by which U and V are turned.
        """
        every = config.regularizer.reorthonormalize
        turned = 1 / every if every else 0
        times = turned if zero_stage == 0 else 1 + 2 * turned
        return {"Gram matrices": times * 2 * 8 * sum(2 * target.matrices * target.rank**2 for target in targets)}

    def merged_weight(self, run: TrainedRun, name: str, target: Target | None, untrained: bool = False) -> Tensor:
        """W_r is taken and packed anew, then made dense: what it lost in training it loses here too."""
        assert target is not None and run.initial is not None
        scale, formats = run.described.adapter.scale(target.rank), run.precision
        initial, trained = self.factors(run.initial, target), self.factors(run.trained, target)
        merged = []
        for weight_MN, *own in zip(
            target.each(run.weights.weight(target)), *map(target.each, (*initial.tensors(), *trained.tensors())),
            strict=True,
        ):  # fmt: skip
            begun, now = Factors(*own[:3]), Factors(*own[3:])
            rest_MN = residual(
                weight_MN, begun, used_dtype=formats.compute_dtype, factor_dtype=formats.factor_dtype, scale=scale
            )
            kept = run.storage.pack(rest_MN)
            del rest_MN
            dense_MN = run.storage.dense(kept, (target.out_features, target.in_features), formats.compute_dtype)
            merged.append(add_principal(dense_MN.float(), begun if untrained else now, formats, scale))
        return target.joined(merged)

    def plain_layer(self, layer: nn.Module, trained_in: Precision, dtype: torch.dtype) -> nn.Module | Tensor | None:
        """Over a packed W_r the factors stay apart: a plain linear would lose the packing."""
        if not isinstance(layer, SorsaLinear | SorsaExperts) or layer.storage.quantised:
            return None
        tensors = [getattr(layer, name).detach() for name in ("U", "s", "V", *layer.storage.names)]
        if isinstance(layer, SorsaExperts):
            W_EMN = tensors[0].new_empty(layer.experts, layer.out_features, layer.in_features, dtype=dtype)
            for expert, W_MN in enumerate(W_EMN):
                W_MN.copy_(_merged(layer, [tensor[expert] for tensor in tensors], trained_in))
            return W_EMN
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(_merged(layer, tensors, trained_in).to(dtype), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
        return plain

    def factors(self, file: FactorFile, target: Target) -> Factors:
        return factor_source.from_values(file.values)(target, torch.empty(0))

    def exact_rank(self, target: Target) -> int:
        return min(2 * target.rank, target.out_features, target.in_features)

    def change_product(self, run: TrainedRun, target: Target) -> tuple[Tensor, Tensor]:
        """dW = scale * (U diag(s) V^T - U_0 diag(s_0) V_0^T), so K = 2 R."""
        assert run.initial is not None
        scale, formats = run.described.adapter.scale(target.rank), run.precision
        then, now = (_used(self.factors(file, target), formats, scale) for file in (run.initial, run.trained))
        return torch.cat([now.left, -then.left], -1).double(), torch.cat([now.right, then.right], -1).double()


def _check_window(sorsa: SorsaConfig, targets: Sequence[Target]) -> None:
    """Stop before weights are read where a layer has no such window of triplets.

    Raises:
        ValueError: naming the first such layer, and the largest start for all.
    """
    starts = [min(one.out_features, one.in_features) - one.rank for one in targets]
    if sorsa.window_start is not None and starts and sorsa.window_start > min(starts):
        target = targets[starts.index(min(starts))]
        raise ValueError(
            f"sorsa.window_start={sorsa.window_start}: {target.name} ({target.out_features} x {target.in_features}) "
            f"has {min(target.out_features, target.in_features)} triplets, so that {target.rank} of them begin at "
            f"{min(starts)} at the latest"
        )


def _told_choices(sorsa: SorsaConfig) -> list[tuple[str, str]]:
    """Rows for the table of a run: which triplets are trained, and at which rates, where not as in the papers."""
    rows = []
    if sorsa.triplets != "leading":
        start = "the middle" if sorsa.window_start is None else f"number {sorsa.window_start}"
        named = {"window": f"a window from {start} on", "null_space": f"of the directions in {sorsa.directions}"}
        where = named.get(sorsa.triplets, sorsa.triplets)
        rows.append(("triplets", f"{where}; the column `captured` has their share of the weights' energy"))
    if sorsa.has_own_rates:
        column = {"equal": "1", "inverse_sqrt": "1 / sqrt(s)", "inverse": "1 / s"}[sorsa.column_rates]
        told = f"columns of U and V {column}, s {sorsa.s_lr_ratio:g}{' in log space' * (sorsa.s_space == 'log')}"
        rows.append(("own rates", f"{told}, times the learning rate"))
    return rows


def _merged(layer: SorsaLinear | SorsaExperts, tensors: list[Tensor], formats: Precision) -> Tensor:
    """W (M, N) in fp32 of a layer's U, s, V and tensors of the residual, those of one expert where it is of experts."""
    dense_MN = layer.storage.dense(tensors[3:], (layer.out_features, layer.in_features), formats.compute_dtype)
    factors = Factors(*(factor.float() for factor in tensors[:3]))
    return add_principal(dense_MN.to(torch.float32, copy=True), factors, formats, layer.scale)


def add_principal(rest_MN: Tensor, factors: Factors, formats: Precision, scale: float) -> Tensor:
    """W = W_r + scale * U diag(s) V^T in fp32, with the sides rounded as training used them; overwrites `rest_MN`."""
    used = _used(factors, formats, scale)
    with full_fp32_products():
        return rest_MN.addmm_(used.left, used.right.mT)


def _used(factors: Factors, formats: Precision, scale: float) -> Sides:
    """The sides of the principal part as training computed with them."""
    return as_used(factors, used_dtype=formats.compute_dtype, factor_dtype=formats.factor_dtype, scale=scale)
