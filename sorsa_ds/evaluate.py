"""Put a finished run back together from its base model and its adapter, and measure its held-out loss."""

from pathlib import Path

import torch

from sorsa_ds import adapter, cli, comm
from sorsa_ds.config import RunConfig
from sorsa_ds.console import tracked
from sorsa_ds.data.batches import eval_batches, pad_token_id
from sorsa_ds.inputs import examples, find_model, load_tokenizer
from sorsa_ds.objective import mean_loss
from sorsa_ds.process import start_process, this_device
from sorsa_ds.run_paths import ADAPTER, REPORT
from sorsa_ds.trained import reload


def held_out_loss(folder: Path) -> float:
    """Nats per learned token of a run's trained adapter on its held-out data. A collective call.

    Raises:
        ValueError: the folder is no run, or the run had no held-out data.
    """
    if not (folder / "config.yaml").exists():
        raise ValueError(f"--run: {folder} is not the folder of a run: it has no config.yaml")
    if not (folder / REPORT).exists():
        raise ValueError(f"--run: {folder} is unfinished; go on with it (launch/train.py --resume {folder})")
    config = cli.load(RunConfig, folder / "config.yaml", [], {})
    start_process()
    device = this_device()
    model_folder = find_model(config.model, config.loading)
    tokenizer = load_tokenizer(model_folder, config.loading)
    _, held_out = examples(config.data, tokenizer, config.train.seed)
    if not held_out:
        raise ValueError(f"--run: {folder} was trained without held-out data (data.eval_size, data.eval_split)")
    adapter.read_description(folder / ADAPTER).check_residual(config.residual)
    loaded = reload(folder / ADAPTER, device, lambda rounds: tracked(rounds, len(rounds), "rebuilding", "round"))
    batches = eval_batches(
        held_out, comm.rank(), comm.world_size(), config.train.micro_batch_size, pad_token_id(tokenizer)
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "mixed"):
        return mean_loss(loaded.model, batches, device)
