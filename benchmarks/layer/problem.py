"""The tensors of a case: random, equal for every provider, with an update of a chosen size beside W."""

import copy
import dataclasses
import zlib

import torch
from torch import Tensor

from benchmarks.layer.cases import Case
from genft_kernels import GeneratorParameters, GenFTConfig, reference
from genft_kernels.parameters import expected_shapes

SEED = 5


@dataclasses.dataclass
class Problem:
    """Inputs of one case on one device: x [tokens, in], dy [tokens, out], the frozen weight [out, in].

    `x` and whatever a provider trains require grad. The dtype is the case's, but for GenFT's parameters, which are
    float32 as the package keeps them over a 16-bit W.

    Args:
        ratio: ||dW|| / ||W|| of every update, GenFT's and LoRA's; it decides sigma and nothing else.
    """

    case: Case
    device: torch.device
    ratio: float = 0.5

    def __post_init__(self) -> None:
        layer = self.case.layer
        self.seed = torch.tensor([SEED], device=self.device)  # of the dropout masks; a tensor needs no copy in a call
        self.weight = self._random("weight", layer.out_features, layer.in_features, scale=layer.in_features**-0.5)
        self.x = self._random("x", self.case.tokens, layer.in_features).requires_grad_()
        self.dy = self._random("dy", self.case.tokens, layer.out_features)
        self.config = GenFTConfig(**self.case.config)
        self.params = self._generator_parameters()
        self.config = dataclasses.replace(self.config, scaling=self._scaling(self._delta_norm()))

    def with_ratio(self, ratio: float) -> "Problem":
        """The same tensors with another `ratio`."""
        other = copy.copy(self)
        other.ratio = ratio
        other.config = dataclasses.replace(self.config, scaling=self.config.scaling * ratio / self.ratio)
        return other

    def factors(self, rank: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Trained h [in, rank] and b [out, rank] of a factored update, or of a LoRA with A = h^T and B = b.

        Their values are those of the case's dtype, whatever `dtype` holds them.
        """
        layer = self.case.layer
        h = self._random(f"h{rank}", layer.in_features, rank, scale=layer.in_features**-0.5)
        b = self._random(f"b{rank}", layer.out_features, rank, scale=rank**-0.5)
        return tuple(matrix.to(dtype or matrix.dtype).requires_grad_() for matrix in (h, b))

    def scale(self, rank: int, activation: str = "identity", dropout: float = 0.0) -> float:
        """sigma with which the update from `factors(rank)` has about the wanted size, judged by 64 random tokens."""
        h, b = (matrix.detach().float() for matrix in self.factors(rank))
        probe = self._random("probe", 64, h.shape[0]).float()
        nothing = torch.zeros(b.shape[0], h.shape[0], device=self.device)  # W = 0 leaves the update alone
        effect = reference.factored_linear(
            probe, nothing, None, h, b, activation=activation, dropout=dropout, training=True, seed=self.seed
        )
        return self._scaling(effect.norm() / len(probe) ** 0.5)

    def _scaling(self, norm: Tensor) -> float:
        return self.ratio * (self.weight.float().norm() / norm).item()

    def _delta_norm(self) -> Tensor:
        with torch.no_grad():
            return reference.delta_weight(
                self.weight.float(), self.params, self.config, training=True, seed=self.seed
            ).norm()

    def _generator_parameters(self) -> GeneratorParameters:
        layer, config = self.case.layer, self.config
        shapes = expected_shapes(config, layer.in_features, layer.out_features, config.hidden_dim)
        made = {
            name: self._random(name, *shape, scale=shape[-1] ** -0.5).float().requires_grad_()
            for name, shape in shapes.items()
            if shape is not None
        }
        return GeneratorParameters(**{name: made.get(name) for name in GeneratorParameters._fields})

    def _random(self, name: str, *shape: int, scale: float = 1.0) -> Tensor:
        # Seeded by the name, so that the values do not depend on who asks first.
        generator = torch.Generator(self.device).manual_seed(SEED + zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator, device=self.device).mul_(scale).to(self.case.dtype)
