"""The folder adapter/ of a run: what is written into it as training begins, and as it ends."""

from pathlib import Path

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.engine.gather import save_factors
from sorsa_ds.methods.registry import method_of
from sorsa_ds.model.adapter_file import INITIAL, TRAINED, describe_adapter, record_digests
from sorsa_ds.model.load import AdaptedModel
from sorsa_ds.model.numerics import Numerics
from sorsa_ds.run.paths import ADAPTER
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.background import patiently


def begin_adapter(
    run: Path,
    engine: SorsaEngine,
    config: RunConfig,
    loaded: AdaptedModel,
    numerics: Numerics,
    new_tokens: dict[str, int],
) -> None:
    """Keep the factors with which training begins, and describe the adapter. A collective call.

    Args:
        run: the run's folder.
        numerics: what decides the base model's numbers besides its weights.
        new_tokens: the ids of `data.new_tokens`.

    Raises:
        ValueError: the disk refuses; PeerError on the other ranks then.
    """
    folder = run / ADAPTER
    if method_of(config).keeps_initial:
        save_factors(engine, folder / INITIAL, {one.name for one in loaded.selection.whole})
    collectives.together(
        lambda: describe_adapter(folder, config, loaded.targets, loaded.digests, numerics, new_tokens),
        engine.device,
        on=0,
    )


def finish_adapter(run: Path, engine: SorsaEngine) -> None:
    """Write what was trained. A collective call.

    Args:
        run: the run's folder.

    Raises:
        ValueError: the disk refuses; PeerError on the other ranks then.
    """
    folder = run / ADAPTER
    save_factors(engine, folder / TRAINED)
    patiently(lambda: record_digests(folder), engine.device)
