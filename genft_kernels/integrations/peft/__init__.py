"""GenFT as a tuner of PEFT: importing this module registers the PEFT type `GENFT`.

from peft import get_peft_model
from genft_kernels.integrations.peft import PeftGenFTConfig

model = get_peft_model(model, PeftGenFTConfig(preset="fast", target_modules=["q_proj", "v_proj"]))
"""

from __future__ import annotations

from peft.utils import register_peft_method

from .config import PREFIX, PeftGenFTConfig
from .layer import GenFTLayer
from .model import PeftGenFTModel

__all__ = ["GenFTLayer", "PeftGenFTConfig", "PeftGenFTModel"]

register_peft_method(name="genft", config_cls=PeftGenFTConfig, model_cls=PeftGenFTModel, prefix=PREFIX)
