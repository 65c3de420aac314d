"""The model card, and publishing."""

from types import SimpleNamespace

import pytest
from peft import PeftModel

from sorsa_ds.export import card
from sorsa_ds.export.command import Options, export
from sorsa_ds.runtime import hub
from tests.helpers.exported import plainly
from tests.helpers.finished import base_of


@pytest.mark.parametrize("form", ["merged", "lora", "adapter"])
def test_the_card_tells_where_it_comes_from_and_nothing_of_this_machine(runs, tmp_path, form):
    run = runs("llama", precision="mixed")
    card = (export(Options(run, form, tmp_path / "out")) / "README.md").read_text()
    for told in ("library_name:", "# llama, fine-tuned with SORSA", "| rank | 4 |", "gamma = 0.0002", "all-linear",
                 "word-problems", "| held-out loss after | 1.125 |", "PATH_OF_THIS_FOLDER"):  # fmt: skip
        assert told in card, told
    assert ("without that rounding" in card) is (form == "lora")
    assert str(tmp_path) not in card
    assert str(base_of(run).parent) not in card
    assert "base_model:" not in card


class Hub:
    """A stand-in for huggingface_hub.HfApi: the two calls, with its signatures."""

    called: list = []  # noqa: RUF012
    refuse = False

    def create_repo(self, repo_id, *, private=None, repo_type=None, exist_ok=False):
        if self.refuse:
            raise OSError("401: no token")
        self.called.append(("create", repo_id, private))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message=None):
        self.called.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_publishing(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "HfApi", Hub)
    monkeypatch.setattr(hub, "check_logged_in", lambda: None)
    export(Options(runs("llama"), "lora", tmp_path / "out", push_to_hub="mine", private=True))
    assert Hub.called == [
        ("create", "mine", True),
        ("upload", "me/mine", ["README.md", "adapter_config.json", "adapter_model.safetensors"]),
    ]
    monkeypatch.setattr(Hub, "refuse", True)
    with pytest.raises(ValueError, match=r"--push_to_hub mine: 401: no token\nThe export itself is whole: .*kept"):
        export(Options(runs("llama"), "lora", tmp_path / "kept", push_to_hub="mine"))
    PeftModel.from_pretrained(plainly(base_of(runs("llama"))), tmp_path / "kept")


def test_publishing_without_a_login_is_refused_before_anything_is_exported(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"--push_to_hub mine: you are not logged in .*hf auth login.*hf upload mine"):
        export(Options(runs("llama"), "lora", tmp_path / "out", push_to_hub="mine"))
    assert not list(tmp_path.iterdir())
