"""`GenFTLinear`: a frozen linear layer whose update is generated from its own weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, reference
from .checks import check_frozen_weight, check_linear, check_transforms
from .config import GenFTConfig
from .functional import genft_linear
from .generator import GenFTGenerator, last_stage_names
from .parameters import GeneratorParameters, specific_shapes
from .sharing.cache import is_tensor_subclass
from .update import apply_factors, compute_dtype, forward_seed

__all__ = ["GenFTGenerator", "GenFTLinear"]


class GenFTLinear(nn.Linear):
    """A drop-in for `nn.Linear`: `weight` and `bias` frozen under the same names, plus a generated update.

    The layer's own trained units are `specific_down [r, in]` and `specific_up [out, r]` where both stages share
    them, else `column_specific_down [r, in]`, `column_specific_up [in, r]`, `row_specific_down [r, out]`,
    `row_specific_up [out, r]`, as far as the stages exist. The shared units are in `generator`.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`. Over a 16-bit weight the trained
            parameters are float32.
        config: the method's settings; defaults to the generator's, or to `GenFTConfig()`.
        generator: a shared generator of this shape; None makes one of the layer's own.
        backend: "auto", or a backend by name, which then never becomes another.

    Raises:
        ValueError: the generator's shape or configuration is not the layer's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: GenFTConfig | None = None,
        generator: GenFTGenerator | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if generator is None:
            config = GenFTConfig() if config is None else config
            generator = GenFTGenerator(in_features, out_features, config, device, adapter_dtype(self.weight.dtype))
        elif config is not None and config != generator.config:
            raise ValueError("config and generator.config differ; pass only one of them")
        self.generator = generator
        self._adapt(generator, backend)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        generator: GenFTGenerator,
        *,
        blocks: tuple[int, tuple[int, ...]] | None = None,
        backend: str = "auto",
        register_generator: bool = True,
    ) -> GenFTLinear:
        """Adapt an existing `nn.Linear` or transformers `Conv1D`, sharing its parameters.

        Args:
            linear: its `weight` and `bias` become the layer's, the same objects, and are frozen.
            generator: of the shape of the weight, or of one of its row blocks.
            blocks: (number of equal row blocks in a fused weight, the blocks to adapt); None adapts all of it.
            register_generator: False where another module owns the shared generator.

        Raises:
            TypeError: not a plain linear layer, or a weight that is quantised or computed.
            ValueError: a meta weight, or a generator of another shape.
        """
        check_adaptable(linear)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        # The same dictionaries, so that hooks on the original go on working, and their handles too.
        hooks = {name: value for name, value in vars(linear).items() if "_hooks" in name}
        layer.__dict__.update(hooks, _is_full_backward_hook=linear._is_full_backward_hook)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._fan_in_fan_out = is_conv1d(linear)
        out_features, in_features = layer.frozen_weight.shape
        layer.in_features, layer.out_features = in_features, out_features
        if register_generator:
            layer.generator = generator
        else:  # a plain attribute: nn.Module does not see it
            layer.__dict__["generator"] = generator
        layer._adapt(generator, backend, blocks)
        # Where to go back to; not a submodule, because its parameters are the layer's.
        layer.__dict__["_original"] = linear
        return layer.train(linear.training)

    _fan_in_fan_out = False
    _unmerged: nn.Parameter | None = None
    _enabled = True
    _sharded = False

    def _adapt(self, generator: GenFTGenerator, backend: str, blocks: tuple[int, tuple[int, ...]] | None = None):
        backends.check_name(backend)
        count, _ = self._blocks = blocks or (1, (0,))
        if self.out_features % count:
            raise ValueError(f"out_features={self.out_features} cannot be cut into {count} equal blocks")
        shape, wanted = (generator.in_features, generator.out_features), (self.in_features, self.out_features // count)
        if shape != wanted:
            raise ValueError(
                f"the generator is for in x out = {shape[0]}x{shape[1]}, the layer is {wanted[0]}x{wanted[1]}"
            )
        self.backend = backend
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        shapes = specific_shapes(self.config, *shape)
        for name, matrix_shape in shapes.items():
            data = torch.empty(matrix_shape, device=self.weight.device, dtype=adapter_dtype(self.weight.dtype))
            self.register_parameter(name, nn.Parameter(data))
        self.__dict__["specific_names"] = tuple(shapes)
        self.reset_specific_parameters()
        generator.group.join(self)

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self.generator.group.join(self)  # a copied layer that of its copied generator

    def __setattr__(self, name, value) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Tensor):  # FSDP gathers and shards so, without a trace in a version
            self.__dict__["_sharded"] = self._sharded or is_tensor_subclass(value)
            self._forget_factors()

    def train(self, mode: bool = True) -> GenFTLinear:
        """As ever; and `eval()` looks at the parameters anew, because a change through `.data` goes unseen."""
        if not mode:
            self._forget_factors()
        return super().train(mode)

    def _forget_factors(self) -> None:
        generator = self.__dict__.get("generator") or self._modules.get("generator")
        if generator is not None:  # else the layer is being made
            generator.group.forget(self)

    def reset_parameters(self) -> None:
        """Draw W, the bias and the layer's own units anew."""
        super().reset_parameters()
        if "specific_names" in vars(self):  # else it is nn.Linear's constructor that calls
            self.reset_specific_parameters()

    def reset_specific_parameters(self) -> None:
        """Draw the layer's own units anew, zero where `zero_delta` asks."""
        config = self.config
        last_up = last_stage_names(config)[0]
        zeroed = {"specific_up", last_up.replace("_up", "_specific_up")} if config.zero_delta else set()
        for name in self.specific_names:
            init = config.init_specific_up if name.endswith("up") else config.init_specific_down
            _initialise(getattr(self, name), "zeros" if name in zeroed else init)

    @property
    def config(self) -> GenFTConfig:
        return self.generator.config

    @property
    def blocks(self) -> tuple[int, tuple[int, ...]]:
        """(number of equal row blocks in the weight, those that are adapted)."""
        return self._blocks

    def specific_parameters(self) -> list[nn.Parameter]:
        """The layer's own trained parameters, in the order of `specific_names`."""
        return [getattr(self, name) for name in self.specific_names]

    def generation_inputs(self) -> list[Tensor]:
        """What the layer's factors are generated from, beside the generator: W as it is stored, and its own units."""
        return [self.weight if self._unmerged is None else self._unmerged, *self.specific_parameters()]

    def adapted_weights(self) -> list[Tensor]:
        """The adapted blocks of W, each [out, in] of the generator; views."""
        count, adapted = self._blocks
        blocks = self.frozen_weight.chunk(count)
        return [blocks[index] for index in adapted]

    @property
    def column_dropout(self) -> float:
        """The dropout of the column stage that is in effect now."""
        config = self.config
        return config.dropout if self.training and config.transform == "both" else 0.0

    @property
    def sharded(self) -> bool:
        """Whether parameters are, or have been, of a tensor class of their own, as FSDP's outside of a forward."""
        return self._sharded or is_tensor_subclass(self.weight)

    @property
    def frozen_weight(self) -> Tensor:
        """W [out, in], merged or not; a view where the original layer stores it transposed."""
        weight = self.weight if self._unmerged is None else self._unmerged
        return weight.t() if self._fan_in_fan_out else weight

    @property
    def merged(self) -> bool:
        """Whether `weight` holds W + dW."""
        return self._unmerged is not None

    def parameters_of_generator(self) -> GeneratorParameters:
        """The layer's trained tensors on its device, shared and specific units concatenated; differentiable."""
        specific = dict(zip(self.specific_names, self.specific_parameters(), strict=True))
        return GeneratorParameters.concatenated(self.generator.shared_parameters(), specific, self.weight.device)

    def delta_weight(self) -> Tensor:
        """dW [out, in] without dropout, generated from the frozen W, in float32 or wider; differentiable.

        Rows of blocks that are not adapted are zero.
        """
        weight = self.frozen_weight
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        params, (count, adapted) = self.parameters_of_generator(), self.blocks
        updates = [
            reference.delta_weight(block, params, self.config) if index in adapted else torch.zeros_like(block)
            for index, block in enumerate(weight.chunk(count))
        ]
        return updates[0] if count == 1 else torch.cat(updates)

    @torch.no_grad()
    def merge(self) -> None:
        """Rebind `weight` to W + dW, rounded to nearest; W itself is kept untouched for `unmerge`.

        Raises:
            RuntimeError: already merged.
        """
        if self.merged:
            raise RuntimeError("the update is merged already: call unmerge() first")
        delta = self.delta_weight()
        merged = (self.frozen_weight.to(delta.dtype) + delta).to(self.weight.dtype)
        merged = (merged.t() if self._fan_in_fan_out else merged).contiguous()
        frozen, self.weight = self.weight, nn.Parameter(merged, requires_grad=False)
        self.__dict__["_unmerged"] = frozen

    def unmerge(self) -> None:
        """Rebind `weight` to the very W that it was.

        Raises:
            RuntimeError: not merged.
        """
        if not self.merged:
            raise RuntimeError("the update is not merged")
        self.weight = self.__dict__.pop("_unmerged")

    def forward(self, x: Tensor) -> Tensor:
        if not self._enabled:
            return F.linear(x, self.frozen_weight, self.bias)
        if self.merged:
            if self.training:
                raise RuntimeError("a merged layer does not train: call unmerge() or eval() first")
            return F.linear(x, self.weight.t() if self._fan_in_fan_out else self.weight, self.bias)
        # A compiled graph cannot hold what outlives it, and sharded parameters cannot be watched.
        alone = torch.compiler.is_compiling() or self.backend == "reference" or self.sharded
        updated = self._generated_alone(x) if alone else self._generated_in_group(x)
        count, adapted = self._blocks
        if count == 1:
            return updated(self.frozen_weight, self.bias, 0)
        weights = self.frozen_weight.chunk(count)
        biases = (None,) * count if self.bias is None else self.bias.chunk(count)
        outputs = [
            updated(weight, bias, adapted.index(index)) if index in adapted else F.linear(x, weight, bias)
            for index, (weight, bias) in enumerate(zip(weights, biases, strict=True))
        ]
        return torch.cat(outputs, -1)

    def _generated_in_group(self, x: Tensor) -> Callable[[Tensor, Tensor | None, int], Tensor]:
        """What makes y from (a block of W, of the bias, its place among the adapted ones)."""
        check_linear(x, self.frozen_weight, self.bias)
        config, training, dtype = self.config, self.training, compute_dtype(x)
        psi, dropout = config.outer_activation, config.dropout if training else 0.0
        backend = backends.choose(self.backend, x.device, dtype)
        check_transforms(backend)
        seeds = [forward_seed(None, x.device, training, dropout, psi, dtype, backend) for _ in self._blocks[1]]
        factors = self.generator.group.factors_for(self, dtype, backend, seeds)
        return lambda weight, bias, place: apply_factors(
            x, weight, bias, factors[place], config.scaling, psi, dropout, seeds[place], backend
        )

    def _generated_alone(self, x: Tensor) -> Callable[[Tensor, Tensor | None, int], Tensor]:
        """The same, generating within the forward."""
        params, options = self.parameters_of_generator(), dict(training=self.training, backend=self.backend)
        return lambda weight, bias, place: genft_linear(x, weight, bias, params, self.config, **options)

    def extra_repr(self) -> str:
        config, (count, adapted) = self.config, self.blocks
        parts = [
            super().extra_repr(),
            f"shared_dim={config.shared_dim}, specific_dim={config.specific_dim}",
            f"blocks={list(adapted)} of {count}" if count > 1 else "",
            f"backend={self.backend!r}",
            "merged" if self.merged else "",
        ]
        return ", ".join(part for part in parts if part)

    def _apply(self, fn, recurse=True):
        self._forget_factors()
        super()._apply(fn, recurse)
        if self._unmerged is not None:  # not registered, so it is moved by hand
            self._unmerged.data = fn(self._unmerged.data)
        return self


def adapter_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """Trained parameters are float32 over a 16-bit weight, else of its dtype (docs/method.md#precision)."""
    return torch.promote_types(weight_dtype, torch.float32)


def check_adaptable(linear: nn.Module) -> None:
    """Raise unless `linear` is a plain `nn.Linear` or transformers `Conv1D` with a usable weight."""
    # A subclass with a forward of its own, or one whose owner reads the weight past forward, would bypass the update.
    plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear) or not (plain or is_conv1d(linear)):
        raise TypeError(f"{type(linear).__name__} cannot be adapted: only nn.Linear and transformers' Conv1D can")
    if linear._parameters.get("weight") is None:
        raise TypeError("its weight is not a parameter but computed (by a parametrization, weight or spectral norm)")
    check_frozen_weight(linear.weight.detach())


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D (weight [in, out]), told without importing transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


@torch.no_grad()
def _initialise(parameter: nn.Parameter, init: str) -> None:
    if init == "zeros":
        nn.init.zeros_(parameter)
    elif init == "kaiming_uniform":
        nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
    elif init == "xavier_uniform":
        nn.init.xavier_uniform_(parameter)
    else:
        nn.init.normal_(parameter, std=0.01)
