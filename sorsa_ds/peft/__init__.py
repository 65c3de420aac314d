"""SORSA as a method of PEFT: `import sorsa_ds.peft` registers it, and all that a user needs is here.

    from peft import get_peft_model
    from sorsa_ds.peft import SorsaCallback, SorsaConfig

    model = get_peft_model(model, SorsaConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = Trainer(model, ..., callbacks=[SorsaCallback()])

Other rooms' `__init__` import nothing. This one is what users import, and importing it must register the method: PEFT
reads a saved adapter only where it knows the method. Nothing of the package imports it at its own start.
"""

from sorsa_ds.peft.callback import SorsaCallback
from sorsa_ds.peft.config import SorsaConfig
from sorsa_ds.peft.layer import SorsaLayer
from sorsa_ds.peft.model import SorsaModel
from sorsa_ds.peft.peft_type import register_sorsa

__all__ = ["SorsaCallback", "SorsaConfig", "SorsaLayer", "SorsaModel"]

register_sorsa(SorsaConfig, SorsaModel)
