"""For the transformers `Trainer`: `AccumulateCallback` and `AdapterCheckpoints`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.state import GradientState
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback

from .. import _torch_private
from ..adapted_model import is_adapted, updates_of_peft
from ..files.adapter import load_adapter, save_adapter
from ..files.sharded import any_sharded
from ..sharing.accumulate import Accumulation


class AccumulateCallback(TrainerCallback):
    """`accumulate` for a `Trainer`: the adapter's updates are generated once for each optimizer step.

        Trainer(model, TrainingArguments(gradient_accumulation_steps=8, ...), callbacks=[AccumulateCallback()], ...)

    The `Trainer` clips gradients before it calls back, so the updates' gradients reach the parameters earlier: at the
    end of the last micro-batch's backward. Each micro-batch must have one backward, as `Trainer.training_step` does.

    Raises, when training begins:
        ValueError: the model has no adapted layers; or under `DistributedDataParallel` `ddp_find_unused_parameters` or
            `ddp_static_graph` is on, which takes for unused what receives its gradient late.
    """

    def __init__(self) -> None:
        self._accumulation: Accumulation | None = None
        self._queued = False
        self._hook: RemovableHandle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Attach to the model; errors as the class says."""
        self._detach()  # from a run that was interrupted
        _check_distributed(args)
        self._accumulation = Accumulation(model)
        self._hook = model.register_forward_hook(self._after_forward)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here to the end of the last backward there is one generation."""
        if self._accumulation is not None and not self._accumulation.active:
            self._accumulation.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        self._detach()

    def _after_forward(self, model: nn.Module, inputs: Any, output: Any) -> None:
        """Have the last micro-batch's backward end the accumulation when it ends itself."""
        accumulation = self._accumulation
        if accumulation is None or not (
            accumulation.active and torch.is_grad_enabled() and GradientState().sync_gradients
        ):
            return
        self._queued = False
        for leaf in _torch_private.leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                # A hook of an output runs in the outermost backward, where checkpointed regions have inner ones.
                leaf.register_hook(self._queue_flush)

    def _queue_flush(self, grad: torch.Tensor) -> None:
        if self._accumulation is not None and not self._queued:
            self._queued = True
            _torch_private.when_backward_ends(self._accumulation.flush)

    def _detach(self) -> None:
        if self._hook is not None and self._accumulation is not None:
            self._hook.remove()
            self._accumulation.stop()
        self._accumulation = self._hook = None


def _check_distributed(args: Any) -> None:
    find_unused = args.ddp_find_unused_parameters
    if find_unused is None:  # the Trainer's own default
        find_unused = not args.gradient_checkpointing
    wrapped = args.world_size > 1 and not (args.fsdp or args.deepspeed)
    if wrapped and find_unused:
        raise ValueError("AccumulateCallback needs ddp_find_unused_parameters=False in the TrainingArguments")
    if wrapped and getattr(args, "ddp_static_graph", None):  # not in every version of transformers
        raise ValueError("AccumulateCallback does not go with ddp_static_graph=True in the TrainingArguments")


class AdapterCheckpoints:
    """A mixin for `Trainer` and its kin: checkpoints and `save_model` hold the adapter, and no frozen weights.

        class AdapterTrainer(AdapterCheckpoints, Trainer): ...

    Training resumes from such checkpoints, `load_best_model_at_end` reads them, and so does `load_adapter`. The model
    has to be adapted beforehand, as for every `Trainer`. It may be quantised, which a plain `Trainer` refuses, because
    it knows of PEFT's adapters alone.

    Raises, when the Trainer is made:
        RuntimeError: the model has no adapter.
        NotImplementedError: under DeepSpeed or FSDP1; the message says what to set.
    """

    args: Any  # of the Trainer, as all that follows
    model: nn.Module
    state: Any
    accelerator: Any
    processing_class: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _said_to_have_an_adapter(kwargs.get("model", args[0] if args else None)):
            super().__init__(*args, **kwargs)
        self._adapted_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, the tokenizer or processor and the training arguments."""
        folder, model = output_dir or self.args.output_dir, self._adapted_model()
        if self.args.should_save or any_sharded(model.parameters()):
            save_adapter(model, folder)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)  # type: ignore[attr-defined]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter(self._adapted_model(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_adapter(self._adapted_model(), self.state.best_model_checkpoint)

    def _adapted_model(self) -> nn.Module:
        if getattr(self, "is_deepspeed_enabled", False):
            raise NotImplementedError(
                "AdapterCheckpoints does not gather what DeepSpeed has partitioned: leave out deepspeed= of the "
                "TrainingArguments, and shard with fsdp=True (FSDP2)"
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 1:
            raise NotImplementedError(
                "GenFT does not run under FSDP1: have FSDP2 by fsdp_config={'version': 2} of the TrainingArguments "
                "(fsdp_version: 2 in accelerate's configuration)"
            )
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not is_adapted(model):
            if updates_of_peft(model):
                raise RuntimeError(
                    "AdapterCheckpoints: the Trainer's model is one of PEFT's, of which checkpoints hold the adapter "
                    "anyway: leave this mixin out"
                )
            raise RuntimeError("AdapterCheckpoints: the Trainer's model has no adapter: call apply_genft first")
        return model


# By which a Trainer tells a quantised model with an adapter from one that nothing of could train.
_HAS_ADAPTER = "_hf_peft_config_loaded"


@contextlib.contextmanager
def _said_to_have_an_adapter(model: object) -> Iterator[None]:
    """Within the context transformers takes an adapted model for one with an adapter of PEFT's."""
    if not (isinstance(model, nn.Module) and is_adapted(model)) or _HAS_ADAPTER in vars(model):
        yield
        return
    setattr(model, _HAS_ADAPTER, True)
    try:
        yield
    finally:
        delattr(model, _HAS_ADAPTER)


# What the mixin takes the place of; without it a Trainer would go on writing whole models.
_REPLACED = ("save_model", "_load_from_checkpoint", "_load_best_model")
if missing := [name for name in _REPLACED if not hasattr(Trainer, name)]:
    raise ImportError(
        f"this version of transformers has no Trainer.{missing[0]}, which AdapterCheckpoints replaces: install "
        "another one (transformers>=5)"
    )
