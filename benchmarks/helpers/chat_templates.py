"""How many of the chat templates that TRL carries are learned exactly, told by other means than the product's own.

What serving makes of a conversation is asked of transformers' `apply_chat_template`, in the ways of writing content and
calls among which templates differ. A template is exact where each conversation is refused for the reason that is known
of it, or the tokens are those of serving, and the learned ones are the assistant's turns: they begin where the prompt
for the turn ends, hold all its words and nobody else's, and end with an end token.
"""

import json
import re
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from sorsa_ds.data.chat import HEADED, KEPT, end_rendering, render_chat
from sorsa_ds.data.chat_templates import trl_templates
from sorsa_ds.data.formats import Rendered
from sorsa_ds.data.tokenize import IGNORED, encode
from tests.helpers.chat_families import CONVERSATIONS, LEARNED, REFUSED, family_tokenizer, is_special_end

_THOUGHT = re.compile(r"(?:<think>\s*(?:</think>\s*)?|<\|channel>thought\s*)\Z")


def count_exact() -> tuple[int, int]:
    """(templates, templates of which every conversation is learned exactly or refused for its true reason)."""
    try:
        exact = [not any(fault_of(name, conversation) for conversation in CONVERSATIONS) for name in trl_templates()]
    finally:
        end_rendering()
    return len(exact), sum(exact)


def fault_of(name: str, conversation: str) -> str:
    """What is wrong with how a conversation is learned under a template; empty where nothing is."""
    tokenizer, row = family_tokenizer(trl_templates()[name]), CONVERSATIONS[conversation]
    reason = REFUSED[conversation].get(name)
    try:
        rendered = Rendered(**render_chat(row, tokenizer)._asdict())
    except ValueError as error:
        if reason is None:
            return f"refused: {error}"
        return "" if re.search(reason, str(error)) else f"refused for another reason than {reason!r}: {error}"
    if reason is not None:
        return f"learned, though {reason}"
    example = encode(rendered, tokenizer, 10**6)
    tokens = list(zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True))
    parts = [
        (learned, tokenizer.decode([token for token, _ in run]))
        for learned, run in groupby(tokens, key=lambda token: token[1] != IGNORED)
    ]
    return (
        _unlike_by_hand(name, conversation, [text for learned, text in parts if learned])
        or _unlike_serving(tokenizer, row, [token for token, _ in tokens], rendered.remarks)
        or _other_than_turns(tokenizer, row, parts, rendered.remarks)
    )


def _unlike_by_hand(name: str, conversation: str, learned: list[str]) -> str:
    expected = LEARNED.get(name, {}).get(conversation, learned)
    return "" if learned == expected else f"learned {learned}, expected {expected}"


def _unlike_serving(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], ids: list[int], remarks: tuple[str, ...]
) -> str:
    """Whether the tokens are not those of serving, apart from an end token that serving's last turn lacks."""
    text = tokenizer.decode(ids)
    for whole in _served(tokenizer, row["messages"], row.get("tools"), prompt=False):
        more = text.removeprefix(whole.rstrip())
        same_ids = tokenizer(whole.rstrip(), add_special_tokens=False)["input_ids"]
        if ids[: len(same_ids)] == same_ids and (not more or is_special_end(more)):
            return ""
    return "" if KEPT in remarks else "other tokens than serving has"


def _other_than_turns(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], parts: list[tuple[bool, str]], remarks: tuple[str, ...]
) -> str:
    """Whether the learned parts are not the assistant's turns, one for one."""
    messages, tools = row["messages"], row.get("tools")
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [place for place, (is_learned, _) in enumerate(parts) if is_learned]
    if len(learned) != len(turns):
        return f"{len(turns)} turns, {len(learned)} learned parts"
    for number, place in zip(turns, learned, strict=True):
        text, before = parts[place][1], "".join(part for _, part in parts[:place])
        if not is_special_end(text):
            return f"turn {number + 1} ends without an end token: {text!r}"
        words = _words(messages[number])
        others = {word for other in messages if other is not messages[number] for word in _words(other)} - words
        if missing := [word for word in words if word not in text]:
            return f"turn {number + 1} lacks {missing}"
        if foreign := [word for word in others if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)]:
            return f"turn {number + 1} holds {foreign}"
        prompts = _served(tokenizer, messages[:number], tools, prompt=True)
        if before not in prompts | {_THOUGHT.sub("", prompt) for prompt in prompts} and not {KEPT, HEADED} & {*remarks}:
            return f"turn {number + 1} does not begin where the prompt for it ends"
    return ""


def _words(message: dict[str, Any]) -> set[str]:
    calls = [call["function"] for call in message.get("tool_calls") or []]
    said = [message.get("content"), message.get("reasoning_content"), *(call["name"] for call in calls)]
    return {word for word in said if word}


def _served(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list | None, prompt: bool
) -> set[str]:
    """The texts that serving makes of a conversation, in all ways of writing it that the template takes."""
    found = set()
    for way in range(8):
        spelt = [_spelt(message, way) for message in messages]
        try:
            text = tokenizer.apply_chat_template(spelt, tools=tools, tokenize=False, add_generation_prompt=prompt)
        except Exception:  # a template has its own ways of failing
            continue
        found.add(text)
    return found


def _spelt(message: dict[str, Any], way: int) -> dict[str, Any]:
    """Content as parts or as text, arguments as JSON text or as an object, no content or an empty one: three bits."""
    spelt = dict(message)
    if way & 1 and spelt.get("content") is None:
        spelt["content"] = ""
    if way & 2 and isinstance(spelt.get("content"), str):
        spelt["content"] = [{"type": "text", "text": spelt["content"]}]
    if way & 4 and spelt.get("tool_calls"):
        calls = [call["function"] for call in spelt["tool_calls"]]
        spelt["tool_calls"] = [
            {"type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}} for call in calls
        ]
    return spelt
