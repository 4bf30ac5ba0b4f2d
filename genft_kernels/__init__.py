"""GenFT: fine-tune a model by updates generated from its own weights (arXiv 2506.11042), as fast as LoRA."""

from . import reference
from ._version import __version__ as __version__
from .adapt import apply_genft, disabled, merge, remove_genft, unmerge
from .adapted_model import explain, set_backend
from .config import GenFTConfig
from .fidelity import fidelity_report
from .files.adapter import load_adapter, save_adapter
from .files.lora import export_lora
from .frozen_weight import register_frozen_weight
from .modules import GenFTGenerator, GenFTLinear
from .parameter_groups import parameter_groups
from .parameters import GeneratorParameters
from .sharing.accumulate import accumulate
from .summary import trainable_summary
from .tuning import tune
from .units import refresh

__all__ = [
    "GenFTConfig",
    "GenFTGenerator",
    "GenFTLinear",
    "GeneratorParameters",
    "accumulate",
    "apply_genft",
    "disabled",
    "explain",
    "export_lora",
    "fidelity_report",
    "load_adapter",
    "merge",
    "parameter_groups",
    "reference",
    "refresh",
    "register_frozen_weight",
    "remove_genft",
    "save_adapter",
    "set_backend",
    "trainable_summary",
    "tune",
    "unmerge",
]
