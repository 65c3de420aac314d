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
from sorsa_ds.run.peft_files.beside import add_peft_files
from sorsa_ds.runtime import collectives


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


def finish_adapter(run: Path, engine: SorsaEngine, config: RunConfig) -> None:
    """Write what was trained, and with `output.peft_adapter` the same in PEFT's format. A collective call.

    Args:
        run: the run's folder.

    Raises:
        ValueError: the disk refuses; PeerError on the other ranks then. PEFT's format is left out, with a line that
            says why, where it cannot be written.
    """
    folder = run / ADAPTER
    save_factors(engine, folder / TRAINED)

    def finish() -> None:
        record_digests(folder)
        add_peft_files(run, config, engine.device)

    collectives.together(finish, engine.device, on=0)
