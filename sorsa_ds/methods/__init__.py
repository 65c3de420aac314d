"""SORSA, and what it is compared with: one trainer, one engine and one checkpoint format for all of them.

method.py        `Method`: everything that a way of fine-tuning says about itself, member by member
registry.py      name -> `Method`; the only list of them
settings.py      refuses settings that have no effect for the method
sorsa.py         SORSA
peft_adapters.py LoRA, PiSSA, DoRA and OLoRA, by way of PEFT
adalora.py       AdaLoRA, which also has steps of its own (adalora_engine.py)
whole_weights.py full and partial fine-tuning
peft_layers.py   PEFT's layers on the rank that owns them; imported only where such a layer is made

To add a baseline, write its file, name it in `registry.METHODS`, and add its name to
`config.method_settings.MethodName`.
"""
