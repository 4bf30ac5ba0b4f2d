"""Faults in the PEFT tuner with its files."""

from tests.faults.planting import Fault

COMMAND = ["tests/files/test_lora_command.py"]
MAIN = "genft_kernels/__main__.py"
TUNER = [
    f"tests/integrations/test_peft{name}.py" for name in ("", "_several", "_merging", "_refusals", "_transformers")
]
EXPERTS = ["tests/integrations/test_peft_experts.py"]
SWAP = ["tests/integrations/test_peft_swap.py"]
FILES = ["tests/integrations/test_peft_files.py"]
PEFT = "genft_kernels/integrations/peft"

FAULTS = [
    Fault(
        "peft: a trace is checked against another graph",
        f"{PEFT}/layer.py",
        "if weight.requires_grad and not torch.is_grad_enabled():",
        "if not torch.is_grad_enabled():",
        ["tests/integrations/test_peft.py", "-k", "traced"],
    ),
    Fault(
        "peft: no version tells of a step on shared units alone",
        f"{PEFT}/layer.py",
        "        return dict(zip(self.tensor_names, self.tensors(), strict=True))\n\n    @property",
        "        return {}\n\n    @property",
        ["tests/integrations/test_peft.py", "-k", "versions_tell"],
    ),
    Fault(
        "command: the base is loaded before the adapter", MAIN, "read_adapter(Path(arguments.adapter))", "pass", COMMAND
    ),
    Fault(
        "together: scales of several adapters lost",
        "genft_kernels/together.py",
        "part.factors.b if equal else part.factors.b * part.action.scale",
        "part.factors.b",
        TUNER,
    ),
    Fault(
        "together: folded and rounded to nearest",
        "genft_kernels/together.py",
        "return F.linear(x.to(wide), folded",
        "return F.linear(x, folded.to(dtype)",
        TUNER,
    ),
    Fault(
        "together: different blocks act together",
        "genft_kernels/together.py",
        "if update.blocks.cut != blocks.cut:",
        "if False:",
        TUNER,
    ),
    Fault(
        "peft: hooks of the base layer lost",
        f"{PEFT}/layer.py",
        "share_hooks(base_layer, self)",
        "pass",
        TUNER,
    ),
    Fault("peft: a new layer is in training", f"{PEFT}/layer.py", "self.train(base_layer.training)", "pass", TUNER),
    Fault(
        "peft: merged on top of a merged weight",
        f"{PEFT}/layer.py",
        "adapters), self.stored_weight)",
        "adapters), self.bound)",
        TUNER,
    ),
    Fault(
        "peft: adapters merged before are lost",
        f"{PEFT}/layer.py",
        "self._with_updates([*self.merged_adapters, *names])",
        "self._with_updates(names)",
        TUNER,
    ),
    Fault(
        "peft: merged in place, into tied weights",
        f"{PEFT}/layer.py",
        "        self.base_layer.weight = holder",
        "        self.base_layer.weight.data = holder.data",
        TUNER,
    ),
    Fault(
        "peft: shared tensors do not train",
        f"{PEFT}/model.py",
        "            parameter.requires_grad_(train)",
        "            pass",
        TUNER,
    ),
    Fault(
        "together: W with all updates is kept",
        "genft_kernels/together.py",
        "return checkpoint(_folded, x, weight, bias, parts, use_reentrant=False, preserve_rng_state=False)",
        "return _folded(x, weight, bias, parts)",
        TUNER,
    ),
    Fault(
        "peft: converted by an SVD",
        f"{PEFT}/replaced.py",
        "module_to_lora = convert_module",
        "x = convert_module",
        TUNER,
    ),
    Fault(
        "peft: another adapter's layer in a conversion",
        f"{PEFT}/replaced.py",
        "    if adapter_name not in module.genft_own:",
        "    if False:",
        TUNER,
    ),
    Fault("peft: shared tensors as the base's", f"{PEFT}/replaced.py", "({SHARED} &", "(set() &", TUNER),
    Fault(
        "peft: shared tensors are not saved",
        f"{PEFT}/model.py",
        'if f"{SHARED}.{adapter_name}." in key}',
        "if False}",
        TUNER,
    ),
    Fault(
        "peft: shared tensors stay as drawn",
        f"{PEFT}/model.py",
        'key.replace(f"{SHARED}.", f"{SHARED}.{adapter_name}.")',
        "key",
        FILES,
    ),
    Fault(
        "peft: shared tensors stay in an unloaded model",
        f"{PEFT}/model.py",
        "        del model._modules[SHARED]\n        return model",
        "        return model",
        TUNER,
    ),
    Fault(
        "peft: no word on an adapter beside a model",
        f"{PEFT}/config.py",
        'if (folder / "config.json").exists():',
        "if False:",
        TUNER,
    ),
    Fault(
        "peft: an adapter of other settings takes one's place",
        f"{PEFT}/swap.py",
        '        raise ValueError(f"the adapter in {directory} has other settings',
        '        str(f"the adapter in {directory} has other settings',
        SWAP,
    ),
    Fault(
        "peft: an adapter of another base takes one's place",
        f"{PEFT}/swap.py",
        "    check_base(theirs, frozen)\n",
        "",
        SWAP,
    ),
    Fault(
        "peft: an adapter of other layers takes one's place",
        f"{PEFT}/swap.py",
        "        different |= theirs.trained_on.keys() ^ layers_with(adapter_name, frozen).keys()",
        "        pass",
        SWAP,
    ),
    Fault(
        "peft: a merged adapter is swapped",
        f"{PEFT}/swap.py",
        "    if any(adapter_name in names for names in merged):",
        "    if False:",
        SWAP,
    ),
    Fault(
        "peft: another base is not noticed",
        f"{PEFT}/model.py",
        "        check_base(config, model)",
        "        pass",
        FILES,
    ),
    Fault(
        "peft: a weight that nobody calls is adapted",
        f"{PEFT}/model.py",
        "                check_called(self.model, current_key)",
        "                pass",
        TUNER,
    ),
    Fault(
        "peft: a module held twice is adapted once",
        f"{PEFT}/model.py",
        "            if at := self._held_twice.get(target):",
        "            if at := ():",
        TUNER,
    ),
    Fault(
        "peft: layers stay after a failed adapter",
        f"{PEFT}/model.py",
        "                    put(model, path, layer.base_layer)",
        "                    pass",
        TUNER,
    ),
    Fault(
        "peft: a generator for each layer",
        f"{PEFT}/model.py",
        "        if shape not in self._generators:",
        "        if True:",
        TUNER,
    ),
    Fault(
        "peft: no fingerprints in files",
        f"{PEFT}/model.py",
        "config.fingerprints = _fingerprints(model, adapter_name)",
        "pass",
        FILES,
    ),
    Fault(
        "peft: init_weights=False starts at zero", f"{PEFT}/config.py", 'settings["zero_delta"] = False', "pass", TUNER
    ),
    Fault(
        "peft: a newer format is opened",
        f"{PEFT}/config.py",
        "if (format_version or 0) > FORMAT_VERSION:",
        "if False:",
        FILES,
    ),
    Fault(
        "names: two tensors of one name",
        "genft_kernels/files/names.py",
        "if renamed.setdefault(in_model(name), tensor) is not tensor:",
        "renamed[in_model(name)] = tensor\n        if False:",
        FILES,
    ),
    Fault(
        "peft file: trained biases are dropped",
        "genft_kernels/files/peft_file.py",
        'if description.get("bias", "none") != "none":',
        "if False:",
        FILES,
    ),
    Fault(
        "peft file: heads that are not there",
        "genft_kernels/files/peft_file.py",
        'return [name for name in saved if any(f".{name}." in tensor for tensor in dotted)] or None',
        "return saved",
        FILES,
    ),
    Fault(
        "format: old names are taken for new ones",
        "genft_kernels/files/format.py",
        'if description["format_version"] > 1:',
        "if True:",
        FILES,
    ),
    Fault(
        "peft experts: merged adapters are lost",
        f"{PEFT}/experts.py",
        "[self.genft_own[name] for name in adapters]",
        "[self.genft_own[name] for name in adapters[:1]]",
        EXPERTS,
    ),
    Fault(
        "peft experts: disabled ones stay merged",
        f"{PEFT}/experts.py",
        "return self.bound if self.enabled else self.stored_weight",
        "return self.bound",
        EXPERTS,
    ),
    Fault(
        "peft experts: scales of several adapters lost",
        f"{PEFT}/experts.py",
        "made[i][0].b * update.config.scaling",
        "made[i][0].b",
        EXPERTS,
    ),
    Fault(
        "peft experts: they stay after a failed adapter",
        f"{PEFT}/model.py",
        "            _release_experts(model, [each for each in _experts(model).values() if not each.updates])",
        "            pass",
        EXPERTS,
    ),
    Fault(
        "peft experts: unloaded without their updates",
        f"{PEFT}/model.py",
        "            stack.merge(**merging)",
        "            pass",
        EXPERTS,
    ),
    Fault(
        "peft experts: batches of several adapters pass",
        f"{PEFT}/model.py",
        "        if _experts(self.model):",
        "        if False:",
        EXPERTS,
    ),
    Fault(
        "peft file: stacks are taken for layers",
        "genft_kernels/files/peft_file.py",
        "    stacks = sorted(Names(updates, full_matches_in_time).matching(wanted)) if updates else []",
        "    stacks = []",
        EXPERTS,
    ),
]
