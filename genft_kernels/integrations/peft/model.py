"""`PeftGenFTModel`: the tuner that PEFT makes for a `PeftGenFTConfig`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...adaptable import check_not_wrapped, is_conv1d
from ...arguments import about
from ...config import GenFTConfig, replaced
from ...experts.layer import STACKED
from ...experts.targets import find_expert_targets
from ...files.fingerprint import Fingerprint
from ...files.names import PEFT_WRAPPER
from ...frozen_weight import kind_of
from ...generator import GenFTGenerator, SharedTensors
from ...matching import ends, held_at, put
from ...sharing.source import is_tensor_subclass
from ...targets import blocks_of, check_called, check_gradients_pass, weight_of
from ...units import adapter_dtype
from .config import PREFIX, PeftGenFTConfig
from .experts import AdapterExperts, ExpertStack
from .layer import BASE, SHARED, AdapterLayer, GenFTLayer, StoredGenerator
from .quantised import layer_over


class PeftGenFTModel(BaseTuner):
    """GenFT for all targeted layers of a model; layers of one weight shape share a generator in each adapter.

    Shared tensors are registered on the model itself, as `genft_shared`, because transformers' `add_adapter` keeps the
    model and no tuner.
    """

    genft_shared: Any  # the model's SharedTensors

    prefix = PREFIX
    tuner_layer_cls = AdapterLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As ever; and the adapter gets a place for its shared tensors.

        Raises:
            ValueError: the adapter comes from a file, and was trained on another base model; or an entry of
                `fused_blocks` names no target.
        """
        config = self.peft_config[adapter_name]
        check_not_wrapped(model)
        check_base(config, model)
        at = held_at(model.named_modules(remove_duplicate=False))
        self._held_twice = {module: paths for module, paths in at.items() if len(paths) > 1}
        self._generators: dict[tuple[int, int], GenFTGenerator] = {}  # the new adapter's
        adapted = _layers(model)
        if SHARED not in model._modules:
            model.add_module(SHARED, SharedTensors())
        self.genft_shared[adapter_name] = nn.ParameterDict()
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            _check_blocks(config, model, adapter_name)
            check_gradients_pass(model, {layer: path for path, layer in layers_with(adapter_name, model).items()})
        except BaseException:
            for layer in layers_with(adapter_name, model).values():
                del layer.genft_own[adapter_name]
            for path, layer in _layers(model).items():
                if path in adapted:
                    continue
                if isinstance(layer, ExpertStack):
                    del layer.experts._modules[path.rpartition(".")[2]]
                else:
                    put(model, path, layer.base_layer)
            _release_experts(model, [each for each in _experts(model).values() if not each.updates])
            del self.genft_shared[adapter_name]
            if not adapted:
                del model._modules[SHARED]
            raise

    @staticmethod
    def _check_target_module_exists(config: Any, key: str) -> Any:
        """As ever; but an adapter may be called as targets are, and its shared tensors are none."""
        return key.partition(".")[0] != SHARED and BaseTuner._check_target_module_exists(config, key)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftGenFTConfig, adapter_name: str, state_dict: dict[str, Tensor], *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        """As ever; and the configuration, which is saved next, tells what the adapter was trained on."""
        config.fingerprints = _fingerprints(model, adapter_name)
        shared = {key: state_dict[key] for key in state_dict if f"{SHARED}.{adapter_name}." in key}
        return shared | super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftGenFTConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As ever; and shared tensors get the adapter's name."""
        named = {key.replace(f"{SHARED}.", f"{SHARED}.{adapter_name}."): state_dict[key] for key in state_dict}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, named)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        shared = [(parameter, parameter.requires_grad) for parameter in self.genft_shared.parameters()]
        super()._mark_only_adapters_as_trainable(model)  # freezes what is on no layer of the tuner's
        for parameter, train in shared:
            parameter.requires_grad_(train)

    def delete_adapter(self, adapter_name: str) -> None:
        """As ever, with the adapter's shared tensors."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.genft_shared:  # else its last layer has taken it away
            del self.genft_shared[adapter_name]

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        experts = _experts(self.model)
        merging = {name: kwargs[name] for name in ("safe_merge", "adapter_names") if name in kwargs}
        for stack in (stack for each in experts.values() for stack in each.updates.values() if merge):
            stack.merge(**merging)
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        _release_experts(model, list(experts.values()))
        del model._modules[SHARED]
        return model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in a place, and no more: PEFT's hands on a weight, which a trained container has not.

        Its other steps are done: a layer of ours brings its units to the device of the layer that it keeps.
        """
        setattr(parent, child_name, new_module)

    def _prepare_adapter_config(self, peft_config: PeftGenFTConfig, model_config: dict[str, Any]) -> PeftGenFTConfig:
        """As ever; but experts alone are adapted where they alone are named."""
        if peft_config.target_parameters and peft_config.target_modules is None:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _inject_parameters(
        self, peft_config: PeftGenFTConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """The parameters that got the adapter: each a stack of experts, as `GenFTConfig.target_parameters` says."""
        native = peft_config.native()
        choice: dict[str, Any] = {name: getattr(peft_config, name) for name in ("target_parameters", "exclude_modules")}
        targets = find_expert_targets(model, replaced(native, **choice))
        for target in targets:
            if len(target.paths) > 1:
                raise ValueError(f"{target.paths[0]!r} and {target.paths[1]!r} are one module: PEFT knows only one")
        for target in targets:
            (path,) = target.paths
            experts = model.get_submodule(path)
            if not isinstance(experts, AdapterExperts):
                experts = AdapterExperts(experts)
                put(model, path, experts)
            stack = experts.stack(target.parameter, target.layout, self.genft_shared)
            with init_empty_weights() if low_cpu_mem_usage else contextlib.nullcontext():
                generator = self._generator(adapter_name, native, target.layout.block_shape, target.weight.dtype)
                stack.update_layer(adapter_name, generator)
            if adapter_name not in self.active_adapters:
                stack.requires_grad_(False)
        return [target.name.removesuffix(STACKED) for target in targets]

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """NotImplementedError: a sum of updates is no update that one generator makes."""
        raise NotImplementedError(
            "no weighted sums of GenFT adapters: activate several, by model.base_model.set_adapter([...]), or merge "
            "them, by model.merge_adapter([...]); both add their updates"
        )

    def _create_and_replace(
        self, peft_config: PeftGenFTConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **kwargs: Any,
    ) -> None:  # fmt: skip
        if isinstance(target, GenFTLayer):
            layer = target
        else:
            if isinstance(target, BaseTunerLayer):
                raise TypeError(f"{current_key!r} has an adapter of another kind: {type(target).__name__}")
            if at := self._held_twice.get(target):
                raise ValueError(f"{at[0]!r} and {at[1]!r} are one module: PEFT would adapt only one of them")
            try:
                check_called(self.model, current_key)
                layer = layer_over(target, self.genft_shared, self.model)
            except (TypeError, ValueError) as error:
                raise type(error)(f"Target module {current_key!r} is not supported. {error}") from None
        native = peft_config.native()
        blocks = blocks_of(native, current_key)
        with about(repr(current_key)):
            rows = next(iter(blocks.by_rows(layer.out_features)))
        shape = layer.in_features, rows
        generator = self._generator(adapter_name, native, shape, layer.frozen_weight.dtype)
        layer.update_layer(adapter_name, generator, blocks)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _generator(
        self, adapter_name: str, native: GenFTConfig, shape: tuple[int, int], dtype: torch.dtype
    ) -> GenFTGenerator:
        """The adapter's generator for weights of a shape (in, out) and dtype, made for the first of them."""
        if shape not in self._generators:
            container = self.genft_shared[adapter_name]
            self._generators[shape] = StoredGenerator(shape, native, container, adapter_dtype(dtype))
        return self._generators[shape]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in layers_with(adapter_name, self.model).values():
            layer.cast_adapter(adapter_name, autocast_adapter_dtype)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Within the context, `adapter_names` of a call reach the layers."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if _experts(self.model):
            raise ValueError("Cannot pass `adapter_names` with adapted experts, which see tokens of no sample.")
        known = {name for layer in _layers(self).values() for name in layer.genft_own}
        unknown = sorted(set(names) - known - {BASE})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams")
        repeated = names
        if isinstance(beams, int) and beams > 1:  # each sample is repeated so often, but not in an encoder
            repeated = [name for name in names for _ in range(beams)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        within_encoder = set() if encoder is None or encoder is self.model else set(encoder.modules())
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_names, names=names if module in within_encoder else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, (GenFTLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _layers(model: nn.Module) -> dict[str, GenFTLayer | ExpertStack]:
    return {path: module for path, module in model.named_modules() if isinstance(module, (GenFTLayer, ExpertStack))}


def _experts(model: nn.Module) -> dict[str, AdapterExperts]:
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterExperts)}


def _release_experts(model: nn.Module, released: list[AdapterExperts]) -> None:
    """Give some experts modules their places back."""
    for path, experts in _experts(model).items():
        if experts in released:
            put(model, path, experts.release())


def layers_with(adapter_name: str, model: nn.Module) -> dict[str, GenFTLayer | ExpertStack]:
    """The layers that have the adapter, by their paths."""
    return {path: layer for path, layer in _layers(model).items() if adapter_name in layer.genft_own}


def check_base(config: PeftGenFTConfig, model: nn.Module) -> None:
    """Raise ValueError where the weights are not those that the adapter was trained on, if that is known."""
    modules = dict(model.named_modules())
    for path in config.trained_on:
        module = modules.get(path)
        owner, _, parameter = path.removesuffix(STACKED).rpartition(".")
        stacked = getattr(modules.get(owner), parameter, None)
        if module is None and path.endswith(STACKED) and isinstance(stacked, Tensor):
            config.check_base(path, stacked.flatten(0, -2))
        elif module is None:
            raise ValueError(f"the adapter belongs to another base model: there is no module {path!r}")
        elif isinstance(module, (GenFTLayer, ExpertStack)):
            config.check_base(path, module.frozen_weight)
        elif isinstance(module, nn.Linear) or is_conv1d(module) or kind_of(module) is not None:
            config.check_base(path, weight_of(module))


def _check_blocks(config: PeftGenFTConfig, model: nn.Module, adapter_name: str) -> None:
    adapted = {end for path in layers_with(adapter_name, model) for end in ends(path)}
    for name in config.fused_blocks or {}:
        if name not in adapted:
            raise ValueError(f"fused_blocks[{name!r}] names no target module: put it into target_modules, too")


def _fingerprints(model: nn.Module, adapter_name: str) -> dict[str, Any] | None:
    """The fingerprints of the weights that an adapter is for, by the layers' paths; None if they are not at hand."""
    found = {}
    for path, layer in layers_with(adapter_name, model).items():
        if layer.stored_weight.device.type == "meta" or is_tensor_subclass(layer.frozen_weight):
            return None
        entry = Fingerprint.of(layer.frozen_weight).entry()
        found[path.removeprefix("_fsdp_wrapped_module.").removeprefix(PEFT_WRAPPER)] = entry
    return found


def _pass_names(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": names}
