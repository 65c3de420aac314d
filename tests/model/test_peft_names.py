"""PEFT's names are PEFT's, and written down once."""

import ast

from peft import LoraConfig, get_peft_model, utils
from torch import nn

from sorsa_ds.model import peft_names
from tests.helpers.projects import ROOT


def test_they_are_pefts():
    assert (utils.CONFIG_NAME, utils.SAFETENSORS_WEIGHTS_NAME) == (peft_names.CONFIG, peft_names.WEIGHTS)
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
    assert model.active_adapter == peft_names.ONLY_ADAPTER
    assert all(name.startswith(peft_names.PREFIX) for name, _ in model.named_parameters())


def test_no_other_module_has_them_too():
    names = {peft_names.CONFIG, peft_names.WEIGHTS, peft_names.PREFIX}
    found = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "sorsa_ds").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert found == {"sorsa_ds/model/peft_names.py"}
