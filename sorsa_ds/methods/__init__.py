"""SORSA, and what it is compared with: one trainer, one engine and one checkpoint format for all of them.

method.py          `Method`: everything that a way of fine-tuning says about itself, member by member
registry.py        name -> `Method`
families/          one file per family: SORSA; LoRA, PiSSA, DoRA and OLoRA by way of PEFT; AdaLoRA; whole weights
settings.py        refuses settings that have no effect for the method
adalora_engine.py  AdaLoRA's steps
peft_experts.py    how PEFT keeps a LoRA of experts that a model holds as one parameter
peft_layers.py     PEFT's layers on the rank that owns them; imported only where such a layer is made

To add a baseline, write its file in families/ and add its name to `config.method_settings.MethodName`.
"""
