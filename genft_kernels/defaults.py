"""Settings that a configuration leaves to the model: `target_modules=None`, and `modules_to_save="head"`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .arguments import check_type
from .config import HEAD, QUERY_AND_VALUE_NAMES, GenFTConfig, check_config, replaced
from .heads import NAMES as HEAD_NAMES
from .heads import heads
from .matching import Names
from .row_blocks import RowBlocks

_Q_AND_V = RowBlocks(3, (0, 2))


def _grouped(config: Any) -> RowBlocks:
    """q and v of a fused weight of which several heads of q share one of k and v."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return RowBlocks((config.num_attention_heads * size, keys * size, keys * size), (0, 2))


def _multi_query(config: Any) -> RowBlocks:
    """All heads of q share the one of k and v; otherwise q, k and v alternate from head to head, or group to group."""
    size = config.hidden_size // config.num_attention_heads
    one = config.multi_query and not getattr(config, "new_decoder_architecture", False)
    return RowBlocks((config.hidden_size, size, size), (0, 2)) if one else RowBlocks()


# By model_type, where query and value have names of their own: PEFT's table, its fused weights cut into blocks where
# these are consecutive. In the others (RowBlocks()) q, k and v alternate, and the whole weight is adapted.
BY_MODEL_TYPE: dict[str, dict[str, RowBlocks | Callable[[Any], RowBlocks]]] = {
    **dict.fromkeys(("gpt2", "imagegpt", "openai-gpt", "decision_transformer"), {"attn.c_attn": _Q_AND_V}),
    "gpt_bigcode": {"attn.c_attn": _multi_query},
    "falcon": {"query_key_value": _multi_query},
    **dict.fromkeys(
        ("t5", "mt5", "umt5", "longt5", "switch_transformers", "pop2piano", "udop"),
        {"q": RowBlocks(), "v": RowBlocks()},
    ),
    **dict.fromkeys(("phi3", "phi4_multimodal"), {"qkv_proj": _grouped}),
    **dict.fromkeys(
        ("gpt_neox", "bloom", "RefinedWeb", "RefinedWebModel", "chatglm", "persimmon"),
        {"query_key_value": RowBlocks()},
    ),
    "codegen": {"qkv_proj": RowBlocks()},
    **dict.fromkeys(("mpt", "modernbert"), {"Wqkv": _Q_AND_V}),
    "deberta": {"in_proj": RowBlocks()},
    "deberta-v2": {"query_proj": RowBlocks(), "value_proj": RowBlocks()},
    "btlm": {"c_attn": RowBlocks()},
}  # fmt: skip
# What timm calls the fused weight of every attention: all of q, all of k, all of v.
_OF_TIMM = {"qkv": _Q_AND_V}


def settled(model: nn.Module, config: GenFTConfig) -> GenFTConfig:
    """`config` with what it leaves to this model spelled out, where that is not what the usual names say.

    Raises:
        ValueError: `modules_to_save="head"`, and the model has no head that could be told.
    """
    check_type("model", model, nn.Module)
    check_config(config)
    changes: dict[str, Any] = {}
    if config.modules_to_save == HEAD:
        changes["modules_to_save"] = tuple(heads(model))
        if not changes["modules_to_save"]:
            raise ValueError(
                f"modules_to_save={HEAD!r}: {type(model).__name__} has no head that is known as one (get_classifier() "
                f"as timm's, or {', '.join(HEAD_NAMES)} of a transformers model): name its modules in a list"
            )
    if config.target_modules is None and config.fused_blocks is None and config.target_parameters is None:
        names = Names(name for name, _ in model.named_modules(remove_duplicate=False) if name)
        if not names.matching(QUERY_AND_VALUE_NAMES):
            changes |= _targets_by_type(model, names)
    return replaced(config, **changes) if changes else config


def _targets_by_type(model: nn.Module, names: Names) -> dict[str, Any]:
    """`target_modules` and `fused_blocks`, or nothing for a model that is not known."""
    of_model = getattr(model, "config", None)
    table = BY_MODEL_TYPE.get(getattr(of_model, "model_type", ""), {}) or _OF_TIMM
    blocks = {
        name: entry if isinstance(entry, RowBlocks) else entry(of_model)
        for name, entry in table.items()
        if names.ending_in(name)
    }
    if not blocks:
        return {}
    return {
        "target_modules": tuple(blocks),
        "fused_blocks": {name: entry for name, entry in blocks.items() if entry.count > 1} or None,
    }
