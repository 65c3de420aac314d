"""Settings in YAML, and DeepSpeed's JSON."""

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.fuzz import rules, tables
from tests.fuzz.kinds import Kind, changed_json
from tests.fuzz.mutations import as_json, changed_text, file_bytes, junk
from tests.fuzz.rules import Nonsense

ROOT = Path(__file__).parents[2]
RECIPES = {
    path.name: re.sub(r"(?m)^\s*#.*\n", "", path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
}
"""The shipped recipes without their comments."""
JSONS = {path.name: json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json"))}
FULL_JSON = {
    "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0, "steps_per_print": 10, "wall_clock_breakdown": False, "memory_breakdown": False,
    "bf16": {"enabled": "auto", "check_grad_overflow": True}, "fp16": {"enabled": False},
    "torch_autocast": {"enabled": False, "lower_precision_safe_modules": ["torch.nn.Linear"]},
    "data_types": {"grad_accum_dtype": "fp32"}, "comms_logger": {"enabled": True, "prof_ops": []},
    "zero_optimization": {
        "stage": 3, "reduce_bucket_size": 2e8, "overlap_comm": True, "sub_group_size": 10**9,
        "stage3_prefetch_bucket_size": "auto", "offload_param": {"device": "cpu", "pin_memory": True},
        "offload_optimizer": {"device": "cpu", "ratio": 1.0, "super_offload": False}, "round_robin_gradients": False,
    },
}  # fmt: skip
BY_SPELLING = {
    "model", "loading.revision", "sorsa.svd_cache", "data.path", "data.name", "data.prompt", "data.chat_template",
    "data.train_split", "data.eval_path", "data.eval_split", "output.folder", "output.name", "output.wandb_project",
}  # fmt: skip
"""Settings that are text, for which a number or a word such as true stands as it is spelt."""
_PLAIN = {
    "true|True|TRUE": True, "false|False|FALSE": False, "~|null|Null|NULL|": None,
    r"[-+]?\.(inf|Inf|INF)": float("inf"), r"\.(nan|NaN|NAN)": float("nan"),
}  # fmt: skip


def make_yaml(rng: Random) -> tuple[bytes, None]:
    """A recipe with characters changed, or a few settings with values from everywhere."""
    if rng.random() < 0.4:
        return file_bytes(rng, changed_text(rng, rng.choice(list(RECIPES.values())))), None
    lines: list[str] = []
    for path in rng.sample(list(tables.SETTINGS | tables.EARLIER), rng.choice((1, 2, 3))):
        section, _, name = path.rpartition(".")
        value = as_json(junk(rng))
        lines += [f"{section}:", f"  {name}: {value}"] if section else [f"{name}: {value}"]
    return file_bytes(rng, "\n".join(lines) + "\n"), None


def read_yaml(folder: Path, extra: None) -> bool:
    """Read settings as the training command does, and check them; whether they read back from what is written."""
    from sorsa_ds.config.command_line import load_settings, to_yaml, with_absolute_paths
    from sorsa_ds.config.schema import RunConfig
    from sorsa_ds.plan.job import Hardware, Job
    from sorsa_ds.train.options import parse

    config = with_absolute_paths(parse(["--config", str(folder / "run.yaml")]).config)
    Job.of(config, {}, Hardware(gpus=config.train.sequence_parallel))  # as few as there can be
    again = folder / "config.yaml"
    again.write_text(to_yaml(config), encoding="utf-8")
    return load_settings(RunConfig, again) == config


def judge_yaml(content: bytes, extra: None, same: bool) -> None:
    """Settings, by the events of a YAML parser and the table of what each may be."""
    if not same:
        raise Nonsense("it does not read back from what is written")
    try:
        text = content.decode()
        root = _tree(yaml.parse(text, yaml.SafeLoader))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise Nonsense(f"not YAML: {error}") from error
    found = _plain(root, "") if root is not None else {}
    if not isinstance(found, dict | None):
        raise Nonsense("no settings")
    found = {key: inner for key, inner in (found or {}).items() if not (key in tables.SECTIONS and inner is None)}
    rules.check(found, tables.SETTINGS | tables.EARLIER)
    check_adapter(found)
    residual = found.get("residual", {})
    if residual.get("iterations", 1) > 1 and residual.get("storage", "auto") in ("auto", "fp32", "bf16"):
        raise Nonsense("residual.iterations over a residual that is not quantised")
    if found.get("train", {}).get("sequence_parallel", 1) > 1 and found.get("data", {}).get("packing", False):
        raise Nonsense("train.sequence_parallel beside data.packing")
    positions, data = found.get("train", {}).get("micro_batch_tokens"), found.get("data", {})
    if positions is not None and data.get("packing", False):
        raise Nonsense("train.micro_batch_tokens beside data.packing")
    if isinstance(positions, int) and positions < data.get("max_length", 512):
        raise Nonsense("train.micro_batch_tokens below data.max_length")
    train = found.get("train", {})
    if train.get("profile_trace", False) and train.get("profile_steps", 0) == 0:
        raise Nonsense("train.profile_trace without train.profile_steps")


def check_adapter(found: dict) -> None:
    """Stop where the sections on the adapter contradict themselves, or one another.

    Raises:
        Nonsense: naming the settings.
    """
    now, before = found.get("adapter") or {}, found.get("sorsa") or {}
    for path in tables.EARLIER:
        last = path.partition(".")[2]
        if last in now and last in before and now[last] != before[last]:
            raise Nonsense(f"{path} is given under two names")
    if now.get("rslora", False) and now.get("alpha", before.get("alpha")) is None:
        raise Nonsense("adapter.rslora without adapter.alpha")


def _tree(events) -> Any:
    """The tree of a YAML text: scalars as their events, lists, and lists of pairs as tuples; no alias and no tag."""
    stack: list[list] = [[]]
    for event in events:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise Nonsense("an alias or a tag")
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            stack.append([])
            if len(stack) > rules.DEEPEST + 2:
                raise Nonsense("nested too deeply")
        elif isinstance(event, yaml.SequenceEndEvent):
            stack[-2].append(stack.pop())
        elif isinstance(event, yaml.MappingEndEvent):
            inside = stack.pop()
            stack[-1].append(tuple(zip(inside[::2], inside[1::2], strict=True)))
        elif isinstance(event, yaml.ScalarEvent):
            stack[-1].append(event)
    if len(stack[0]) > 1:
        raise Nonsense("several documents")
    return stack[0][0] if stack[0] else None


def _plain(node: Any, path: str) -> Any:
    """A tree as plain values; a scalar that is no text becomes one where its setting is text."""
    if isinstance(node, list):
        return [_plain(inner, "") for inner in node]
    if isinstance(node, tuple):
        found: dict = {}
        for key, inner in node:
            if not isinstance(key, yaml.ScalarEvent) or key.value in found:
                raise Nonsense("a key that is no name, or stands twice")
            found[key.value] = _plain(inner, f"{path}.{key.value}" if path else key.value)
        return found
    if node.style in ("'", '"', "|", ">"):
        return node.value
    value = _scalar(node.value)
    return node.value if path in BY_SPELLING and isinstance(value, bool | int | float) else value


def _scalar(text: str) -> Any:
    for pattern, value in _PLAIN.items():
        if re.fullmatch(pattern, text):
            return value
    if re.fullmatch("[-+]?[0-9]+", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    return text


def make_ds_config(rng: Random) -> tuple[bytes, None]:
    """A shipped JSON, or one that says much, with entries or characters changed."""
    return changed_json(rng, FULL_JSON if rng.random() < 0.6 else rng.choice(list(JSONS.values()))), None


def read_ds_config(folder: Path, extra: None) -> str | None:
    """Read and resolve the JSON for one rank; what DeepSpeed says against the result, if anything."""
    from deepspeed.runtime.config import DeepSpeedConfig

    from sorsa_ds.config import deepspeed_json
    from sorsa_ds.config.schema import TrainConfig
    from sorsa_ds.runtime.precision import resolve_precision

    raw = deepspeed_json.read_ds_config(folder / "ds.json")
    formats = resolve_precision("auto", deepspeed_json.precision_from_json(raw), "cpu", fast=False)
    resolved = deepspeed_json.resolve_ds_config(raw, TrainConfig(), 1, "cpu", formats.name)
    try:
        understood = DeepSpeedConfig(resolved.ds)
    except Exception as error:
        return f"DeepSpeed: {error!r}"
    same = understood.train_micro_batch_size_per_gpu == resolved.micro_batch_size
    return (
        None if same and understood.zero_optimization_stage == resolved.zero_stage else "DeepSpeed read other numbers"
    )


def judge_ds_config(content: bytes, extra: None, said: str | None) -> None:
    """A DeepSpeed JSON, by the table of what each entry may be; DeepSpeed itself must take what comes of it."""
    if said is not None:
        raise Nonsense(said)
    found, auto = rules.strict_json(rules.decoded(content)), rules.one_of("auto")
    rules.check(
        found, tables.DEEPSPEED, anywhere=auto, empty=rules.one_of("auto", None),
        ignored=lambda path: path.startswith("_"),
    )  # fmt: skip
    if isinstance(zero := found.get("zero_optimization"), dict) and zero.get("stage") == "auto":
        raise Nonsense("no stage")


KINDS = (
    Kind("settings (YAML)", "run.yaml", make_yaml, read_yaml, judge_yaml,
         tuple((text.encode(), None) for text in RECIPES.values())),
    Kind("DeepSpeed JSON", "ds.json", make_ds_config, read_ds_config, judge_ds_config,
         tuple((json.dumps(value).encode(), None) for value in (FULL_JSON, *JSONS.values()))),
)  # fmt: skip
