"""The shapes of well-known models: one folder each with the part of their config.json that decides the architecture.

They stand in for the hub where weights are not needed: planning, and the tests of the recipes. `_copies` are names
under which the hub has the same model in another number format.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def shipped(model: str) -> Path | None:
    """The folder of the shape that ships for a hub name (`meta-llama/Llama-2-7b-hf`), or None if there is none."""
    for config in sorted(FOLDER.glob("*/config.json")):
        shape = json.loads(config.read_text(encoding="utf-8"))
        if model in (shape["_name_or_path"], *shape.get("_copies", ())):
            return config.parent
    return None
