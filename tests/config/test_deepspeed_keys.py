"""Every key of DeepSpeed's JSON is passed on or refused: none is unseen, and none of a wrong type gets through."""

import contextlib
import json
import typing

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from sorsa_ds.config.deepspeed_json import read_ds_config, resolve_ds_config
from sorsa_ds.config.deepspeed_keys import HARMLESS, PASSED, REFUSED, SECTION, UNDOCUMENTED, checked, without_auto
from sorsa_ds.config.schema import TrainConfig

OURS = {"": {*REFUSED}, "zero_optimization": {*UNDOCUMENTED}}
"""Keys on which this program has an opinion, by section; completed below."""
for table in (PASSED, HARMLESS):
    for path, keys in table.items():
        OURS.setdefault(path, set()).update(keys)
NOT_DEEPSPEEDS = {"": {"autotp", "sequence_parallel_size"}, "zero_optimization": {"cpu_offload_params"}}
"""Keys that are refused for people who expect them; DeepSpeed reads them elsewhere or not at all."""
AVOIDED = ("zenflow",)
"""Sections that are refused whole."""


class Asked(dict):
    """A JSON object that remembers which keys it was asked for."""

    def __init__(self, content=()):
        super().__init__(content)
        self.keys_asked = set()

    def get(self, key, default=None):
        self.keys_asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.keys_asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self

    def __copy__(self):
        return self


def model_keys(path, model, found):
    """All names that a pydantic model of DeepSpeed takes, and those of the models inside it, by section."""
    for name, field in model.model_fields.items():
        found.setdefault(path, set()).update({name, field.alias or name})
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and name not in AVOIDED:
                model_keys(f"{path}.{name}", kind, found)


