"""Files and rows as people have them: each is learned as written, left out and counted, or refused by name."""

import pytest

from benchmarks.helpers.silent_changes import CASES, fault_of
from tests.helpers.chat_tokenizer import chat_tokenizer


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_is_changed_silently(case, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    assert fault_of(case, tmp_path / "data", chat_tokenizer()) == ""
