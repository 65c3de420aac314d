"""The DeepSpeed JSON: one place of truth, the batch identity, precision sections, refusals, the shipped files."""

import json
from pathlib import Path

import pytest

from sorsa_ds.config.batch_size import BatchSizes, resolve_batch_sizes
from sorsa_ds.config.deepspeed_json import precision_from_json, read_ds_config, resolve_ds_config, train_settings
from sorsa_ds.config.deepspeed_sections import BUFFERS
from sorsa_ds.config.schema import DataConfig, RunConfig, TrainConfig

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
shipped = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)


def resolved(raw, world_size=2, device="cpu", precision="fp32", node_ranks=None, max_length=None, **train):
    return resolve_ds_config(raw, TrainConfig(**train), world_size, device, precision, node_ranks, max_length)


def refusal(raw, **how) -> str:
    with pytest.raises(ValueError) as caught:
        resolved(raw, **how)
    return str(caught.value)


def test_defaults_where_nobody_says_anything():
    for raw in ({}, {"train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}):
        found = resolved(raw)
        assert (found.micro_batch_size, found.gradient_accumulation_steps, found.global_batch_size) == (2, 1, 4)
        assert found.zero_stage == 0
        assert found.ds["gradient_clipping"] == found.gradient_clipping == 1.0
        assert found.ds["train_batch_size"] == 4
        assert found.ds["zero_force_ds_cpu_optimizer"] is False
        assert found.ds["zero_allow_untested_optimizer"] is True
        assert found.ds["wall_clock_breakdown"] is False
        assert found.ds["steps_per_print"] >= 10**9
        assert found.ds["bf16"] == {"enabled": False}


def test_what_the_json_says_is_kept_and_the_input_is_left_alone():
    raw = {"steps_per_print": 5, "wall_clock_breakdown": True, "comms_logger": {"enabled": True}, "bf16": {}}
    before = json.dumps(raw)
    found = resolved(raw).ds
    assert (found["steps_per_print"], found["wall_clock_breakdown"]) == (5, True)
    assert found["comms_logger"] == {"enabled": True}
    assert json.dumps(raw) == before


@pytest.mark.parametrize(
    ("key", "field", "one", "other"),
    [
        ("train_batch_size", "global_batch_size", 8, 16),
        ("train_micro_batch_size_per_gpu", "micro_batch_size", 2, 4),
        ("gradient_accumulation_steps", "gradient_accumulation_steps", 1, 3),
        ("gradient_clipping", "gradient_clipping", 1.0, 0.5),
    ],
)
def test_one_place_of_truth(key, field, one, other):
    assert resolved({key: one}).ds[key] == one
    assert resolved({key: "auto"}, **{field: one}).ds[key] == one
    assert resolved({key: one}, **{field: one}).ds[key] == one
    message = refusal({key: one}, **{field: other})
    assert f'"{key}" is {one} in the DeepSpeed JSON, but train.{field} is {other}' in message


def test_a_micro_batch_that_the_planner_chooses_may_be_said_in_either_place():
    for found in (resolved({"train_micro_batch_size_per_gpu": "auto"}, global_batch_size=24),
                  resolved({}, micro_batch_size="auto", global_batch_size=24),
                  resolved({"train_micro_batch_size_per_gpu": "auto", "train_batch_size": 24}, micro_batch_size="auto"),
                  ):  # fmt: skip
        assert found.micro_choices == (1, 2, 3, 4, 6, 12)
        assert (found.micro_batch_size, found.gradient_accumulation_steps) == (1, 12)  # until it is chosen
        chosen = found.with_micro_batch(4)
        assert (chosen.micro_batch_size, chosen.gradient_accumulation_steps, chosen.global_batch_size) == (4, 3, 24)
        assert chosen.micro_choices == ()
        assert chosen.ds == found.ds | {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}
        assert found.ds["train_micro_batch_size_per_gpu"] == 1
    message = refusal({"train_micro_batch_size_per_gpu": 4}, micro_batch_size="auto")
    assert '"train_micro_batch_size_per_gpu" is 4 in the DeepSpeed JSON, but train.micro_batch_size is auto' in message


@pytest.mark.parametrize("accumulation", [None, 3])
def test_the_planner_does_not_change_the_global_batch(accumulation):
    left, auto = (resolved({}, micro_batch_size=micro, gradient_accumulation_steps=accumulation)
                  for micro in (None, "auto"))  # fmt: skip
    assert auto.global_batch_size == left.global_batch_size
    if accumulation:  # which leaves nothing to choose
        assert auto == left


@pytest.mark.parametrize(
    ("positions", "expected"),
    [(512, (1, 8)), (1023, (1, 8)), (1024, (2, 4)), (1600, (2, 4)), (2048, (4, 2)), (4096, (8, 1)), (10**9, (8, 1))],
)
def test_the_micro_batch_follows_from_its_positions_and_deepspeed_takes_it(positions, expected):
    from deepspeed.runtime.config import DeepSpeedConfig

    found = resolved({}, max_length=512, micro_batch_tokens=positions, global_batch_size=16)
    assert (found.micro_batch_size, found.gradient_accumulation_steps) == expected
    assert found.global_batch_size == 16
    again = resolved(
        {"train_micro_batch_size_per_gpu": expected[0]}, max_length=512, micro_batch_tokens=positions,
        global_batch_size=16, gradient_accumulation_steps=expected[1],
    )  # fmt: skip
    assert again == found
    alone = resolve_ds_config({}, TrainConfig(micro_batch_tokens=positions), 1, "cpu", "fp32", None, 512).ds
    assert DeepSpeedConfig(alone).train_batch_size == 2  # as where the micro-batch is unset


@pytest.mark.parametrize(
    ("raw", "given", "message"),
    [
        ({}, {"micro_batch_size": 4}, "so train.micro_batch_size (JSON: train_micro_batch_size_per_gpu) is 2 here"),
        ({"train_micro_batch_size_per_gpu": 8}, {}, "is 2 here and cannot be 8: leave it out"),
        ({"train_micro_batch_size_per_gpu": "auto"}, {}, "is 2 here and cannot be auto"),
        ({}, {"micro_batch_size": "auto"}, "or write train.micro_batch_tokens=auto"),
        ({}, {"gradient_accumulation_steps": 8}, "so train.gradient_accumulation_steps"),
    ],
)
def test_positions_and_another_micro_batch_are_refused(raw, given, message):
    told = refusal(raw, max_length=512, micro_batch_tokens=1024, global_batch_size=16, **given)
    assert message in told
    assert "train.micro_batch_tokens holds 2 examples of data.max_length tokens" in told


def test_automatic_positions_leave_the_micro_batch_as_it_is():
    for micro in (None, 4, "auto"):
        one, other = (resolved({}, micro_batch_size=micro, micro_batch_tokens=asked) for asked in (None, "auto"))
        assert one == other


def test_positions_that_do_not_go_with_the_data_are_refused():
    with pytest.raises(ValueError, match="micro_batch_tokens=511 has no room for an example of data.max_length=512"):
        RunConfig(train=TrainConfig(micro_batch_tokens=511))
    for asked in (512, "auto"):
        with pytest.raises(ValueError, match=f"train.micro_batch_tokens={asked} .* data.packing=true"):
            RunConfig(train=TrainConfig(micro_batch_tokens=asked), data=DataConfig(packing=True))


def test_an_indivisible_batch_is_refused_before_anything_is_planned():
    assert "9 is not 2 ranks x a whole number" in refusal({}, micro_batch_size="auto", global_batch_size=9)


def test_clipping_off_is_written_as_zero():
    assert resolved({}, gradient_clipping=0).ds["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None), (6, 2, 1)),
        ((None, 4, None), (12, 4, 1)),
        ((None, None, 5), (30, 2, 5)),
        ((None, 4, 5), (60, 4, 5)),
        ((12, None, None), (12, 2, 2)),
        ((9, None, None), (9, 1, 3)),
        ((36, 4, None), (36, 4, 3)),
        ((36, None, 4), (36, 3, 4)),
        ((24, 4, 2), (24, 4, 2)),
    ],
)
def test_batch_identity_on_three_ranks(given, expected):
    found = resolve_batch_sizes(3, *given)
    assert found == BatchSizes(*expected)
    assert found.global_size == found.micro * found.accumulation * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((32, None, None), "32 is not 3 ranks x a whole number (nearest valid sizes: 30 and 33)"),
        ((32, 4, None), "32 is not 3 ranks x micro-batch 4 x a whole number (nearest valid sizes: 24 and 36)"),
        ((2, 4, None), "(nearest valid sizes: 12)"),
        ((32, None, 2), "32 is not 3 ranks x 2 accumulation steps x a whole number (nearest valid sizes: 30 and 36)"),
        ((48, 4, 2), "48 is not 3 ranks x micro-batch 4 x 2 accumulation steps (their product is 24; leave one"),
    ],
)
def test_indivisible_batch_names_the_nearest(given, message):
    with pytest.raises(ValueError) as caught:
        resolve_batch_sizes(3, *given)
    assert message in str(caught.value)


