"""What a run has trained, in PEFT's format: beside the run's own adapter, and as an export.

beside.py            at the end of a run: PEFT's files in the folder adapter/
lora.py              a LoRA for the untouched base model: what training changed, as one low-rank product per layer
low_rank.py          the change of one weight as a product of two thin matrices
own_kind.py          the adapter of a method that PEFT has, as it was trained
places.py            where PEFT keeps the LoRA of each weight, asked of PEFT itself
modules_to_save.py   what was trained whole
notes.py             what the user of such an adapter should know
"""
