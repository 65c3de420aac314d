"""A finished run as something that others can load: a plain model, a LoRA, or its own small adapter.

command.py       what launch/export.py does: refuse, write, publish
options.py       the options, and which of them go together
formats.py       the four formats, and what the reader of an export should know
merged.py        a Hugging Face model, shard by shard
requantise.py    the merged model in 4 or 8 bits
adapter.py       the run's own adapter; those in PEFT's format are `run.peft_files`
card.py          the model card, and its way to the Hugging Face hub
"""
