"""GenFT: fine-tune a model by updates generated from its own weights (arXiv 2506.11042), as fast as LoRA."""

from . import reference
from .config import GeneratorParameters, GenFTConfig

__version__ = "0.1.0"