def test_precision_sections():
    stage2 = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    fp32, mixed, bf16 = (resolved(stage2, precision=name).ds for name in ("fp32", "mixed", "bf16"))
    assert (fp32["bf16"], fp32["torch_autocast"]) == ({"enabled": False}, {"enabled": False})
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert (mixed["bf16"], mixed["torch_autocast"]) == ({"enabled": False}, autocast)
    assert (bf16["bf16"], bf16["torch_autocast"]) == ({"enabled": True}, {"enabled": False})
    assert bf16["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in fp32
    assert "data_types" not in mixed


def test_accumulation_type_is_kept_if_said_and_absent_on_stage_0():
    said = {"zero_optimization": {"stage": 3}, "data_types": {"grad_accum_dtype": "bf16"}}
    assert resolved(said, precision="bf16").ds["data_types"] == {"grad_accum_dtype": "bf16"}
    assert resolved({}, precision="bf16").ds["data_types"] == {}


@pytest.mark.parametrize(
    ("raw", "asks", "precision"),
    [
        ({"bf16": {"enabled": True}}, "bf16", "fp32"),
        ({"bf16": {"enabled": False}}, None, "bf16"),
        ({"torch_autocast": {"enabled": True}}, "mixed", "bf16"),
        ({"torch_autocast": {"enabled": False}}, None, "mixed"),
    ],
)
def test_precision_said_in_the_json(raw, asks, precision):
    assert precision_from_json(raw) == asks
    assert f"but the precision is {precision}" in refusal(raw, precision=precision)
    if asks:
        assert resolved(raw, precision=asks).ds[next(iter(raw))]["enabled"] is True


def test_nothing_said_about_precision():
    assert precision_from_json({"bf16": {"enabled": "auto"}}) is None
    assert precision_from_json({}) is None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"fp16": {"enabled": True}}, "train with bf16"),
        ({"gradient_clippping": 0.5}, 'did you mean "gradient_clipping"'),
        ({"zero_optimisation": {"stage": 3}}, 'did you mean "zero_optimization"'),
        ({"zero_optimization": {"stage": "auto"}}, "write 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "write offload_optimizer"),
        ({"amp": {"enabled": True}}, "write bf16"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "fp32 masters"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, 'is "bf16", but the precision is fp32'),
        ({"zero_optimization": {"stage": 4}}, "must be integer from 0 to 3"),
        ({"zero_optimization": True}, "must be an object"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "loading and the regulariser write to memory",
        ),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs ZeRO stage 1 or 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs ZeRO stage 3, not 2"),
        ({"train_batch_size": 2.5}, "must be integer from 1 to 1,000,000"),
        ({"train_batch_size": 10**18}, "must be integer from 1 to 1,000,000"),
        ({"gradient_clipping": "much"}, '"gradient_clipping" is "much": must be number from 0'),
        ({"gradient_clipping": True}, "must be number"),
        (
            {"train_micro_batch_size_per_gpu": 10**6, "gradient_accumulation_steps": 10**6},
            "are 2,000,000,000,000 examples per optimizer step; there can be up to 1,000,000",
        ),
    ],
)
def test_refusals_say_why(raw, message):
    assert message in refusal(raw)


