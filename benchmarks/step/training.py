"""One training step of a model: its clock, and the gate that it passes first."""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.layer.cases import DTYPES
from benchmarks.measure import timing
from benchmarks.measure.gate import WrongResult
from benchmarks.step.methods import Method, trained
from benchmarks.step.models import StepCase, output_grad
from genft_kernels.adapted_model import adapted_layers
from genft_kernels.sharing import node as generation

# How far gradients in float64 may be off: the same sums in another order.
EXACT = 1e-10
# The same, compiled: where a model casts to float32 in between, a compiler leaves that out.
COMPILED_EXACT = 1e-5
# Tokens of a sequence in the gate.
_FEW = 7


class Step:
    """A model, and the micro-batches of one optimizer step: inputs, and the gradient of the last hidden state."""

    def __init__(self, method: Method, model: nn.Module, case: StepCase) -> None:
        self.method, self.model, self.case = method, model, case
        self.trained = trained(model)
        targets = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in model.targets]
        self.layers = 0 if method.k is None else len(targets)  # those that are adapted
        self._groups = {id(group): group for group in (each.generator.group for each in adapted_layers(model).values())}
        self._optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-5, fused=True)
        inputs = [case.model.inputs(model, case.batch, case.sequence, seed) for seed in range(case.accumulation)]
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # no graph for a shape
            output = model(**inputs[0]).last_hidden_state
        self.micro_batches = [(each, output_grad(output, seed)) for seed, each in enumerate(inputs)]

    def gradients(self, micro_batches: int | None = None) -> dict[str, Tensor]:
        """Forward and backward of so many micro-batches, all by default; the gradients by name."""
        with self.method.context(self.model):
            for inputs, grad in self.micro_batches[:micro_batches]:
                self.model(**inputs).last_hidden_state.backward(grad)
        return {name: parameter.grad for name, parameter in self.trained.items()}

    def run(self, micro_batches: int | None = None) -> None:
        """The same, and the optimizer's update."""
        self.gradients(micro_batches)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def generations(self) -> int:
        """Calls of the generator so far."""
        return sum(group.generations for group in self._groups.values())


def clock(step: Step, device: torch.device) -> Callable[[], timing.Sample]:
    """Times a step, and of that what the generator takes, forward and backward, in seconds."""
    synchronize = timing.waiting_for(device)

    def once() -> timing.Sample:
        generations = step.generations
        synchronize()
        start = time.perf_counter()
        with _generator_spans(device) as spans:
            step.run()
        synchronize()
        seconds = time.perf_counter() - start
        times = (1e-3 * begin.elapsed_time(end) if device.type == "cuda" else end - begin for begin, end in spans)
        return {"step": seconds, "generator": sum(times), "generations": step.generations - generations}

    return once


@contextmanager
def _generator_spans(device: torch.device) -> Iterator[list[tuple]]:
    """(begin, end) of every call of the generator, forward or backward, within the context."""
    spans = []

    def timed(function: Callable) -> Callable:
        def call(*args, **options):
            begin = _now(device)
            result = function(*args, **options)
            spans.append((begin, _now(device)))
            return result

        return call

    forward, backward = generation.Generation, generation._Generate
    with (
        mock.patch.object(forward, "__init__", timed(forward.__init__)),
        mock.patch.object(backward, "backward", staticmethod(timed(backward.backward))),
    ):
        yield spans


def _now(device: torch.device):
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


# --- the gate -------------------------------------------------------------------------------------------------------


def check(method: Method, case: StepCase, device: torch.device) -> None:
    """Compare a step's gradients with those of the plain model whose weights are W + dW, dW by the specification.

    Of a tiny model, without dropout. In float64 each tensor must agree; in the case's dtype twice the error of plain
    PyTorch is allowed, root mean square over the tensors: a step has too many of them for each to be held to it.

    Raises:
        WrongResult: gradients are off or missing; the message names the worst.
    """
    small = dataclasses.replace(case, batch=3, sequence=_FEW, accumulation=min(case.accumulation, 2))
    for dtype in dict.fromkeys((torch.float64, DTYPES[case.dtype_name])):
        base = case.model.build(device, dtype, tiny=True)
        step = Step(method, method.build(base, dropout=False), small)
        exact, plain = (_plain_gradients(step, base, each) for each in (torch.float64, dtype))
        actual = step.gradients()
        if missing := [name for name in exact if actual.get(name) is None]:
            raise WrongResult(f"{missing[0]} has no gradient")
        errors = _errors(actual, exact)
        worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))  # NaN is the worst
        error, allowed = errors[worst], COMPILED_EXACT if method.compiled else EXACT
        if dtype != torch.float64:
            both = errors.values(), _errors(plain, exact).values()
            error, of_plain = (statistics.fmean(each * each for each in found) ** 0.5 for found in both)
            allowed = 2 * of_plain + torch.finfo(dtype).eps
        if not error <= allowed:
            raise WrongResult(
                f"gradients in {str(dtype).removeprefix('torch.')} are off by {error:.2g} of their norm, where "
                f"{allowed:.2g} is allowed; that of {worst} by {errors[worst]:.2g}"
            )


def _errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors by name; a gradient that is zero but for rounding, as a key's bias has, against the largest."""
    norms = {name: tensor.double().norm().item() for name, tensor in exact.items()}
    least = 1e-9 * max(norms.values())
    apart = {name: (actual[name].double() - exact[name].double()).norm().item() for name in exact}
    return {name: apart[name] / max(norms[name], least) for name in exact}


def _plain_gradients(step: Step, base: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients of what `step` trains by way of `base`, both in `dtype`."""
    model, base = copy.deepcopy(step.model).to(dtype), copy.deepcopy(base).to(dtype)
    for inputs, grad in step.micro_batches:
        inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
        functional_call(base, step.method.plain_weights(model), (), inputs).last_hidden_state.backward(grad.to(dtype))
    return {name: parameter.grad for name, parameter in trained(model).items()}
