"""Faults of official files: fault -> (change to tensors and settings in place, words of the refusal)."""

from __future__ import annotations

import torch

from tests.helpers.official_writers import BASE, D, Encoder, R, S

TARGETS = Encoder.targets
FIRST = f"{BASE}{TARGETS[0]}"
GENERATOR = "base_model.generator.genft_share_1_a.linear"


def dropped(*keys):
    return lambda tensors, settings: [tensors.pop(key) for key in keys]


def put(**entries):
    return lambda tensors, settings: settings.update(entries)


def without(key):
    return lambda tensors, settings: settings.pop(key)


def reshaped(**shapes):
    """Other shapes for the tensors whose keys end so."""

    def change(tensors, settings):
        for key in tensors:
            for end, shape in shapes.items():
                if key.replace(".", "_").endswith(end):
                    tensors[key] = torch.zeros(shape)

    return change


def added(key, tensor=None):
    return lambda tensors, settings: tensors.update({key: torch.zeros(2) if tensor is None else tensor})


def nan_in(key):
    return lambda tensors, settings: tensors[key].view(-1)[3].fill_(float("nan"))


def nudged(key):
    return lambda tensors, settings: tensors[key].view(-1)[3].add_(1e-6)


def other_width(target):
    def change(tensors, settings):
        tensors[f"{BASE}{target}.genft_individual_weight_b"] = torch.zeros(D // 2, R)

    return change


COPY = f"{FIRST}.generator.genft_share_2_b.linear"
PEFT_FAULTS = {
    "missing individual": (dropped(f"{FIRST}.genft_individual_weight_b"), [f"{FIRST}.genft_individual_weight_b"]),
    "missing bias": (dropped(f"{GENERATOR}.bias"), [f"missing {GENERATOR}.bias"]),
    "missing, two": (dropped(f"{GENERATOR}.weight", f"{COPY}.bias"), [f"{GENERATOR}.weight", f"{COPY}.bias"]),
    "missing copy": (dropped(f"{COPY}.weight"), [f"missing {COPY}.weight"]),
    "unexpected": (added("base_model.generator.genft_share_3_a.linear.weight"), ["unexpected", "genft_share_3_a"]),
    "adapter name": (added(f"{FIRST}.genft_individual_weight_a.default"), ["unexpected", "weight_a.default"]),
    "unlisted module": (added(f"{BASE}encoder.norm.weight"), [f"unexpected {BASE}encoder.norm.weight"]),
    "foreign key": (added("lora_A.weight"), ["unexpected lora_A.weight"]),
    "shape": (
        reshaped(layer_0_attention_query_genft_individual_weight_a=(R + 1, D)),
        [f"{FIRST}.genft_indiv", "3, 16"],
    ),
    "shapes, every one": (
        reshaped(genft_share_1_a_linear_bias=(S,)),
        [f"{GENERATOR}.bias", *(f"{BASE}{target}.generator.genft_share_1_a.linear.bias" for target in TARGETS)],
    ),
    "several weight shapes": (
        other_width(TARGETS[3]),
        [f"{BASE}{TARGETS[3]}.genft_individual_weight_b", "square weights of width 16"],
    ),
    "not a matrix": (reshaped(base_model_generator_genft_share_1_a_linear_weight=(S * D,)), [f"{GENERATOR}.weight"]),
    "integers": (
        added(f"{GENERATOR}.weight", torch.zeros(S, D, dtype=torch.int32)),
        [f"{GENERATOR}.weight is torch.int"],
    ),
    "unequal copies": (
        nudged(f"{COPY}.weight"),
        ["base_model.generator.genft_share_2_b.linear.weight", f"{COPY}.weight"],
    ),
    "copies, one NaN": (nan_in(f"{COPY}.weight"), ["base_model.generator.genft_share_2_b", f"{COPY}.weight"]),
    "another s": (put(generator_share_dim=S + 1), [f"{GENERATOR}.weight", f"{COPY}.weight"]),
    "another r": (put(individual_features=R + 1), [f"{FIRST}.genft_individual_weight_a", f"{GENERATOR}.bias"]),
    "r is 0": (put(individual_features=0), [f"{FIRST}.genft_individual_weight_a"]),
    "s is 0": (put(generator_share_dim=0), ["adapter_config.json", "generator_share_dim=0"]),
    "conv1d": (put(fan_in_fan_out=True), ["fan_in_fan_out"]),
    "lora": (put(peft_type="LORA"), ["peft_type", "LORA"]),
    "no ratio": (without("ratio_W0"), ["adapter_config.json", "ratio_W0"]),
    "bad ratio": (put(ratio_W0="much"), ["ratio_W0", "much"]),
    "bad s": (put(generator_share_dim=4.5), ["generator_share_dim", "4.5"]),
    "bad dropout": (put(drop=1.0), ["adapter_config.json", "drop"]),
    "bad scaling": (put(scaling=float("nan")), ["scaling"]),
    "head of another shape": (reshaped(classifier_out_proj_weight=(9, D)), ["classifier.out_proj.weight"]),
    "part of the head": (dropped(f"{BASE}classifier.dense.bias"), ["classifier.dense.bias"]),
}

VIT_GENERATOR = "blocks.0.attn.gen.genft_share_1_a.linear"
VIT_FAULTS = {
    "missing shared": (dropped(f"{VIT_GENERATOR}.weight"), ["best_model.pt", f"missing {VIT_GENERATOR}.weight"]),
    "missing bias": (dropped(f"{VIT_GENERATOR}.bias"), [f"missing {VIT_GENERATOR}.bias"]),
    "missing half": (dropped("blocks.1.attn.genft_individual_weight_a"), ["blocks.1.attn.genft_individual_weight_a"]),
    "missing block": (
        dropped("blocks.1.attn.genft_individual_weight_a", "blocks.1.attn.genft_individual_weight_b"),
        ["blocks.1.attn.genft_individual_weight_a, blocks.1.attn.genft_individual_weight_b"],
    ),
    "missing last block": (
        dropped("blocks.2.attn.genft_individual_weight_a", "blocks.2.attn.genft_individual_weight_b"),
        ["blocks.2.attn.qkv.specific_down"],
    ),
    "missing head": (dropped("head.weight", "head.bias"), ["head.weight, head.bias"]),
    "unexpected": (added("norm.weight"), ["unexpected norm.weight"]),
    "second generator": (added("blocks.1.attn.gen.genft_share_1_a.linear.weight"), ["unexpected blocks.1.attn.gen"]),
    "shape": (reshaped(blocks_2_attn_genft_individual_weight_b=(R, D)), ["blocks.2.attn.genft_individual_weight_b"]),
    "head shape": (reshaped(head_weight=(5, D + 1)), ["head.weight is [5, 17]"]),
    "class_num": (put(class_num=6), ["head.weight", "head.bias"]),
    "not a tensor": (lambda tensors, settings: tensors.update(best=3), ["best_model.pt", "best"]),
    "missing settings": (
        lambda t, settings: [settings.pop(k) for k in ("dpr", "scaling")],
        ["args.yaml", "scaling, dpr"],
    ),
    "bad number": (put(ratio_W0="1.4x"), ["args.yaml", "ratio_W0", "1.4x"]),
    "nothing to train": (put(generator_share_dim=0, individual_features=0), ["args.yaml", "both 0"]),
}