def of_a_node(size, stage=3):
    return {"zero_optimization": {"stage": stage, "zero_hpz_partition_size": size}}


@pytest.mark.parametrize(
    ("size", "world_size", "node_ranks", "resolved_to"),
    [("auto", 6, 2, 2), (2, 6, 2, 2), ("auto", 2, 1, 1), (1, 2, 1, 1), ("auto", 2, None, None), ("auto", 2, 2, None)],
)
def test_frozen_tensors_are_cut_among_the_ranks_of_a_node(size, world_size, node_ranks, resolved_to):
    zero = resolved(of_a_node(size), world_size=world_size, node_ranks=node_ranks).ds["zero_optimization"]
    assert zero.get("zero_hpz_partition_size") == resolved_to


@pytest.mark.parametrize(
    ("size", "stage", "world_size", "node_ranks", "message"),
    [
        ("auto", 2, 4, 2, "needs ZeRO stage 3, not 2"),
        ("auto", 3, 3, 0, "needs as many ranks on every node"),
        ("auto", 3, 3, 2, "needs as many ranks on every node"),
        (4, 3, 4, 2, 'is 4, but a node has 2 ranks; write "auto"'),
        (1, 3, 4, 2, 'is 1, but a node has 2 ranks; write "auto"'),
        ("all", 3, 4, 2, 'is "all": must be integer'),
    ],
)
def test_node_sharding_that_cannot_be_is_refused(size, stage, world_size, node_ranks, message):
    assert message in refusal(of_a_node(size, stage), world_size=world_size, node_ranks=node_ranks)


