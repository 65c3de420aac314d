"""Names that people bring from other trainers: the right answer for each, and the tables from which it comes."""

import collections
import dataclasses
import re

import pytest
import yaml
from peft import LoraConfig
from transformers import TrainingArguments

from benchmarks.names import answer, judge
from sorsa_ds.config.fields import leaves
from sorsa_ds.config.other_names import TABLES, here, hint
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.train.options import TRAIN_OPTIONS
from tests.helpers.foreign_names import RIGHT
from tests.helpers.projects import ROOT

NAMES = {last.rpartition(".")[2] for last in leaves(RunConfig)}


@pytest.mark.parametrize("name", RIGHT)
def test_the_answer_to_another_trainers_name_is_the_right_one(name):
    assert judge(name, RIGHT[name]) == "right_hint", answer(name)


@pytest.mark.parametrize("owner", [TrainingArguments, LoraConfig])
def test_every_setting_of_the_trainer_and_of_lora_is_answered(owner):
    names = [field.name for field in dataclasses.fields(owner)]
    assert [name for name in names if name not in NAMES and hint(name) is None] == []


def test_the_tables_name_settings_that_exist_and_each_other_name_once():
    tables = yaml.safe_load(TABLES.read_text())
    known = {*leaves(RunConfig), *(f"--{option}" for option in TRAIN_OPTIONS)}
    assert {one.partition("=")[0] for one in tables["same"]} <= known
    names = [name for key in ("same", "absent") for told in tables[key].values() for name in told.split()]
    assert [name for name, count in collections.Counter(names).items() if count > 1] == []
    assert not NAMES & set(names)


def test_the_page_for_people_from_other_trainers_says_what_the_tables_say():
    page = (ROOT / "docs" / "coming_from.md").read_text()
    rows = re.findall(r"^\| (`.*`) \| `([^`]+)` \|$", page, re.MULTILINE)
    assert len(rows) > 40
    for names, said in rows:
        for name in re.findall(r"`([^`]+)`", names):
            found = here(name)
            own = said.rpartition(".")[2] == name and said in leaves(RunConfig)
            assert own or hint(name) == f"here it is {said}", name
            assert not (own and found), name


def test_case_hyphens_and_sections_do_not_matter():
    assert hint("Load-In-4bit") == "here it is residual.storage=nf4"
    assert "here it is train.epochs" in answer("train.num_train_epochs")


@pytest.mark.parametrize("name", ["gpus", "gpu", "num_gpus", "nproc_per_node"])
def test_who_asks_for_gpus_by_a_setting_is_told_the_option(name):
    assert "sorsa train --gpus N, sorsa plan --gpus N" in answer(name)
