"""The chat template that a run is given is kept with it, and a run that goes on uses the copy."""

from pathlib import Path
from types import SimpleNamespace

import torch

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.train.kept_tokenizer import keep_chat_template
from sorsa_ds.train.origin import NewRun, ResumedRun

CPU = torch.device("cpu")


def test_a_run_keeps_its_template_and_goes_on_with_it(tmp_path):
    resumed, asked = ResumedRun(SimpleNamespace(run=tmp_path)), DataConfig(chat_template="moved.jinja")
    keep_chat_template(tmp_path, SimpleNamespace(chat_template=None), CPU)
    assert resumed.data_settings(asked) == asked, "the tokenizer's own is no copy's business"
    keep_chat_template(tmp_path, SimpleNamespace(chat_template="{{ mine }}"), CPU)
    kept = resumed.data_settings(asked).chat_template
    assert kept == str(tmp_path / "adapter" / "chat_template.jinja")
    assert Path(kept).read_text() == "{{ mine }}"
    assert NewRun(again=True).data_settings(asked) == asked


def test_a_run_that_begins_anew_without_a_template_does_not_keep_the_old_one(tmp_path):
    keep_chat_template(tmp_path, SimpleNamespace(chat_template="{{ mine }}"), CPU)
    keep_chat_template(tmp_path, SimpleNamespace(chat_template=None), CPU)
    assert not (tmp_path / "adapter" / "chat_template.jinja").exists()
