"""For the transformers `Trainer`: `AccumulateCallback`."""

from __future__ import annotations

import torch
from accelerate.state import GradientState
from torch.utils import _pytree
from transformers import TrainerCallback

from .. import _torch_private
from ..sharing.accumulate import Accumulation


class AccumulateCallback(TrainerCallback):
    """`accumulate` for a `Trainer`: the adapter's updates are generated once for each optimizer step.

        Trainer(model, TrainingArguments(gradient_accumulation_steps=8, ...), callbacks=[AccumulateCallback()], ...)

    The `Trainer` clips gradients before it calls back, so the updates' gradients reach the parameters earlier: at the
    end of the last micro-batch's backward. Each micro-batch must have one backward, as `Trainer.training_step` does.

    Raises, when training begins:
        ValueError: the model has no adapted layers; or under `DistributedDataParallel`
            `ddp_find_unused_parameters` is on, which takes for unused what receives its gradient late.
    """

    def __init__(self) -> None:
        self._accumulation: Accumulation | None = None
        self._queued = False
        self._hook = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Attach to the model."""
        self._detach()  # from a run that was interrupted
        _check_distributed(args)
        self._accumulation = Accumulation(model)
        self._hook = model.register_forward_hook(self._after_forward)

    def on_step_begin(self, args, state, control, **kwargs):
        """From here to the end of the last backward there is one generation."""
        if not self._accumulation.active:
            self._accumulation.start()

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the model as it was."""
        self._detach()

    def _after_forward(self, model, inputs, output) -> None:
        """Have the last micro-batch's backward call `_flush` when it ends."""
        if not (self._accumulation.active and torch.is_grad_enabled() and GradientState().sync_gradients):
            return
        self._queued = False
        for leaf in _pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                # A hook of an output runs in the outermost backward, where checkpointed regions have inner ones.
                leaf.register_hook(self._queue_flush)

    def _queue_flush(self, grad: torch.Tensor) -> None:
        if not self._queued:
            self._queued = True
            _torch_private.when_backward_ends(self._accumulation.flush)

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._accumulation.stop()
        self._accumulation = self._hook = None


def _check_distributed(args) -> None:
    find_unused = args.ddp_find_unused_parameters
    if find_unused is None:  # the Trainer's own default
        find_unused = not args.gradient_checkpointing
    wrapped = args.world_size > 1 and not (args.fsdp or args.deepspeed)
    if wrapped and find_unused:
        raise ValueError("AccumulateCallback needs ddp_find_unused_parameters=False in the TrainingArguments")
