"""The chat templates that TRL carries, conversations to put into them, and by hand what is to be learned or refused."""

import re
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.helpers.chat_tokenizer import chat_tokenizer

SPECIAL = [
    "<BOS>", "<EOS>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<｜User｜>",
    "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>",
    "<|tool_response>", "<tool_response|>", "<|channel>", "<channel|>", "<start_of_turn>", "<end_of_turn>",
    "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "<|start|>", "<|end|>", "<|message|>",
    "<|channel|>", "<|return|>", "<|call|>", "<|begin_of_text|>", "<end_of_utterance>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot|>", "<|eom|>", "</s>", "[gMASK]", "<sop>",
]  # fmt: skip
"""Special tokens of all families, beside those of ChatML."""

Message = dict[str, Any]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str | None, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
PROPERTIES = {"a": {"type": "integer", "description": "first"}, "b": {"type": "integer"}}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["a", "b"]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds two.", "parameters": PARAMETERS}}]

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "single": {"messages": [user("Hi"), assistant("Hello")]},
    "turns": {"messages": [user("Hi"), assistant("Hello"), user("2+3?"), assistant("five")]},
    "system": {"messages": [SYSTEM, user("Hi"), assistant("Hello")]},
    "tools": {
        "messages": [
            user("2+3?"),
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "name": "add", "content": "5"},
            assistant("five"),
        ],
        "tools": TOOLS,
    },
    "thinking": {"messages": [user("Hi"), assistant("Hello", reasoning_content="Greet them.")]},
}

_NO_TOOLS = "no place for tools"
_NO_CALLS = "leaves out the tool call of message 2"
_NO_THOUGHTS = r"leaves out the reasoning of message 2 \(assistant\)"
_MUST_ALTERNATE = "refuses the conversation: Conversation roles must alternate user/assistant"

