"""The chat template of a run that was trained in another than the tokenizer's own: it goes with what is exported."""

import json
from pathlib import Path

from sorsa_ds.run.paths import CHAT_TEMPLATE
from sorsa_ds.run.source import Source
from sorsa_ds.runtime.files import write_json, write_text

_TOKENIZER_SETTINGS = "tokenizer_config.json"
_OTHERS = "additional_chat_templates"


def write_chat_template(source: Source, folder: Path) -> list[str]:
    """Put the run's chat template, if it has one, into a folder of an export, in the place of the tokenizer's own.

    Returns:
        A sentence for whoever serves the export, where there is a template.

    Raises:
        OSError: the disk refuses.
    """
    kept = source.adapter / CHAT_TEMPLATE
    if not kept.exists():
        return []
    write_text(folder / CHAT_TEMPLATE, kept.read_text(encoding="utf-8"))
    for other in (folder / _OTHERS).glob("*"):
        other.unlink()
    settings = folder / _TOKENIZER_SETTINGS
    if not settings.exists():
        return [
            f"Conversations were learned in a chat template of their own, {CHAT_TEMPLATE}: serve the base model with "
            f"it (vllm serve --chat-template {CHAT_TEMPLATE})."
        ]
    described = json.loads(settings.read_text(encoding="utf-8"))
    if described.pop("chat_template", None) is not None:  # two templates would leave open which one counts
        write_json(settings, described)
    return [f"Conversations were learned in a chat template of their own; it is this tokenizer's {CHAT_TEMPLATE}."]
