"""`PeftGenFTConfig`: this package's settings and PEFT's common ones in one configuration."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ...arguments import told
from ...config import PRESETS, GenFTConfig
from ...files.fingerprint import Fingerprint
from ...files.format import CONFIG_FILE, FORMAT_VERSION, parsed_fingerprints
from ...files.peft_file import RENAMED, SETTINGS, split_stacks
from ...foreign_settings import names_our_settings
from ...update import Frozen
from .types import GENFT

# What the names of all of an adapter's parts begin with.
PREFIX = "genft_"

# The type in the files of an adapter that lies in the folder of a saved model.
BESIDE_A_MODEL = "GENFT: import genft_kernels.integrations.peft first"

# What PEFT knows for a model's own biases.
BIASES = ("none", "all", f"{PREFIX}only")


@names_our_settings
@dataclass
class PeftGenFTConfig(PeftConfig):
    """Settings of a GenFT adapter in PEFT.

    Args:
        preset: a name that `GenFTConfig.preset` knows, for all settings that are not given (docs/method.md#settings).
        shared_dim, specific_dim, inner_activation, outer_activation, dropout, weight_ratio, ratio_scope, scaling,
            transform, tie_specific, expert_specific, delta_layout, init_shared, init_specific_down, init_specific_up,
            zero_delta, fused_blocks: as in `genft_kernels.GenFTConfig`; None is the preset's, or the default there.
        generator_bias: `GenFTConfig`'s `bias`.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in PEFT's
            `LoraConfig`; None targets what PEFT's own table has for the type of the model, as the query and value
            projections, but of a fused weight all of it, where `apply_genft` takes q and v: `fused_blocks` cuts it.
        init_weights: False draws all units, also those that `zero_delta` would start at zero.
        fan_in_fan_out: ignored, because layers tell by themselves (transformers' `Conv1D`).
        bias: "none", or which biases of the model itself train: "all", or "genft_only", those of adapted layers.
        target_parameters: stacked experts of transformers, as in `GenFTConfig`; no modules then, unless some are named.
        fingerprints: of the weights that the adapter was trained on, in files; loading it onto others raises.

    Raises:
        ValueError: a bad value; the message names the field.
    """

    preset: str | None = None
    shared_dim: int | None = None
    specific_dim: int | None = None
    inner_activation: str | None = None
    outer_activation: str | None = None
    dropout: float | None = None
    generator_bias: bool | None = None
    weight_ratio: float | str | None = None
    ratio_scope: str | None = None
    scaling: float | None = None
    transform: str | None = None
    tie_specific: bool | None = None
    expert_specific: str | None = None
    delta_layout: str | None = None
    init_shared: str | None = None
    init_specific_down: str | None = None
    init_specific_up: str | None = None
    zero_delta: bool | str | None = None
    fused_blocks: dict[str, Any] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = True
    fan_in_fan_out: bool = False
    bias: str = "none"
    target_parameters: list[str] | str | None = None
    fingerprints: dict[str, Any] | None = dataclasses.field(default=None, repr=False)
    # The rest of a file of save_adapter's.
    config: InitVar[dict[str, Any] | None] = None
    format: InitVar[str | None] = None
    format_version: InitVar[int | None] = None
    genft_kernels_version: InitVar[str | None] = None
    tensors_sha256: InitVar[str | None] = None
    # By this the files of the official code are told, whose type has the same name.
    generator_share_dim: InitVar[int | None] = None

    def __post_init__(
        self, config: dict[str, Any] | None, format: str | None, format_version: int | None, *rest: Any
    ) -> None:
        super().__post_init__()
        if rest[-1] is not None:
            raise ValueError(
                "an adapter of the official GenFT code: load it by genft_kernels.load_adapter, and what save_adapter "
                "makes of it PEFT opens"
            )
        if (format_version or 0) > FORMAT_VERSION:
            raise ValueError(f"format_version={format_version}: a newer genft_kernels has written this adapter")
        self.peft_type = GENFT
        if self.bias not in BIASES:
            raise ValueError(
                f"bias must be one of {', '.join(BIASES)}; got {self.bias!r} (generator_bias is GenFT's own)"
            )
        if isinstance(self.modules_to_save, str):
            raise ValueError(
                f"modules_to_save must be a list of names, got {self.modules_to_save!r}; a task_type trains a new head"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has a meaning only with layers_to_transform")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {self.preset!r}")
        # Those of a file. A new adapter's are taken as it is saved, and say nothing against other models.
        self.trained_on: dict[str, Fingerprint] = parsed_fingerprints(self.fingerprints or {})
        if config is not None:  # its rules for choosing modules are not PEFT's, but these are what they chose
            parameters = config.get("target_parameters")
            self.target_modules, self.target_parameters = split_stacks(self.trained_on, parameters)
            self.modules_to_save = config.get("modules_to_save")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        settings = GenFTConfig().to_dict() | PRESETS.get(self.preset or "", {}) | (config or {})
        for name in SETTINGS:
            field = RENAMED.get(name, name)
            if getattr(self, field) is None:
                setattr(self, field, settings[name])
        self._made_native()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As ever; but beside a saved model the type says what to import, because transformers loads both at once.

        PEFT looks the type up in a table, and the error of a table is the key that it has not.
        """
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        if (folder / "config.json").exists():
            path = folder / CONFIG_FILE
            path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": BESIDE_A_MODEL}, indent=2))

    def native(self) -> GenFTConfig:
        """The settings of the update alone, which know of no modules."""
        with told():
            return self._made_native()

    def _made_native(self) -> GenFTConfig:
        settings = {name: getattr(self, RENAMED.get(name, name)) for name in SETTINGS}
        if not self.init_weights:
            settings["zero_delta"] = False
        return GenFTConfig(**settings)

    def check_base(self, path: str, weight: Frozen) -> None:
        """ValueError if the adapter comes from a file, and was trained on another weight [out, in] of this layer."""
        if weight.device.type == "meta":
            raise ValueError(
                f"{path!r} is on the meta device: it is compared with what was trained on, so load it first"
            )
        difference = self.trained_on[path].difference(Fingerprint.of(weight))
        if difference:
            raise ValueError(
                f"the adapter belongs to another base model: the weight of {path!r}: {difference} "
                "(for a new adapter make a new PeftGenFTConfig)"
            )