def test_what_deepspeed_has_removed_is_refused_with_the_reason():
    raw = {"zero_optimization": {"stage": 3, "mics_shard_size": 2}}
    assert "DeepSpeed has removed MiCS; zero_hpz_partition_size keeps the residual inside a node" in refusal(raw)


@pytest.mark.parametrize("key", BUFFERS)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_memory_depends_on_is_written_out_as_deepspeed_understands_it(key, stage):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    auto, absent = (resolved({"zero_optimization": {"stage": stage, **said}}).ds for said in ({key: "auto"}, {}))
    understood = DeepSpeedZeroConfig(stage=stage).model_dump(by_alias=True)[key]
    assert auto["zero_optimization"][key] == absent["zero_optimization"][key] == understood


def test_a_whole_number_may_be_written_as_a_power():
    raw = json.loads('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 2e8}}')
    assert resolved(raw).ds["zero_optimization"]["reduce_bucket_size"] == 200_000_000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reduce_bucket_size", "large"), ("reduce_bucket_size", 0), ("stage3_max_live_parameters", 2.5),
        ("stage3_prefetch_bucket_size", -1), ("stage3_param_persistence_threshold", None), ("overlap_comm", 3),
    ],
)  # fmt: skip
def test_what_deepspeed_would_not_take_is_refused_by_name(key, value):
    message = refusal({"zero_optimization": {"stage": 3, key: value}})
    assert f'"zero_optimization.{key}" is {json.dumps(value)}: must be ' in message


def test_what_the_json_says_of_training_can_be_said_elsewhere():
    raw = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": True},
        "gradient_clipping": 0,
    }
    said = train_settings(raw)
    assert said == {"global_batch_size": 8, "gradient_clipping": 0, "precision": "bf16"}
    assert resolved({}, **said).global_batch_size == resolved(raw, precision="bf16").global_batch_size == 8
    assert train_settings({"train_micro_batch_size_per_gpu": "auto"}) == {"micro_batch_size": "auto"}


def test_autocast_in_fp16_is_refused():
    assert "must be bfloat16" in refusal({"torch_autocast": {"enabled": True, "dtype": "fp16"}}, precision="mixed")


def test_offload_pins_memory_only_beside_a_gpu():
    raw = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    for device, pinned in (("cpu", False), ("cuda", True)):
        found = resolved(raw, device=device)
        assert "offload_param" not in found.ds["zero_optimization"]
        assert found.ds["zero_optimization"]["offload_optimizer"]["pin_memory"] is pinned
    none = resolved({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}})
    assert "offload_optimizer" not in none.ds["zero_optimization"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "a": 1,\n}', ":3:1: not valid JSON"),
        ("[1]", "an object"),
        ('{"a": 1, "a": 2}', '"a" is set twice'),
    ],
)
def test_broken_json_names_the_place(tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_ds_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_json(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json: No such file"):
        read_ds_config(tmp_path / "nowhere.json")


def test_all_files_are_shipped():
    assert {path.stem for path in SHIPPED} == {"stage0", "zero1", "zero2", "zero3", "zero3_offload", "zero3_multinode"}


@shipped
def test_shipped_file_leaves_the_choices_to_the_trainer(path):
    raw = read_ds_config(path)
    assert precision_from_json(raw) is None
    assert resolved(raw).micro_batch_size == 2 and resolved(raw).micro_choices == ()
    own = {key: value for key, value in raw.items() if key != "zero_optimization"}
    assert own.pop("bf16") == {"enabled": "auto"}
    assert set(own.values()) == {"auto"}


@shipped
@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_deepspeed_accepts_the_resolved_file(path, precision):
    """What DeepSpeed itself understands must be what was resolved."""
    from deepspeed.runtime.config import DeepSpeedConfig

    found = resolved(
        read_ds_config(path), world_size=1, precision=precision, global_batch_size=6, gradient_clipping=0.5
    )
    understood = DeepSpeedConfig(found.ds)
    assert understood.zero_optimization_stage == found.zero_stage == int("".join(filter(str.isdigit, path.stem)))
    assert (understood.train_batch_size, understood.train_micro_batch_size_per_gpu) == (6, 2)
    assert understood.gradient_accumulation_steps == 3
    assert understood.gradient_clipping == 0.5
    assert understood.bfloat16_config.enabled is (precision == "bf16")
    assert understood.torch_autocast_enabled is (precision == "mixed")
    assert understood.zero_allow_untested_optimizer is True
    assert understood.zero_force_ds_cpu_optimizer is False
    assert (understood.zero_config.offload_optimizer is not None) == ("offload" in path.stem)
    assert (understood.zero_config.offload_param is not None) == ("offload" in path.stem)
