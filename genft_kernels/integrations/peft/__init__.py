"""GenFT as a tuner of PEFT, 0.21 or newer: importing this module registers the PEFT type `GENFT`.

from peft import get_peft_model
from genft_kernels.integrations.peft import PeftGenFTConfig

model = get_peft_model(model, PeftGenFTConfig(preset="fast", target_modules=["q_proj", "v_proj"]))
"""

from __future__ import annotations

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

if not hasattr(BaseTuner, "_get_adapter_state_dict"):  # by which a tuner has a say in what is saved
    raise ImportError(f"genft_kernels.integrations.peft needs peft 0.21 or newer: this is {peft.__version__}")

from . import replaced
from .config import BESIDE_A_MODEL, PREFIX, PeftGenFTConfig
from .model import PeftGenFTModel
from .swap import swap_adapter

__all__ = ["PeftGenFTConfig", "swap_adapter"]

register_peft_method(name="genft", config_cls=PeftGenFTConfig, model_cls=PeftGenFTModel, prefix=PREFIX)
PEFT_TYPE_TO_CONFIG_MAPPING[BESIDE_A_MODEL] = PeftGenFTConfig
replaced.install()
