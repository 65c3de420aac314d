"""The descriptions that come with an adapter and with a checkpoint, also those that somebody has made."""

import json
import shutil
from pathlib import Path
from random import Random

from xxhash import xxh3_128_hexdigest

from tests.fuzz import rules, tables
from tests.fuzz.kinds import Kind, changed_json
from tests.fuzz.mutations import as_json, changed_tree
from tests.fuzz.of_settings import check_adapter
from tests.fuzz.rules import Nonsense

TESTS = Path(__file__).parents[1]
RUN = TESTS / "fixtures" / "run_of_0.1.0"
MODEL = TESTS / "golden" / "model"
CHECKPOINT = RUN / "checkpoints" / "step-000003"
ADAPTER = json.loads((RUN / "adapter" / "adapter_config.json").read_text()) | {"base_model": str(MODEL)}
PEFT = {
    "peft_type": "LORA", "base_model_name_or_path": str(MODEL), "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"],
    "rank_pattern": {"k_proj": 2}, "task_type": "CAUSAL_LM",
}  # fmt: skip
MANIFEST = json.loads((CHECKPOINT / "checkpoint.json").read_text())


def make_adapter(rng: Random) -> tuple[bytes, None]:
    """The description of one of our adapters or of PEFT's, with entries or characters changed."""
    return changed_json(rng, PEFT if rng.random() < 0.3 else ADAPTER), None


def read_adapter(folder: Path, extra: None) -> None:
    """Find the model of an adapter, as the evaluation does, and open its files."""
    from sorsa_ds.evaluate.models import find_evaluated_model
    from sorsa_ds.model import adapter_file

    for file in ("adapter_model.safetensors", "initial_factors.safetensors"):
        (folder / file).symlink_to(RUN / "adapter" / file)
    found = find_evaluated_model(str(folder))
    if found.kind == "adapter":
        described = adapter_file.read_description(folder)
        for name in (adapter_file.INITIAL, adapter_file.TRAINED):
            adapter_file.open_factors(folder, name, described)


def judge_adapter(content: bytes, extra: None, facts: None) -> None:
    """The entries of the description, by their table."""
    found = rules.strict_json(rules.decoded(content))
    if isinstance(found, dict) and "peft_type" in found:
        rules.check(found, tables.PEFT, needs=("base_model_name_or_path",), ignored=lambda path: True)
        if not Path(found["base_model_name_or_path"]).is_dir():
            raise Nonsense("there is no such base model")
        return
    rules.check(found, tables.ADAPTER, needs=tables.ADAPTER_NEEDS)
    if "adapter" not in found and not any(path.partition(".")[2] in found.get("sorsa", {}) for path in tables.EARLIER):
        raise Nonsense("neither adapter nor the earlier section is there")
    check_adapter(found)
    residual = found.get("residual", {})
    if residual.get("iterations", 1) > 1 and residual.get("storage", "auto") in ("auto", "fp32", "bf16"):
        raise Nonsense("residual.iterations over a residual that is not quantised")


def make_checkpoint(rng: Random) -> tuple[bytes, None]:
    """A manifest with entries changed, as a rule with the digest that belongs to it, or with characters changed."""
    if rng.random() < 0.25:
        return changed_json(rng, MANIFEST), None
    tree = changed_tree(rng, {key: value for key, value in MANIFEST.items() if key != "digest"})
    if isinstance(tree, dict):
        tree["digest"] = _digest(tree)
    return as_json(tree).encode(), None


def read_checkpoint(folder: Path, extra: None) -> None:
    """Read the manifest of a checkpoint and make of it what a run needs that goes on, up to the weights."""
    from sorsa_ds.config.command_line import load_settings
    from sorsa_ds.config.schema import RunConfig, TrainConfig
    from sorsa_ds.run.checkpoint import manifest
    from sorsa_ds.run.checkpoint.resume import WholeCheckpoint
    from sorsa_ds.train.origin import ResumedRun

    place = folder / "checkpoints" / "step-000003"
    place.mkdir(parents=True)
    shutil.move(folder / "checkpoint.json", place / "checkpoint.json")
    for file in CHECKPOINT.glob("*.safetensors"):
        (place / file.name).symlink_to(file)
    found = manifest.read_manifest(place)
    if faults := manifest.file_faults(place, found):
        raise ValueError("; ".join(faults))
    saved = WholeCheckpoint(path=place, manifest=found)
    config = load_settings(RunConfig, RUN / "config.yaml")
    saved.check_settings(config)
    run = ResumedRun(saved)
    for ranks in (1, 2):
        run.split_batch(TrainConfig(), ranks)
    run.regularizer(config)


def judge_checkpoint(content: bytes, extra: None, facts: None) -> None:
    """The entries of the manifest, by their table, and its digest."""
    found = rules.strict_json(rules.decoded(content))
    if not isinstance(found, dict) or found.get("digest") != _digest(
        {key: value for key, value in found.items() if key != "digest"}
    ):
        raise Nonsense("the digest is another")
    rules.check(
        found, tables.CHECKPOINT, needs=tables.CHECKPOINT_NEEDS,
        ignored=lambda path: path.split(".")[0] in ("config", "ds_config", "scheduler"),
    )  # fmt: skip
    schedule = found["scheduler"]
    if not isinstance(schedule, dict) or not tables.LAST_EPOCH(schedule.get("last_epoch")):
        raise Nonsense("the schedule is that of another step")
    if not isinstance(found["ds_config"], dict):
        raise Nonsense("ds_config is no object")


def _digest(content: dict) -> str:
    return xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


KINDS = (
    Kind("adapter descriptions", "adapter_config.json", make_adapter, read_adapter, judge_adapter,
         tuple((json.dumps(value).encode(), None) for value in (ADAPTER, PEFT))),
    Kind("checkpoint.json", "checkpoint.json", make_checkpoint, read_checkpoint, judge_checkpoint,
         ((json.dumps(MANIFEST).encode(), None),)),
)  # fmt: skip