REFUSED: dict[str, dict[str, str]] = {
    "single": {},
    "turns": {},
    "system": {"gemma": "refuses the conversation: System role not supported"},
    "tools": {
        **dict.fromkeys(("cohere", "cohere2", "gemma", "gemma3"), _MUST_ALTERNATE),
        **dict.fromkeys(
            ("deepseek_r1_distill", "deepseekv3", "idefics3", "llama3", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm"),
            _NO_TOOLS,
        ),
        "lfm2": _NO_CALLS,
        "llava_next": "refuses the conversation: Only user and assistant roles are supported!",
    },
    "thinking": dict.fromkeys(
        (
            "cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "gemma4", "gemma4_v2",
            "gemma4_v3", "gemma4_v4", "idefics3", "lfm2", "lfm2_v2", "llama3", "llama3_1", "llama3_2", "llava_next",
            "phi3", "phi3_5", "qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl", "smolvlm",
        ),
        _NO_THOUGHTS,
    ),
}  # fmt: skip
"""Conversation -> template that has no place for something in it -> what is said of it."""

_JSON_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
_XML_CALL = (
    "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n<parameter=b>\n3\n</parameter>\n</function>\n"
    "</tool_call>"
)
_NO_THOUGHT = "<think>\n\n</think>\n\n"
_GLM_CALL = (
    "\n<think></think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n<arg_key>b</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call><|observation|>"
)
_FINAL = "<|channel|>final<|message|>"

LEARNED: dict[str, dict[str, list[str]]] = {
    "qwen2_5": {
        "single": ["Hello<|im_end|>"],
        "turns": ["Hello<|im_end|>", "five<|im_end|>"],
        "system": ["Hello<|im_end|>"],
        "tools": [f"{_JSON_CALL}<|im_end|>", "five<|im_end|>"],
    },
    "qwen3": {
        "single": [f"{_NO_THOUGHT}Hello<|im_end|>"],
        "turns": [f"{_NO_THOUGHT}Hello<|im_end|>", f"{_NO_THOUGHT}five<|im_end|>"],
        "system": [f"{_NO_THOUGHT}Hello<|im_end|>"],
        "tools": [f"{_NO_THOUGHT}{_JSON_CALL}<|im_end|>", f"{_NO_THOUGHT}five<|im_end|>"],
        "thinking": ["<think>\nGreet them.\n</think>\n\nHello<|im_end|>"],
    },
    "qwen3_5_nothink": {
        "single": ["Hello<|im_end|>"],
        "turns": ["Hello<|im_end|>", "five<|im_end|>"],
        "system": ["Hello<|im_end|>"],
        "tools": [f"{_XML_CALL}<|im_end|>", "five<|im_end|>"],
        "thinking": ["<think>\nGreet them.\n</think>\n\nHello<|im_end|>"],
    },
    "qwen3_6": {
        "single": ["\n</think>\n\nHello<|im_end|>"],
        "turns": ["\n</think>\n\nHello<|im_end|>", "\n</think>\n\nfive<|im_end|>"],
        "system": ["\n</think>\n\nHello<|im_end|>"],
        "tools": [f"\n</think>\n\n{_XML_CALL}<|im_end|>", "\n</think>\n\nfive<|im_end|>"],
        "thinking": ["Greet them.\n</think>\n\nHello<|im_end|>"],
    },
    "gptoss": {
        "single": [f"{_FINAL}Hello<|return|>"],
        "turns": [f"{_FINAL}Hello<|end|>", f"{_FINAL}five<|return|>"],
        "system": [f"{_FINAL}Hello<|return|>"],
        "tools": [
            ' to=functions.add<|channel|>commentary json<|message|>{"a": 2, "b": 3}<|call|>',
            f"{_FINAL}five<|return|>",
        ],
        "thinking": [f"<|channel|>analysis<|message|>Greet them.<|end|><|start|>assistant{_FINAL}Hello<|return|>"],
    },
    "llama3_1": {
        "single": ["Hello<|eot_id|>"],
        "turns": ["Hello<|eot_id|>", "five<|eot_id|>"],
        "system": ["Hello<|eot_id|>"],
        "tools": ['{"name": "add", "parameters": {"a": 2, "b": 3}}<|eot_id|>', "five<|eot_id|>"],
    },
    "phi3": {
        "single": ["Hello<|end|>\n<EOS>"],
        "turns": ["Hello<|end|>", "five<|end|>\n<EOS>"],
        "system": ["Hello<|end|>\n<EOS>"],
    },
    "deepseekv3": {
        "single": ["Hello<｜end▁of▁sentence｜>"],
        "turns": ["Hello<｜end▁of▁sentence｜>", "five<｜end▁of▁sentence｜>"],
        "system": ["Hello<｜end▁of▁sentence｜>"],
    },
    "glm4moe": {
        "single": ["\n<think></think>\nHello<|user|>"],
        "turns": ["\n<think></think>\nHello<|user|>", "\n<think></think>\nfive<|user|>"],
        "system": ["\n<think></think>\nHello<|user|>"],
        "tools": [_GLM_CALL, "\n<think></think>\nfive<|user|>"],
        "thinking": ["\n<think>Greet them.</think>\nHello<|user|>"],
    },
    "nemotron_3_nano": {
        "single": ["<think></think>Hello<|im_end|>"],
        "turns": ["<think></think>Hello<|im_end|>", "<think></think>five<|im_end|>"],
        "system": ["<think></think>Hello<|im_end|>"],
        "tools": [f"<think></think>\n{_XML_CALL}\n<|im_end|>", "<think></think>five<|im_end|>"],
        "thinking": ["Greet them.\n</think>\nHello<|im_end|>"],
    },
    "gemma3": {
        "single": ["Hello<end_of_turn>"],
        "turns": ["Hello<end_of_turn>", "five<end_of_turn>"],
        "system": ["Hello<end_of_turn>"],
    },
    "cohere2": {
        "single": ["Hello<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"],
        "turns": ["Hello<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "five<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"],
        "system": ["Hello<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"],
    },
    "llava_next": {
        "single": [" Hello</s>"],
        "turns": [" Hello</s>", " five</s>"],
        "system": [" Hello</s>"],
    },
    "lfm2_2_5": {
        "single": ["Hello<|im_end|>"],
        "turns": ["Hello<|im_end|>", "five<|im_end|>"],
        "system": ["Hello<|im_end|>"],
        "tools": ["<|tool_call_start|>[add(a=2, b=3)]<|tool_call_end|><|im_end|>", "five<|im_end|>"],
        "thinking": ["<think>Greet them.</think>Hello<|im_end|>"],
    },
}
"""Template -> conversation -> each turn as it is learned, written by hand from what the families publish."""


def family_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the special tokens of all families, and puts a BOS before whatever it is given."""
    tokenizer = chat_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.bos_token, tokenizer.eos_token = "<BOS>", "<EOS>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<BOS> $A", special_tokens=[("<BOS>", tokenizer.convert_tokens_to_ids("<BOS>"))]
    )
    return tokenizer


def is_special_end(text: str) -> bool:
    """Whether a text ends with one of the special tokens, or with ChatML's."""
    return re.search("(" + "|".join(map(re.escape, [*SPECIAL, "<|im_end|>"])) + r")\Z", text) is not None
