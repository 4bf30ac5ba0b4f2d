"""Tiny mixture-of-experts models of transformers, and what they compute with materialised updates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from genft_kernels import GenFTConfig
from genft_kernels.adapted_model import adapted_layers
from genft_kernels.experts.update import ExpertUpdate
from genft_kernels.parameters import GeneratorParameters
from genft_kernels.reference import delta_weight

transformers = pytest.importorskip("transformers")

VOCABULARY, HIDDEN, EXPERTS = 32, 16, 6
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, max_position_embeddings=64, num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TARGETS = ("experts.gate_up_proj", "experts.down_proj")


def mixtral(hidden: int = HIDDEN, inner: int = 24) -> nn.Module:
    return _made("Mixtral", hidden_size=hidden, intermediate_size=inner, num_local_experts=EXPERTS)


def qwen3_moe() -> nn.Module:
    return _made("Qwen3Moe", intermediate_size=24, moe_intermediate_size=24, num_experts=EXPERTS, mlp_only_layers=[0])


def olmoe() -> nn.Module:
    return _made("Olmoe", intermediate_size=24, num_experts=EXPERTS, without=("head_dim",))


def gpt_oss() -> nn.Module:
    """Transposed, gate and up interleaved, with biases."""
    kinds = ["full_attention"] * 2
    return _made("GptOss", intermediate_size=24, num_local_experts=EXPERTS, layer_types=kinds)


def deepseek_v3() -> nn.Module:
    """A dense layer before the one with experts, and shared experts beside them."""
    heads = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)
    groups = dict(
        num_key_value_heads=2, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=True
    )
    return _made(
        "DeepseekV3", intermediate_size=24, moe_intermediate_size=24, n_routed_experts=EXPERTS, **heads, **groups,
        without=("head_dim",),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": mixtral, "qwen3_moe": qwen3_moe, "olmoe": olmoe, "gpt_oss": gpt_oss, "deepseek_v3": deepseek_v3,
}  # fmt: skip


def _made(kind: str, without: tuple[str, ...] = (), **settings) -> nn.Module:
    """In float64 and in evaluation, every parameter random."""
    common = {name: value for name, value in COMMON.items() if name not in (*without, *settings)}
    config = getattr(transformers, f"{kind}Config")(**common, **settings)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    model.set_experts_implementation("eager")  # grouped_mm, where it is the default, has no float64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in name:
                parameter.add_(1)
    return model


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def settings(**changes) -> GenFTConfig:
    """Both stages with an activation between them, and an update that is not zero."""
    chosen = dict(shared_dim=3, specific_dim=2, inner_activation="tanh", zero_delta=False, target_parameters=TARGETS)
    return GenFTConfig(**(chosen | changes))


def materialised(model: nn.Module) -> dict[str, Tensor]:
    """W + dW of every stack of an adapted model, by the parameter's name; differentiable, by the specification alone.

    It knows no code of `genft_kernels/experts`: each expert, and each half of gate and up, is a matrix of its own.
    """
    found = {}
    for path, update in adapted_layers(model).items():
        if isinstance(update, ExpertUpdate):
            name = path.removesuffix("_update")
            experts = model.get_submodule(name.rpartition(".")[0]).original
            found[name] = _materialised(update, experts)
    return found


def _materialised(update: ExpertUpdate, experts: nn.Module) -> Tensor:
    stored = update.stored_weight
    results = []
    for expert in range(stored.shape[0]):
        matrix = stored[expert].T if experts.is_transposed else stored[expert]  # [out, in]
        halves = [matrix]
        if update.parameter_name == "gate_up_proj":
            half = matrix.shape[0] // 2
            halves = [matrix[:half], matrix[half:]] if experts.is_concatenated else [matrix[::2], matrix[1::2]]
        own = {
            name: units if units.dim() == 2 else units[expert] for name, units in update.specific_parameters().items()
        }
        params = GeneratorParameters.concatenated(update.generator(), own, stored.device)
        updated = [half + delta_weight(half, params, update.config) for half in halves]
        if len(updated) == 1 or experts.is_concatenated:
            joined = torch.cat(updated)
        else:
            joined = torch.stack(updated, 1).flatten(0, 1)
        results.append(joined.T if experts.is_transposed else joined)
    return torch.stack(results)


def answer(model: nn.Module, ids: Tensor, replaced: Mapping[str, Tensor] | None = None) -> Tensor:
    """The logits, of a plain model perhaps with other tensors in the place of parameters."""
    call = dict(input_ids=ids, use_cache=False)
    if replaced is None:
        return model(**call).logits
    return torch.func.functional_call(model, dict(replaced), kwargs=call).logits


def experts_of(model: nn.Module) -> nn.Module:
    """The experts module of the last layer."""
    return model.model.layers[-1].mlp.experts


def routed(count: int = 11, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, d], experts and weights [T, 2] of each token; the last expert gets none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in range(count)])
    weights = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return x, chosen, weights


def results(module: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor], trained: dict[str, Tensor]) -> dict:
    """y of an experts module, and the gradients of a loss in it: of x, of the routing weights, of what trains."""
    x, chosen, weights = inputs
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = module(x, chosen, weights)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    wanted = {"x": x, "weights": weights, **trained}
    grads = torch.autograd.grad((y * slope).sum(), list(wanted.values()), allow_unused=True)
    return {"y": y.detach(), **{f"d {name}": g for name, g in zip(wanted, grads, strict=True) if g is not None}}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """All that trains in a model, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def expected(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> dict:
    """`results` of the last layer's experts with materialised updates, by the class's own loop."""
    experts = experts_of(model)
    original = experts.original
    path = next(name for name, module in model.named_modules() if module is experts)

    def computed(*arguments: Tensor) -> Tensor:
        replaced = {n.removeprefix(f"{path}."): w for n, w in materialised(model).items() if n.startswith(f"{path}.")}
        loop = type(original).forward.__wrapped__
        clone = copy.copy(original)
        clone.__dict__["_parameters"] = {**original._parameters, **replaced}
        return loop(clone, *arguments)

    return results(computed, inputs, trained(model))


def largest_difference(found: dict, wanted: dict) -> float:
    """The largest relative difference of any tensor; the two must have the same ones."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    return max(((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted)
