"""Whatever is done to an adapted model, in any order, its outputs and gradients are those of the materialised update.

`make fuzz ARGS=20000` takes that many steps with fresh seeds; the suite takes the same ones each time, for a minute.
"""

import contextlib
import copy
import io
import pickle
import sys
import tempfile
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings, stateful
from hypothesis.stateful import initialize, invariant, precondition, rule

from genft_kernels import (
    GenFTLinear,
    accumulate,
    apply_genft,
    disabled,
    load_adapter,
    merge,
    remove_genft,
    save_adapter,
    unmerge,
)
from tests.helpers.fuzzing import CHANGES, OPTIMIZERS, TOLERANCES, Parts, Subject, configs, failing
from tests.helpers.oracle import CHECKPOINTS, Oracle, Tower, frozen_state

STEPS_OF_A_RUN = 50
NOT_CALLED = "adapted, but not called in the model's first forward"  # which may be one of a part
PLACES = ["blocks.0.fused", "blocks.1.query", "head"]


class Machine(Parts):
    """The operations that a model may meet."""

    @initialize(seed=st.integers(0, 2**16))
    def start(self, seed):
        torch.manual_seed(seed)
        self.model = Tower().double()
        self.config = self.optimizer = self.kept = None
        self.merged = False
        self.frozen = frozen_state(self.model)

    @precondition(Subject.bare)
    @rule(config=configs(), seed=st.integers(0, 2**16))
    def apply(self, config, seed):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # k exceeds the width
            apply_genft(self.model, config)
        self.config = config
        self.randomise(seed)

    @precondition(Subject.free)
    @rule(seed=st.integers(0, 2**16))
    def randomise(self, seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in self.trained().values():
                parameter.normal_(std=0.3)

    @precondition(Subject.adapted)
    @rule()
    def remove(self):
        self.merged = False
        self.take_up()
        remove_genft(self.model)
        self.forget()

    @precondition(Subject.free)
    @rule()
    def remove_and_keep(self):
        x = self.input()
        expected = Oracle(self.model, self.frozen).output(x)
        remove_genft(self.model, keep_update=True)
        self.forget()
        self.assert_close(self.evaluated(x), expected, "kept update")
        for parameter in self.model.parameters():  # or updates of updates grow without bound
            parameter.data.mul_(0.4 / parameter.abs().max())
        self.frozen = frozen_state(self.model)

    @precondition(Subject.free)
    @rule()
    def merge(self):
        merge(self.model)
        self.merged = True

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self):
        unmerge(self.model)
        self.merged = False

    @rule(training=st.booleans())
    def mode(self, training):
        self.model.train(training)

    @precondition(lambda self: not self.merged)
    @rule(dtype=st.sampled_from([*TOLERANCES, torch.float64, torch.float64]))
    def cast(self, dtype):
        self.model.to(dtype)
        self.frozen = {n: t if self.put_aside(n) else t.to(dtype) for n, t in self.frozen.items()}
        self.optimizer = self.kept = None

    @rule(
        context=st.sampled_from([torch.no_grad, torch.inference_mode, contextlib.nullcontext]),
        times=st.integers(1, 2),
    )
    def evaluate(self, context, times):
        for _ in range(times):
            x = self.input()
            oracle = Oracle(self.model, self.frozen, self.adapted())
            self.assert_close(self.evaluated(x, context), oracle.output(x), "output")

    @precondition(Subject.adapted)
    @rule(fails=st.booleans())
    def disable(self, fails):
        x = self.input()
        self.take_up()
        with failing(self.model.blocks[1].down, False) if fails else contextlib.nullcontext(), disabled(self.model):
            y = self.model(x)
            self.assert_close(y, Oracle(self.model, self.frozen, adapted=False).output(x), "output, disabled")

    @precondition(Subject.free)
    @rule(
        together=st.booleans(),
        count=st.integers(1, 3),
        first_without=st.booleans(),
        checkpointing=st.sampled_from(sorted(CHECKPOINTS)),
        autocast=st.sampled_from([False, False, True]),
        zero=st.sampled_from([True, True, False]),
        times=st.sampled_from([1, 1, 2]),
        optimizer=st.sampled_from([None, *OPTIMIZERS]),
    )
    def train(self, together, count, first_without, checkpointing, autocast, zero, times, optimizer):
        """`count` micro-batches, in `accumulate` or not, each backward so many `times`, and a step."""
        times = 1 if checkpointing == "selective" else times  # what it saves it gives only once
        self.model.train()
        self.model.checkpointing = checkpointing
        if zero:
            self.model.zero_grad()
        expected = {n: 0 if p.grad is None else p.grad.double().clone() for n, p in self.trained().items()}
        inputs = [self.input() for _ in range(count)]
        autocasting = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        seen = []
        with accumulate(self.model) if together else contextlib.nullcontext():
            if first_without:
                with torch.no_grad(), autocasting, warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # reentrant checkpointing without gradients
                    self.model(self.input())
            for x in inputs:
                with autocasting:
                    y = self.model(x)
                loss = y.double().square().sum()
                for repetition in range(times, 0, -1):
                    loss.backward(retain_graph=repetition > 1)
                seen.append((y, x.grad))
        self.model.checkpointing = "none"
        missing = [n for n, p in self.trained().items() if p.grad is None or not p.grad.isfinite().all()]
        assert not missing, f"without a finite gradient: {missing}"
        if not self.config.dropout:
            oracle = Oracle(self.model, self.frozen)
            wide = [x.detach().double().requires_grad_() for x in inputs]
            answers = [oracle.output(x) for x in wide]
            of_parameters, of_inputs = oracle.backward(sum(times * y.square().sum() for y in answers), wide)
            for (y, _), answer in zip(seen, answers, strict=True):
                self.assert_close(y, answer, "training output", autocast)
            if self.gradients_follow(autocast):
                for (_, gradient), of_x in zip(seen, of_inputs, strict=True):
                    self.assert_close(gradient, of_x, "gradient of x", autocast)
                expected = {name: expected[name] + gradient for name, gradient in of_parameters.items()}
                self.assert_gradients(expected, autocast)
        if optimizer is not None:
            self.step(optimizer)

    @precondition(Subject.free)
    @rule(of=st.integers(0, 100), again=st.booleans(), seed=st.integers(0, 2**16))
    def change_before_backward(self, of, again, seed):
        """A tensor changes between forward and a backward: an error, or the gradients of what it was."""
        if self.config.dropout:
            return
        self.model.train().zero_grad()
        x, oracle = self.input(), Oracle(self.model, self.frozen)
        loss = self.model(x).double().square().sum()
        wide = x.detach().double().requires_grad_()
        expected, (of_x,) = oracle.backward(oracle.output(wide).square().sum(), [wide])
        if again:
            loss.backward(retain_graph=True)
            self.model.zero_grad()
            x.grad = None
        self.change("in place", of, seed)
        try:
            loss.backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error) or "was changed in place" in str(error), error
        else:
            if self.gradients_follow():
                self.assert_gradients(expected)
                self.assert_close(x.grad, of_x, "gradient of x")
        self.model.zero_grad()

    @precondition(Subject.free)
    @rule(of=st.integers(0, 100))
    def freeze_or_thaw(self, of):
        """One of the adapter's parameters; never the last that trains."""
        own = [p for name, p in self.model.named_parameters() if name not in self.frozen]
        parameter = own[of % len(own)]
        if not parameter.requires_grad or sum(p.requires_grad for p in own) > 1:
            parameter.requires_grad_(not parameter.requires_grad)
            parameter.grad = self.optimizer = None

    @precondition(Subject.free)
    @rule(
        together=st.booleans(),
        backward=st.booleans(),
        place=st.sampled_from(["blocks.0.fused", "blocks.1.query", "head"]),
    )
    def fail_midway(self, together, backward, place):
        self.model.train()
        before = {name: p.grad for name, p in self.trained().items()}
        with (
            failing(self.model.get_submodule(place), backward),
            accumulate(self.model) if together else contextlib.nullcontext(),
        ):
            self.model(self.input()).sum().backward()
        for name, parameter in self.trained().items():  # what a failed backward left
            parameter.grad = before[name]
        self.model.zero_grad()

    @precondition(Subject.free)
    @rule(how=st.sampled_from(sorted(CHANGES)), of=st.integers(0, 100), seed=st.integers(0, 2**16))
    def change(self, how, of, seed):
        """One trained parameter or W, past autograd."""
        torch.manual_seed(seed)
        names = [*self.trained(), *(name for name in self.frozen if name.endswith("weight"))]
        name = names[of % len(names)]
        parameter = self.model.get_parameter(name)
        if how == "numpy's view" and parameter.dtype == torch.bfloat16:
            how = "in place"
        new = (0.4 * torch.randn(parameter.shape, dtype=torch.float64)).to(parameter.dtype)
        with torch.no_grad():
            CHANGES[how](parameter, new)
        assert torch.equal(parameter, new)
        if name in self.frozen and not parameter.requires_grad:
            self.frozen[name] = new

    @precondition(Subject.free)
    @rule()
    def keep_state(self):
        self.kept = copy.deepcopy(self.model.state_dict())

    @precondition(lambda self: self.free() and self.kept is not None)
    @rule(assign=st.booleans())
    def load_state(self, assign):
        self.model.load_state_dict(copy.deepcopy(self.kept), assign=assign)
        self.frozen = {n: t if self.put_aside(n) else self.kept[n].clone() for n, t in self.frozen.items()}
        self.optimizer = None

    @precondition(Subject.free)
    @rule()
    def save_and_load(self):
        """The adapter, into a fresh copy of the base model."""
        self.take_up()
        fresh = Tower().to(self.dtype)
        fresh.load_state_dict(self.frozen)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # k exceeds the width
            save_adapter(self.model, folder)
            load_adapter(fresh, folder)
        wanted = dict(self.model.named_parameters())
        found = dict(fresh.named_parameters())
        assert set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
        self.model, self.optimizer = fresh.train(self.model.training), None

    @precondition(Subject.adapted)
    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]), seed=st.integers(0, 2**16))
    def go_on_with_a_copy(self, how, seed):
        original = self.model
        if how == "deepcopy":
            self.model = copy.deepcopy(original)
        elif how == "pickle":
            self.model = pickle.loads(pickle.dumps(original))
        else:
            file = io.BytesIO()
            torch.save(original, file)
            file.seek(0)
            self.model = torch.load(file, weights_only=False)
        self.optimizer = None
        x = self.input()
        expected = Oracle(original, self.frozen).output(x)
        if self.merged:
            self.unmerge()
        self.randomise(seed)
        self.evaluate(torch.no_grad, 1)
        copied, self.model = self.model, original
        merged = any(layer.merged for layer in original.modules() if isinstance(layer, GenFTLinear))
        self.merged = merged
        self.assert_close(self.evaluated(x), expected, "the original of a copy")
        self.model, self.merged = copied, False

    @invariant()
    def frozen_weights_are_bit_for_bit_what_they_were(self):
        found = frozen_state(self.model)
        changed = [n for n in found if not self.put_aside(n) and not torch.equal(found[n], self.frozen[n])]
        assert not changed, changed


def options(steps):
    return settings(
        max_examples=max(1, steps // STEPS_OF_A_RUN),
        stateful_step_count=STEPS_OF_A_RUN,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings(f"ignore:{NOT_CALLED}")
def test_any_sequence_of_operations_computes_the_materialised_update():
    stateful.run_state_machine_as_test(Machine, settings=settings(options(6000), derandomize=True, database=None))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", NOT_CALLED)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    steps = int(sys.argv[1]) if sys.argv[1:] else 6000
    stateful.run_state_machine_as_test(Machine, settings=options(steps))
    print(f"{steps} steps without a mismatch")
