"""Names that settings had in earlier versions: read everywhere, told once, and refused where both say two things."""

import copy
import pickle
from dataclasses import asdict, replace

import pytest
from pydantic import ValidationError

import sorsa_ds
from sorsa_ds.config.differences import differences
from sorsa_ds.config.fields import leaves
from sorsa_ds.config.renamed import RENAMED, renamed_sections
from sorsa_ds.config.schema import AdapterConfig, ResidualConfig, RunConfig
from sorsa_ds.config.yaml_io import flat
from sorsa_ds.model.quantisation_rounds import settings
from sorsa_ds.plan import options as plan
from sorsa_ds.runtime.precision import resolve_precision
from sorsa_ds.train.options import parse

EARLIER = {
    "targets": ["q_proj"], "exclude": ["1.q_proj"], "train_whole": ["norm"], "rank": 32, "experts": "frozen",
    "expert_rank": 4, "rank_pattern": {"q_proj": 3}, "alpha": 8.0, "dropout": 0.1,
}  # fmt: skip
"""A value of every setting that the section `sorsa` had in version 0.1.0, and that is in `adapter` now."""


def earlier(config: RunConfig) -> dict:
    """Settings as an earlier version would have saved them."""
    saved = asdict(config)
    moved = {name: saved["adapter"].pop(name) for name in EARLIER}
    del saved["adapter"]
    return {**saved, "sorsa": moved | saved["sorsa"]}


def test_every_earlier_name_is_one_that_is_gone_for_one_that_is_there():
    assert {f"sorsa.{name}" for name in EARLIER} == RENAMED.keys()
    assert not RENAMED.keys() & leaves(RunConfig).keys()
    assert {*RENAMED.values()} <= leaves(RunConfig).keys()


@pytest.mark.parametrize("name", EARLIER)
def test_a_program_of_an_earlier_version_is_told_where_a_field_is_now(name):
    with pytest.raises(ValueError) as error:
        sorsa_ds.SorsaConfig(svd="exact", **{name: EARLIER[name]})
    assert str(error.value) == (
        f"SorsaConfig has no {name}: all methods share that now, as sorsa_ds.AdapterConfig({name}=...)"
    )
    assert getattr(sorsa_ds.AdapterConfig(**{name: EARLIER[name]}), name) == EARLIER[name]


def test_settings_of_sorsa_are_copied_and_stored_as_any_others():
    config = sorsa_ds.SorsaConfig(svd="exact")
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == replace(config, svd="exact") == config
    with pytest.raises(ValidationError, match="rnak"):
        sorsa_ds.SorsaConfig(rnak=3)


@pytest.mark.parametrize("words", [["sorsa.rank=32"], ["--sorsa.rank", "32"], ["--sorsa.rank=32"]])
def test_a_command_line_of_an_earlier_version_is_read_with_one_note(words, capsys):
    found = parse([*words, "sorsa.alpha=8"])
    assert found == parse(["adapter.rank=32", "adapter.alpha=8"])
    assert found.on_command_line == {"adapter.rank", "adapter.alpha"}
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == (
        "sorsa.rank is called adapter.rank now (command line: sorsa.rank=32); sorsa.alpha is called adapter.alpha now "
        "(command line: sorsa.alpha=8). Earlier names are still read.\n"
    )
    assert plan.parse(words).config.adapter.rank == 32


def test_a_file_of_an_earlier_version_is_read_with_one_note(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("sorsa:\n  rank: 32\n  svd: exact\n  targets: [q_proj]\n")
    config = parse(["--config", str(file), "adapter.rank=4"]).config
    assert (config.adapter.rank, config.adapter.targets, config.sorsa.svd) == (4, ["q_proj"], "exact")
    assert capsys.readouterr().err.count(" is called ") == 2
    parse(["--config", str(file)], tell=lambda text: None)
    assert capsys.readouterr().err == ""


def test_both_names_are_refused_where_they_say_two_things(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("sorsa: {rank: 32}\nadapter: {rank: 16}\n")
    for words, places in (
        (["--config", str(file)], (f"32 ({file}:1)", f"16 ({file}:2)")),
        (["adapter.rank=16", "sorsa.rank=32"], ("command line: adapter.rank=16", "command line: sorsa.rank=32")),
    ):
        with pytest.raises(ValueError, match="sorsa.rank is the earlier name of adapter.rank") as error:
            parse(words)
        assert all(place in str(error.value) for place in places)
    assert parse(["adapter.rank=32", "sorsa.rank=32"]).config.adapter.rank == 32


def test_saved_settings_of_an_earlier_version_are_those_of_now():
    config = RunConfig(adapter=AdapterConfig(**EARLIER))
    saved = earlier(config)
    assert renamed_sections(saved) == {**asdict(config), "adapter": EARLIER}
    assert saved == earlier(config), "what was read is changed"
    assert differences(config, renamed_sections(saved)) == {}
    changed = differences(RunConfig(), renamed_sections(saved))
    assert changed.keys() == {f"adapter.{name}" for name in EARLIER}
    with pytest.raises(ValueError, match="sorsa.rank is the earlier name of adapter.rank, and they are 8 and 9"):
        renamed_sections({"sorsa": {"rank": 8}, "adapter": {"rank": 9}})
    assert flat(renamed_sections({"sorsa": {"rank": 8}, "adapter": {"rank": 8}})) == {"adapter.rank": 8}


def test_decompositions_that_an_earlier_version_has_kept_are_found():
    """The literal is what version 0.1.0 put into the key of the cache."""
    fp32, residual = resolve_precision("fp32", None, "cpu"), ResidualConfig(storage="nf4", iterations=3)
    before = {"residual": {"storage": "nf4", "block_size": 64, "iterations": 3}, "precision": "fp32", "alpha": 8.0}
    assert settings(AdapterConfig(alpha=8.0), residual, fp32) == before
    assert settings(AdapterConfig(alpha=8.0, rslora=True), residual, fp32) != before
