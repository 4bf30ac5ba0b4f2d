"""The ways to fine-tune a whole model, each with the plain weights that it stands for."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.layer.genft import official_linear
from benchmarks.measure.environment import version
from benchmarks.step.models import SEED
from genft_kernels import GenFTConfig, GenFTLinear, accumulate, apply_genft, reference
from genft_kernels.adapted_model import adapted_layers


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune a model.

    Args:
        name: unique among `METHODS`.
        title: as tables show it.
        adapt: gives a copy of a model what trains; with False, without dropout.
        plain_weights: by name, the weights with which the unadapted model computes the same, made of what trains.
        k: hidden units of an adapted layer's update; None where none is adapted.
        context: what a step's micro-batches run in.
        micro_batches: the least number of them that it is meant for.
        package: what must be installed.
        compiled: whether `torch.compile` makes the model one graph.
    """

    name: str
    title: str
    adapt: Callable[[nn.Module, bool], None]
    plain_weights: Callable[[nn.Module], dict[str, Tensor]]
    k: int | None = None
    context: Callable[[nn.Module], contextlib.AbstractContextManager] = contextlib.nullcontext
    micro_batches: int = 1
    package: str = "torch"
    compiled: bool = False

    def obstacle(self) -> str | None:
        """Why it cannot run, or None."""
        return None if version(self.package) else f"{self.package} is not installed (pip install {self.package})"

    def build(self, base: nn.Module, dropout: bool = True) -> nn.Module:
        """`base` adapted. Frozen weights are shared with it; what trains is random, so that no gradient is zero."""
        shared = {} if self.k is None else {id(t): t for t in (*base.parameters(), *base.buffers())}
        model = copy.deepcopy(base, shared)
        self.adapt(model, dropout)
        if self.k is not None:
            device = next(base.parameters()).device
            generator = torch.Generator(device).manual_seed(SEED)
            with torch.no_grad():
                for parameter in trained(model).values():
                    parameter.normal_(std=0.02, generator=generator)
        if self.compiled:
            torch._dynamo.config.recompile_limit = 64  # of all models' graphs: of gates, counts and clocks
            model.compile(fullgraph=True)  # which fails rather than going on without a graph
        return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _in_dtype_of_weights(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in trained(model).values():
        parameter.data = parameter.data.to(dtype)


def _lora(model: nn.Module, dropout: bool, rank: int) -> None:
    """PEFT's, its adapters in the model's dtype, without dropout."""
    from peft import LoraConfig, inject_adapter_in_model

    dtype = next(model.parameters()).dtype
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(model.targets)), model)
    _in_dtype_of_weights(model, dtype)


def _lora_weights(model: nn.Module) -> dict[str, Tensor]:
    """W + B A."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {
        f"{name}.weight": layer.get_base_layer().weight
        + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        for name, layer in layers.items()
    }


def _genft(model: nn.Module, dropout: bool, preset: str) -> None:
    # Specific units that start at zero, as vtab's do, would not train; they cost the same.
    settings = {"init_specific_down": "kaiming_uniform", **({} if dropout else {"dropout": 0.0})}
    apply_genft(model, GenFTConfig.preset(preset, target_modules=_targeted(model), **settings))


def _targeted(model: nn.Module) -> list[str]:
    """The targets that it has: a name that matches nothing is warned of."""
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in model.targets if name in present]


def _official(model: nn.Module, dropout: bool, preset: str) -> None:
    """The same parameters, but in W's dtype, and layers that materialise the update in every forward."""
    _genft(model, dropout, preset)
    for layer in adapted_layers(model).values():
        layer.forward = functools.partial(_official_forward, layer)
    _in_dtype_of_weights(model, layer.weight.dtype)


def _official_forward(layer: GenFTLinear, x: Tensor) -> Tensor:
    return official_linear(x, layer.weight, layer.parameters_of_generator(), layer.config, bias=layer.bias)


def _genft_weights(model: nn.Module) -> dict[str, Tensor]:
    """W + dW by the specification."""
    return {
        f"{name}.weight": layer.weight
        + reference.delta_weight(layer.weight, layer.parameters_of_generator(), layer.config)
        for name, layer in adapted_layers(model).items()
    }


def _registry() -> Iterator[Method]:
    forms = {
        "fast": "fast (column stage)", "fast-both": "fast-both (factored)", "fast-sum": "fast-sum (both side by side)",
        "vtab": "vtab (tiled, dropout)",
    }  # fmt: skip
    ranks = {preset: _units(GenFTConfig.preset(preset, init_specific_down="kaiming_uniform")) for preset in forms}
    partial = functools.partial
    yield Method(
        "full", "full fine-tuning", lambda model, dropout: model.requires_grad_(True),
        lambda model: dict(model.named_parameters()),
    )  # fmt: skip
    for k in ranks.values():
        yield lora(k)
    for preset in ("fast-both", "vtab"):  # the official way has both stages always
        adapt = partial(_official, preset=preset)
        yield Method(f"official-{preset}", f"official way, {forms[preset]}", adapt, _genft_weights, ranks[preset])
    for preset, form in forms.items():
        name, rest = f"genft-{preset}", (partial(_genft, preset=preset), _genft_weights, ranks[preset])
        yield Method(name, f"GenFT, {form}", *rest)
        yield Method(f"{name}-accumulate", f"GenFT, {form}, accumulate", *rest, accumulate, 2)


def _units(config: GenFTConfig) -> int:
    """Hidden units of an update: a sum has those of both stages."""
    return config.hidden_dim * (2 if config.transform == "sum" else 1)


def lora(rank: int) -> Method:
    """PEFT's LoRA."""
    adapt = functools.partial(_lora, rank=rank)
    return Method(lora_of(rank), f"PEFT LoRA, rank {rank}", adapt, _lora_weights, rank, package="peft")


def lora_of(k: int | None, name: str = "") -> str:
    """The name of the LoRA of rank k that a method is compared with: compiled, too, if that is."""
    return f"{COMPILED if name.startswith(COMPILED) else ''}lora-{k}"


def _compiled(method: Method) -> Method:
    title = f"{method.title}, torch.compile"
    return dataclasses.replace(method, name=f"{COMPILED}{method.name}", title=title, compiled=True)


COMPILED = "compiled-"
METHODS = {method.name: method for method in _registry()}
USUAL = list(METHODS)  # the others are measured when asked for: compiling takes minutes
METHODS |= {each.name: each for each in (_compiled(METHODS[name]) for name in ("lora-19", "genft-fast"))}
