"""GenFT: fine-tune a model by updates generated from its own weights (arXiv 2506.11042), as fast as LoRA."""

from . import reference
from .accumulation import accumulate
from .adapter_io import load_adapter, save_adapter
from .config import GeneratorParameters, GenFTConfig
from .inject import apply_genft, disabled, explain, merge, remove_genft, trainable_summary, unmerge
from .modules import GenFTGenerator, GenFTLinear

__version__ = "0.1.0"

__all__ = [
    "GenFTConfig",
    "GenFTGenerator",
    "GenFTLinear",
    "GeneratorParameters",
    "accumulate",
    "apply_genft",
    "disabled",
    "explain",
    "load_adapter",
    "merge",
    "reference",
    "remove_genft",
    "save_adapter",
    "trainable_summary",
    "unmerge",
]
