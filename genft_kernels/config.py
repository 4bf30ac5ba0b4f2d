"""The settings of the method: `GenFTConfig`, and its presets."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .activations import ACTIVATIONS
from .arguments import check_type, described, is_finite, is_integer, shown, told, warn
from .foreign_settings import names_our_settings
from .row_blocks import checked_fused_blocks

if TYPE_CHECKING:
    from torch import nn

_SPECIFIC_INITS = ("kaiming_uniform", "zeros", "xavier_uniform", "normal")
_CHOICES = {
    "inner_activation": ACTIVATIONS, "outer_activation": ACTIVATIONS, "ratio_scope": ("weight", "all"),
    "transform": ("both", "column", "row", "sum"), "delta_layout": ("in_out", "out_in"),
    "init_shared": ("linear", "trunc_normal"), "init_specific_down": _SPECIFIC_INITS,
    "init_specific_up": _SPECIFIC_INITS, "expert_specific": ("expert", "layer"),
}  # fmt: skip
# What `target_modules` says for every linear layer, as in PEFT, and `modules_to_save` for a model's head.
ALL_LINEAR = "all-linear"
HEAD = "head"
_LARGEST_DIMENSION = 2**31
_LONGEST_PATTERN = 100_000  # characters; longer ones take seconds to compile
# The query and value projections, by the names that transformers models give them: what `target_modules=None` adapts.
QUERY_AND_VALUE_NAMES = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin")


@names_our_settings
@dataclasses.dataclass(frozen=True)
class GenFTConfig:
    """The settings of GenFT (arXiv 2506.11042), in the notation of docs/method.md#the-method.

    Args:
        shared_dim: s, hidden units shared by all layers of one weight shape.
        specific_dim: r, hidden units of each layer's own. `s + r` is k and must be at least 1.
        inner_activation: phi, one of identity, relu, leaky_relu (0.01), gelu (exact), silu, tanh.
        outer_activation: psi, from the same list. Anything but identity needs the tiled form.
        dropout: p in [0, 1), on the elements of each stage's `in x out` output, in training only.
        bias: whether the shared halves carry biases.
        weight_ratio: rho, a number, or "rms" for 1 / root mean square of each W.
        ratio_scope: "weight" scales W by rho; "all" scales the four matrices, specific units included.
        scaling: sigma, the factor on the update.
        transform: "both" stages, one after the other; the "column" or "row" stage alone; or "sum", both stages of W
            side by side: psi and dropout act on the sum of their outputs, and the update has 2 k units.
        tie_specific: where in == out and both stages exist, use one specific pair in both of them.
        delta_layout: "in_out": `dW = sigma * D.T`; "out_in": `dW = sigma * D` (square weights, both stages).
        init_shared: "linear" (as `nn.Linear`) or "trunc_normal" (std 0.02, biases zero).
        init_specific_down, init_specific_up: kaiming_uniform, zeros, xavier_uniform or normal (std 0.01).
        zero_delta: start from a zero update. True (or "up", which becomes True): the last stage's up matrices and up
            bias are zero, of a sum those of both stages. "down", but for "both": the down matrices and all biases
            are zero, and the up matrices [n, k] are drawn from U(±1/sqrt(n)), whatever `init_shared` and
            `init_specific_up` say.
        target_modules: suffixes of module names, or one regular expression that matches whole names (as in PEFT);
            "all-linear" stands for every linear layer but the output embedding, a model's head and what is in
            `modules_to_save`, None for the query and value projections and whatever `fused_blocks` names.
        exclude_modules: suffixes of names, or one regular expression for whole names, of modules to leave alone.
        modules_to_save: suffixes of modules that are trained in full and saved with the adapter; "head" stands for
            the head of a model of transformers or timm.
        target_parameters: suffixes of names of stacked experts' parameters, as "experts.gate_up_proj", or one regular
            expression for whole names. With them, None in `target_modules` names no module.
        expert_specific: "expert": every expert of a stack has `specific_dim` units of its own; "layer": a stack has
            them once, for all of its experts.
        fused_blocks: name suffix -> (number of row blocks in the fused weight, or the rows of each; the blocks to
            adapt), for example `{"qkv": (3, (0, 2))}` or `{"qkv_proj": ((4096, 1024, 1024), (0, 2))}`. The blocks are
            consecutive; where heads alternate (GPT-NeoX, BLOOM) there are none. Of several entries that name a layer
            the longest counts.

    Raises:
        ValueError: a value is out of its range; the message names the field.
    """

    shared_dim: int = 32
    specific_dim: int = 4
    inner_activation: str = "identity"
    outer_activation: str = "identity"
    dropout: float = 0.0
    bias: bool = False
    weight_ratio: float | str = 1.0
    ratio_scope: str = "weight"
    scaling: float = 1.0
    transform: str = "both"
    tie_specific: bool = True
    delta_layout: str = "in_out"
    init_shared: str = "linear"
    init_specific_down: str = "kaiming_uniform"
    init_specific_up: str = "kaiming_uniform"
    zero_delta: bool | str = True
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | str | None = None
    target_parameters: str | tuple[str, ...] | None = None
    expert_specific: str = "expert"
    fused_blocks: Mapping[str, tuple[int | Sequence[int], Sequence[int]]] | None = None

    def __post_init__(self) -> None:
        self._check_values()
        self._settle()
        self._warn_if_untrainable()

    def _check_values(self) -> None:
        """Raise ValueError for what is out of its range, or would never train from the start."""
        for name in ("shared_dim", "specific_dim"):
            value = getattr(self, name)
            if not is_integer(value) or not 0 <= value < _LARGEST_DIMENSION:
                raise ValueError(f"{name} must be an integer of at least 0, and below 2**31, got {shown(value)}")
        if self.hidden_dim == 0:
            raise ValueError("shared_dim + specific_dim must be at least 1: there would be nothing to train")
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        for name in ("bias", "tie_specific"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        if not (isinstance(self.zero_delta, (bool, str)) and self.zero_delta in (True, False, "up", "down")):
            raise ValueError(f"zero_delta must be True, False, 'up' or 'down', got {shown(self.zero_delta)}")
        if not is_finite(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), got {shown(self.dropout)}")
        if not is_finite(self.scaling):
            raise ValueError(f"scaling must be a finite number, got {shown(self.scaling)}")
        if not (isinstance(self.weight_ratio, str) and self.weight_ratio == "rms") and not is_finite(self.weight_ratio):
            raise ValueError(f"weight_ratio must be a finite number or 'rms', got {shown(self.weight_ratio)}")
        if self.delta_layout == "out_in" and self.transform != "both":
            raise ValueError(f"delta_layout='out_in' needs transform='both', got transform={self.transform!r}")
        if self.zero_delta == "down" and self.transform == "both":
            raise ValueError("zero_delta='down' needs transform='column', 'row' or 'sum', got transform='both'")
        outer, both = ("outer_activation",), ("outer_activation", "inner_activation")
        for name in {True: outer, "up": outer, "down": both}.get(self.zero_delta, ()):
            if getattr(self, name) == "relu":
                raise ValueError(
                    f"zero_delta={self.zero_delta!r} with {name}='relu' would never train: relu has no gradient at 0. "
                    f"Set zero_delta=False or another {name}"
                )
        if isinstance(self.modules_to_save, str) and self.modules_to_save != HEAD:
            raise ValueError(
                f"modules_to_save must be a list of names or {HEAD!r}, got the string {shown(self.modules_to_save)}"
            )

    def _settle(self) -> None:
        """Give each setting one form: Python's numbers (not numpy's), which JSON can hold, and tuples of names."""
        settle = functools.partial(object.__setattr__, self)
        settle("zero_delta", True if self.zero_delta == "up" else self.zero_delta)
        for name in ("shared_dim", "specific_dim"):
            settle(name, int(getattr(self, name)))
        for name in ("dropout", "scaling", "weight_ratio"):
            if getattr(self, name) != "rms":
                settle(name, float(getattr(self, name)))
        for name in ("target_modules", "exclude_modules", "target_parameters"):
            settle(name, _as_names(name, getattr(self, name)))
            if isinstance(getattr(self, name), str):
                _check_regular_expression(name, getattr(self, name))
        settle("modules_to_save", _as_names("modules_to_save", self.modules_to_save))
        settle("fused_blocks", checked_fused_blocks(self.fused_blocks))

    def _warn_if_untrainable(self) -> None:
        if self.scaling == 0:
            warn("scaling=0: no unit can ever train, because the update and its gradients are zero")
        elif self.weight_ratio == 0 and not self.bias:
            warn("weight_ratio=0 without bias: no unit can ever train, because the update and its gradients are zero")
        if self.specific_dim and self.init_specific_down == "zeros" and self._specific_ups_start_at_zero():
            warn(
                "the specific units can never train: init_specific_down='zeros' and their up matrices start at zero "
                "too, so each one's gradient is zero for ever"
            )

    if not TYPE_CHECKING:  # to whom every name would be one of its attributes

        def __getattr__(self, name: str) -> Any:
            if name == "base_model_name_or_path":  # what get_peft_model asks first
                raise AttributeError(
                    "GenFTConfig is for apply_genft: get_peft_model takes a PeftGenFTConfig, of "
                    "genft_kernels.integrations.peft"
                )
            return object.__getattribute__(self, name)  # Python's own words

    @property
    def hidden_dim(self) -> int:
        """k = s + r, the width of each stage."""
        return self.shared_dim + self.specific_dim

    def ties_specific(self, in_features: int, out_features: int) -> bool:
        """Whether a layer of this shape uses one pair of specific matrices in both stages."""
        return self.tie_specific and in_features == out_features and self.transform == "both"

    def _specific_ups_start_at_zero(self) -> bool:
        # Untied, zero_delta leaves the column stage's up matrix as it was initialised.
        if self.zero_delta == "down":
            return False
        zeroed = bool(self.zero_delta) and (self.tie_specific or self.transform != "both")
        return self.init_specific_up == "zeros" or zeroed

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-compatible values; `from_dict` is the inverse."""
        return {field.name: _with_lists(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenFTConfig:
        """Build a configuration from `to_dict`'s output.

        Raises:
            ValueError: a name is unknown, or as the constructor.
        """
        check_type("values", values, Mapping)
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"unknown configuration fields: {', '.join(str(name)[:80] for name in unknown)}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GenFTConfig:
        """Settings by name (docs/method.md#settings), with the learning rates that were found good for them.

        - "fast", to begin with: the column stage alone. 1e-3 to 4e-3 by `parameter_groups`, a new head 1e-2.
        - "fast-sum": the column and the row stage side by side. 2e-3 to 8e-3, more where a base knows little of the
          task. Of 12 square layers a shape it trains as many parameters as "fast", else by `for_budget`.
        - "fast-both": both stages and a tanh between them. 1e-3 to 2e-3.
        - "wegeft": the form of WeGeFT, once GIFT (arXiv 2312.00700): all units shared, W as it is. 2e-3 to 8e-3.
        - "glue", "vtab", "llama": the official settings. "glue" 2e-3 to 1e-2; no range is known of "llama", and "vtab"
          was swept on digits alone. They are true to the published runs and so start from a non-zero update. For GQA
          models override `delta_layout="in_out"`, because their v_proj is not square.

        Raises:
            ValueError: no such preset, or as the constructor.
        """
        _check_choice("preset", name, PRESETS)
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def for_budget(cls, model: nn.Module, parameters: int, preset: str = "fast", **overrides: Any) -> GenFTConfig:
        """A preset, changed by `overrides`, with as many units as train at most `parameters` of a model.

        Generators and layers are counted, `modules_to_save` are not. Specific units are those that fit if shared ones
        keep the preset's proportion to them: 12 to 7 in "fast", which is 73,728 parameters for q and v of 6 blocks of
        width 384; but of other forms than "both" at least one for each layer where that can be paid for, since shared
        units alone are behind on texts (docs/using.md#choosing-settings). Shared ones take the rest, being paid once
        for all layers of a shape.

        Args:
            model: as for `apply_genft`, which is not called.
            parameters: the largest total.
            preset: as for `preset`.

        Raises:
            ValueError: `parameters` is below the smallest total, which the message names; or as `apply_genft`.
            TypeError: `shared_dim` or `specific_dim` is among the overrides.
        """
        from .budget import within_budget  # late, because budget imports this module

        for name in ("shared_dim", "specific_dim"):
            if name in overrides:
                raise TypeError(f"{name} is what for_budget chooses: give it to GenFTConfig or preset instead")
        return within_budget(model, parameters, cls.preset(preset, **overrides))


PRESETS: dict[str, dict[str, Any]] = {
    "glue": dict(
        shared_dim=24, specific_dim=2, weight_ratio=0.5, dropout=0.1, scaling=0.05, bias=True, delta_layout="out_in",
        zero_delta=False,
    ),
    "vtab": dict(
        shared_dim=32, specific_dim=5, weight_ratio=1.4, ratio_scope="all", outer_activation="leaky_relu", dropout=0.1,
        init_specific_down="zeros", init_specific_up="zeros", init_shared="trunc_normal", zero_delta=False,
    ),
    "llama": dict(
        shared_dim=4, specific_dim=4, inner_activation="gelu", outer_activation="gelu", bias=True,
        delta_layout="out_in", zero_delta=False,
    ),
    "fast": dict(
        shared_dim=12, specific_dim=7, transform="column", weight_ratio="rms", scaling=0.1, zero_delta="down",
    ),
    "fast-sum": dict(
        shared_dim=12, specific_dim=3, transform="sum", weight_ratio="rms", scaling=0.1, zero_delta="down",
    ),
    "fast-both": dict(shared_dim=24, specific_dim=4, weight_ratio=16.0, inner_activation="tanh"),
    "wegeft": dict(shared_dim=8, specific_dim=0, transform="column", zero_delta="down"),
}  # fmt: skip


def _with_lists(value: Any) -> Any:
    """A setting with lists in the place of its tuples."""
    if isinstance(value, Mapping):
        return {name: _with_lists(each) for name, each in value.items()}
    return [_with_lists(each) for each in value] if isinstance(value, tuple) else value


def replaced(config: GenFTConfig, **changes: Any) -> GenFTConfig:
    """`config` with other values of some settings, without its warnings."""
    with told():
        return dataclasses.replace(config, **changes)


def is_factored(outer_activation: str, dropout: float) -> bool:
    """Whether an update is a product of thin factors: docs/method.md#factored-form, else docs/method.md#tiled-form."""
    return outer_activation == "identity" and dropout == 0


def check_config(config: object) -> None:
    """Raise TypeError unless it is a `GenFTConfig`."""
    if not isinstance(config, GenFTConfig) and hasattr(config, "peft_type"):
        kind = described(config)
        raise TypeError(
            f"config must be a GenFTConfig, got {kind}, which is for PEFT: peft.get_peft_model(model, config)"
        )
    check_type("config", config, GenFTConfig)


def _check_choice(field: str, value: object, choices: Sequence[str] | Mapping[str, Any]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(choices)}; got {shown(value)}")


def _as_names(field: str, value: object) -> str | tuple[str, ...] | None:
    """One regular expression stays a string; a collection of names becomes a tuple."""
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, (Sequence, set, frozenset)) and value and all(isinstance(n, str) and n for n in value):
        return tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
    raise ValueError(f"{field} must be None, a non-empty string or a non-empty list of names, got {shown(value)}")


def _check_regular_expression(field: str, pattern: str) -> None:
    try:
        if len(pattern) > _LONGEST_PATTERN:
            raise ValueError(f"it has {len(pattern):,} characters, more than {_LONGEST_PATTERN:,}")
        re.compile(pattern)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{field}={shown(pattern)} is not a regular expression: {error}") from None
