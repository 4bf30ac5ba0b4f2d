"""Settings of other methods: whoever gives one to a configuration of ours is told what it is called here."""

from __future__ import annotations

import difflib
import functools
import inspect
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

_RANK = "the rank is shared_dim + specific_dim: units shared by all layers of a shape, and each layer's own"
_ALPHA = "the factor on the update is scaling, and is not divided by a rank"
_NO_TASK = "no task is needed: apply_genft leaves the model its class, and modules_to_save='head' trains a new head"
_STARTS = "how units start is zero_delta, init_shared, init_specific_down and init_specific_up"
_SOME_LAYERS = "name the layers in target_modules, by paths or by one regular expression"
_ONE_RANK = "every layer has the same shared_dim and specific_dim"
HINTS = {
    "r": _RANK,
    "rank": _RANK,
    "lora_r": _RANK,
    "lora_alpha": _ALPHA,
    "alpha": _ALPHA,
    "use_rslora": _ALPHA,
    "lora_dropout": "dropout is on the update, not on the input: dropout",
    "task_type": _NO_TASK,
    "inference_mode": "there is no such mode: model.eval(), and merge(model)",
    "init_lora_weights": _STARTS,
    "init_weights": _STARTS,
    "layers_to_transform": _SOME_LAYERS,
    "layers_pattern": _SOME_LAYERS,
    "rank_pattern": _ONE_RANK,
    "alpha_pattern": _ONE_RANK,
    "fan_in_fan_out": "transformers' Conv1D is recognised without it",
    "use_dora": "there is nothing like DoRA's magnitudes",
    "preset": "presets are GenFTConfig.preset(name, ...)",
    "peft_type": "the tuner of PEFT is configured by genft_kernels.integrations.peft.PeftGenFTConfig",
}


def names_our_settings(cls: T) -> T:
    """A dataclass whose constructor says, of a setting that it does not have, which one is meant."""
    initialise = cls.__init__  # type: ignore[misc]
    known = [*inspect.signature(initialise).parameters][1:]

    @functools.wraps(initialise)
    def explaining(self: Any, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = HINTS.get(name) or (f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}")
                # Python's words, by which PEFT tells a file of a newer version.
                raise TypeError(f"{cls.__name__} got an unexpected keyword argument {name[:80]!r}: {hint}")
        initialise(self, *args, **settings)

    cls.__init__ = explaining  # type: ignore[misc]
    return cls
