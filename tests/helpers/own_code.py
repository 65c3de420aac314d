"""A model that brings Python of its own, which leaves a file behind when it runs."""

import json
from pathlib import Path

from tests.helpers.architectures import save
from tests.helpers.chat_tokenizer import chat_tokenizer

CODE = "own.py"
_CLASSES = {
    "config.json": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    "tokenizer_config.json": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
}


def save_with_code(folder: Path, marker: Path) -> Path:
    """A small Llama whose configuration names its own classes; their file makes `marker` when it is imported.

    transformers knows a Llama without these classes too, so that the model can be used with and without them.
    """
    save("llama", folder)
    chat_tokenizer().save_pretrained(folder)
    leave_behind(folder, marker)
    for name, classes in _CLASSES.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "auto_map": classes}))
    return folder


def leave_behind(folder: Path, marker: Path) -> None:
    """Write the model's code, which makes `marker`."""
    (folder / CODE).write_text(
        "from pathlib import Path\n\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n\n"
        f"Path({str(marker)!r}).touch()\n\n\n"
        "class OwnConfig(LlamaConfig):\n    pass\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n\n\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
