"""GaLore's steps: AdamW of galore-torch, which projects the gradient of each matrix to a low rank (Zhao et al. 2024).

Every so many steps the projection of a matrix is made anew from its gradient. Moments have the projected gradient's
shape, (m, r) or (r, n), so that a checkpoint holds them with the projections as the method's own state, beside the
weights. Without ZeRO every rank has all of them alike.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.engine.masters import inner_optimizer
from sorsa_ds.engine.optimizers import MakeOptimizer
from sorsa_ds.methods.families.galore import Galore

_MOMENTS, _PROJECTION, _STEP = ("exp_avg", "exp_avg_sq"), "projection", "step"


def galore_adamw(config: RunConfig, model: nn.Module) -> MakeOptimizer:
    """A function that makes the optimizer: the targets' weights are projected, and what is trained beside them is not.

    Args:
        model: the model as the method has made it, on no ZeRO stage.
    """
    train, baseline = config.train, config.baseline
    named = dict(model.named_parameters())
    projected = {id(named[target.weight]) for target in Galore().choose(model, config.adapter).targets}

    def make(parameters: Iterable[Any]) -> torch.optim.Optimizer:
        from galore_torch import GaLoreAdamW

        parameters = list(parameters)
        groups: list[dict[str, Any]] = [{
            "params": [one for one in parameters if id(one) in projected], "rank": baseline.galore_rank,
            "update_proj_gap": baseline.galore_update_gap, "scale": baseline.galore_scale, "proj_type": "std",
        }]  # fmt: skip
        if others := [one for one in parameters if id(one) not in projected]:
            groups.append({"params": others})
        return GaLoreAdamW(
            groups, lr=train.learning_rate, betas=train.adam_betas, eps=train.adam_epsilon,
            weight_decay=train.weight_decay, no_deprecation_warning=True,
        )  # fmt: skip

    return make


class GaloreEngine(SorsaEngine):
    """A SorsaEngine with GaLore's optimizer, without ZeRO (stage 0).

    Args:
        optimizer: what makes the other methods' optimizer; it is not used here.
        config: the settings of the run.
    """

    moments_like_masters = False

    def __init__(self, model: nn.Module, ds_config: dict, optimizer: MakeOptimizer, *rest, config: RunConfig):
        super().__init__(model, ds_config, galore_adamw(config, model), *rest)
        inner_optimizer(self).register_step_post_hook(self._compact)

    def method_state(self) -> dict[str, Tensor]:
        """Moments, projections and counts of steps; nothing before the first step."""
        state, held = inner_optimizer(self).state, {}
        for fragment in self.masters.fragments:
            of = state.get(fragment.master, {})
            for kind in _MOMENTS:
                if kind in of:
                    held[f"{kind}/{fragment.name}"] = of[kind]
            if "projector" in of:
                held[f"{_PROJECTION}/{fragment.name}"] = of["projector"].ortho_matrix
            if _STEP in of:
                held[f"{_STEP}/{fragment.name}"] = torch.tensor(of[_STEP])
        return held

    def _compact(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        """Lay projections and moments out row by row, as a post-hook of the optimizer's step.

        A new projection is a view into all singular vectors, which it would keep in memory; and products with another
        layout are rounded in another way, so that a resumed run would not repeat bit for bit.
        """
        for of in optimizer.state.values():
            if "projector" in of:
                of["projector"].ortho_matrix = of["projector"].ortho_matrix.contiguous()
            for kind in _MOMENTS:
                of[kind] = of[kind].contiguous()

    def restore_method_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `method_state` gave, so that training goes on from there bit for bit."""
        from galore_torch.galore_projector import GaLoreProjector

        optimizer = inner_optimizer(self)
        masters = {fragment.name: fragment.master for fragment in self.masters.fragments}
        groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            held = optimizer.state[masters[name]]
            if kind == _STEP:
                held[_STEP] = int(tensor)
            elif kind == _PROJECTION:
                group = groups[id(masters[name])]
                held["projector"] = GaLoreProjector(
                    group["rank"], update_proj_gap=group["update_proj_gap"], scale=group["scale"],
                    proj_type=group["proj_type"],
                )  # fmt: skip
                held["projector"].ortho_matrix = tensor.to(self.device)
            else:
                held[kind] = tensor.to(self.device)
