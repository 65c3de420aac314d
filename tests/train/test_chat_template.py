"""The chat template that a run is given is kept with it, and a run that goes on uses the copy."""

from types import SimpleNamespace

import torch

from sorsa_ds.train.origin import NewRun, ResumedRun
from sorsa_ds.train.setup import keep_chat_template

CPU = torch.device("cpu")


def test_a_run_keeps_its_template_and_goes_on_with_it(tmp_path):
    resumed = ResumedRun(SimpleNamespace(run=tmp_path))
    keep_chat_template(SimpleNamespace(folder=tmp_path), SimpleNamespace(chat_template=None), CPU)
    assert resumed.chat_template is None, "the tokenizer's own is no copy's business"
    keep_chat_template(SimpleNamespace(folder=tmp_path), SimpleNamespace(chat_template="{{ mine }}"), CPU)
    assert resumed.chat_template == tmp_path / "adapter" / "chat_template.jinja"
    assert resumed.chat_template.read_text() == "{{ mine }}"
    assert NewRun(again=True).chat_template is None