@pytest.fixture(scope="module")
def theirs():
    """Every key that the installed DeepSpeed asks for, by section."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS, DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    found = {}
    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
    }
    for path, model in models.items():
        model_keys(path, model, found)
    plain = {path: Asked() for path in ("torch_autocast", "data_types", "flops_profiler")}
    whole = Asked({"train_batch_size": 1, **plain})
    DeepSpeedConfig(whole)
    without_bf16 = Asked({"train_batch_size": 1})
    DeepSpeedConfig(without_bf16)
    found[""] = whole.keys_asked | without_bf16.keys_asked | {*_REMOVED_TOP_LEVEL_CONFIG_KEYS}
    found["zero_optimization"] |= {*_REMOVED_ZERO_CONFIG_KEYS}
    return found | {path: section.keys_asked for path, section in plain.items()}


def test_every_key_of_this_deepspeed_is_passed_on_or_refused(theirs):
    assert len(theirs[""]) > 50
    assert len(theirs["zero_optimization"]) > 50
    assert {path: keys - OURS[path] for path, keys in theirs.items()} == {path: set() for path in theirs}


def test_every_key_that_is_named_here_is_one_of_deepspeed(theirs):
    """No key that is passed on would be ignored, and no reason is given for a key that is gone."""
    assert OURS.keys() == theirs.keys()
    assert {path: keys - theirs[path] - NOT_DEEPSPEEDS.get(path, set()) for path, keys in OURS.items()} == {
        path: set() for path in OURS
    }


def test_a_key_that_a_later_deepspeed_adds_would_be_seen(theirs):
    class Later(BaseModel):
        stage: int = 0
        moves_the_step: bool = False

    found = {}
    model_keys("zero_optimization", Later, found)
    assert found["zero_optimization"] - OURS["zero_optimization"] == {"moves_the_step"}


def test_values_that_change_nothing_are_deepspeed_s_own():
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    defaults = {
        "zero_optimization": DeepSpeedZeroConfig(),
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig(),
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig(),
        "bf16": DeepSpeedBF16Config(),
    }
    for path, model in defaults.items():
        known = model.model_dump(by_alias=True)
        ours = {key: refused.harmless for key, refused in HARMLESS[path].items() if key in known}
        assert ours == {key: known[key] for key in ours}
        assert ours, path


def placed(path, key, value):
    """The JSON that says one thing."""
    said = {key: value}
    for section in reversed(path.split(".") if path else []):
        said = {section: said}
    return said


def refusal(raw) -> str:
    with pytest.raises(ValueError) as caught:
        resolve_ds_config(raw, TrainConfig(), 2, "cpu", "fp32")
    return str(caught.value)


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_refused_is_refused_whatever_it_says(key):
    for value in ({}, False, None):
        assert refusal({key: value}) == f'DeepSpeed JSON: "{key}" is not supported: {REFUSED[key]}; remove it'


HARMLESS_KEYS = [(path, key) for path, keys in HARMLESS.items() for key in keys]


@pytest.mark.parametrize(("path", "key"), HARMLESS_KEYS)
def test_what_changes_nothing_may_stand_and_all_else_is_refused_with_the_reason(path, key):
    refused = HARMLESS[path][key]
    assert checked(placed(path, key, refused.harmless)) == placed(path, key, refused.harmless)
    for value in (True, 7, 0.5, {}, "yes"):
        if value != refused.harmless or type(value) is not type(refused.harmless):
            name = f"{path}.{key}" if path else key
            assert f'"{name}" is not supported: {refused.reason}; remove it' in refusal(placed(path, key, value))


VALUES = [
    (path, key) for path, keys in PASSED.items() for key, kind in keys.items() if kind not in (SECTION, typing.Any)
]
NONSENSE = (
    None, [], {}, [1], -2, -(10**30), 10**30, 1e300, float("nan"), float("inf"), "", "yes", "\ud800", [[]], [{}],
)  # fmt: skip


@pytest.mark.parametrize(("path", "key"), VALUES)
def test_values_of_another_type_or_beyond_all_bounds_are_refused_by_name(path, key):
    """Texts and lists of texts take some of these."""
    taken = {"output_file": 2, "lower_precision_safe_modules": 1, "keep_in_fp32_modules": 1, "prof_ops": 1}
    taken |= dict.fromkeys(("classes", "names", "name_suffixes"), 1)
    told = []
    for value in NONSENSE:
        try:
            checked(placed(path, key, value))
        except ValueError as error:
            told.append(str(error))
    assert len(told) == len(NONSENSE) - taken.get(key, 0)
    name = f"{path}.{key}" if path else key
    assert all(f'"{name}" is ' in text and "must be " in text for text in told)


@pytest.mark.parametrize("path", [path for path in PASSED if path])
def test_sections_are_objects(path):
    above, _, key = path.rpartition(".")
    for value in ([], 5, "on", True):
        assert f'"{path}" is {json.dumps(value)}: must be an object' in refusal(placed(above, key, value))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"zero_optimization": {"stge": 3}}, '"zero_optimization.stge" is not a key that this trainer passes on; did'),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, '"zero_optimization.offload_param.devise" is no'),
        ({"zero_optimization": {"max_live_parameters": 5}}, 'write "stage3_max_live_parameters"'),
        ({"comms_logger": {"a": 1}}, "known are debug, enabled"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"super_offload": True}}}, "not pass the regulariser"),
    ],
)  # fmt: skip
def test_what_deepspeed_would_ignore_or_step_elsewhere_for(tmp_path, raw, message):
    assert message in refusal(raw)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(raw))
    with pytest.raises(ValueError) as caught:
        read_ds_config(file)
    assert str(caught.value).startswith(f"{file}: DeepSpeed JSON: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "more than 64 lists and objects are inside one another"),
        ('{"_a": ' + "[" * 65 + "]" * 65 + "}", "more than 64 lists"),
        ('{"gradient_clipping": NaN}', "NaN is not a number in JSON"),
        ('{"gradient_clipping": -Infinity}', "-Infinity is not a number in JSON"),
        ('{"train_batch_size": ' + "1" * 5000 + "}", "digits"),
        ('{"train_batch_size": 1' + "0" * 4000 + "}", "..."),
        ("\x00", "not valid JSON"),
    ],
)
def test_text_that_is_no_json_or_has_no_end(tmp_path, text, message):
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_ds_config(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 500


def sample(kind):
    """A value of a type of `PASSED` that says something."""
    if kind is SECTION:
        return {}
    for value in (False, ["torch.nn.Linear"], 3, "fp32", "bfloat16", "cpu", "out.txt"):
        with contextlib.suppress(ValidationError):
            return TypeAdapter(kind, config={"strict": True}).validate_python(value)
    raise AssertionError(kind)


def test_deepspeed_takes_everything_that_is_passed_on():
    from deepspeed.runtime.config import DeepSpeedConfig

    raw = {}
    for path, keys in PASSED.items():
        section = raw
        for part in path.split(".") if path else []:
            section = section[part]
        section |= {key: sample(kind) for key, kind in keys.items()}
    raw["train_batch_size"], raw["zero_optimization"]["zero_hpz_partition_size"] = 9, 1
    understood = DeepSpeedConfig(resolve_ds_config(raw, TrainConfig(), 1, "cpu", "fp32").ds)
    assert understood.zero_config.sub_group_size == understood.flops_profiler_config.top_modules == 3
    assert understood.zero_config.leaf_module.names == ["torch.nn.Linear"]
    assert understood.zero_config.offload_param.device == "cpu"
    assert understood.zero_config.prefetch_bucket_size == 3


def test_auto_counts_as_not_said_everywhere_but_in_zero():
    raw = {"memory_breakdown": "auto", "flops_profiler": {"enabled": "auto", "detailed": True}, "fp16": "auto"}
    assert without_auto(checked(raw)) == {"flops_profiler": {"detailed": True}, "fp16": {}}
    assert resolve_ds_config(raw, TrainConfig(), 1, "cpu", "fp32").ds.keys().isdisjoint({"memory_breakdown", "fp16"})
    assert without_auto({"zero_optimization": {"zero_hpz_partition_size": "auto"}})["zero_optimization"]


def test_whole_numbers_may_be_written_as_powers_and_comments_stay():
    raw = json.loads('{"train_batch_size": 4.0, "zero_optimization": {"sub_group_size": 1e9}, "_why": [1, 2]}')
    found = checked(raw)
    assert found == {"train_batch_size": 4, "zero_optimization": {"sub_group_size": 10**9}, "_why": [1, 2]}
    assert isinstance(found["train_batch_size"], int)
    assert isinstance(found["zero_optimization"]["sub_group_size"], int)
