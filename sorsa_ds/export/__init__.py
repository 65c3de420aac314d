"""A finished run as something that others can load: a plain model, a LoRA, or its own small adapter.

source.py        what is exported, and whether it belongs together
layers.py        the maths of one layer
merged.py        a Hugging Face model, shard by shard
lora.py          a LoRA for the untouched base model, in PEFT's format
factors.py       U, s and V themselves
peft_adapter.py  the adapter of a method that PEFT has, in its own format
card.py          the model card
publish.py       to the Hugging Face hub
command.py       what launch/export.py does
"""
