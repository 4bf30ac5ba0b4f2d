"""Faults in the export as LoRA and in the PEFT tuner with its files."""

from tests.faults.planting import Fault

LORA = ["tests/files/test_lora.py"]
FIDELITY = ["tests/files/test_fidelity.py"]
TUNER = ["tests/integrations/test_peft.py", "tests/integrations/test_peft_refusals.py"]
FILES = ["tests/integrations/test_peft_files.py"]
PEFT = "genft_kernels/integrations/peft"

FAULTS = [
    Fault(
        "export: the scale is not folded in",
        "genft_kernels/files/lora.py",
        "up[index] = config.scaling * factors.b",
        "up[index] = factors.b",
        LORA,
    ),
    Fault(
        "export: rank= is ignored where it is too small",
        "genft_kernels/files/lora.py",
        "if energy is None and (rank is None or thin.rank <= rank):",
        "if energy is None:",
        LORA,
    ),
    Fault(
        "export: the old description stays beside new tensors",
        "genft_kernels/files/lora.py",
        "(directory / CONFIG_FILE).unlink(missing_ok=True)",
        "pass",
        LORA,
    ),
    Fault(
        "export: Conv1D as nn.Linear",
        "genft_kernels/files/lora.py",
        '"fan_in_fan_out": all(layer._fan_in_fan_out for layer in layers.values()),',
        '"fan_in_fan_out": False,',
        LORA,
    ),
    Fault(
        "export: one rank more than asked for",
        "genft_kernels/files/lora.py",
        "count = min(count, len(values))",
        "count = min(count + 1, len(values))",
        LORA,
    ),
    Fault(
        "export: over an adapter of this package",
        "genft_kernels/files/lora.py",
        "    if is_ours(directory):",
        "    if False:",
        LORA,
    ),
    Fault(
        "export: another update of PEFT's passes",
        "genft_kernels/files/lora_check.py",
        "if error > max(1 - energy[path], 0) ** 0.5 + _UPDATE_TOLERANCE:",
        "if False:",
        LORA,
    ),
    Fault(
        "export: other logits of PEFT's pass",
        "genft_kernels/files/lora_check.py",
        "if not drift <= allowed:",
        "if False:",
        LORA,
    ),
    Fault(
        "export: frozen weights copied for the check",
        "genft_kernels/files/lora_check.py",
        "nn.Parameter(p.detach(), requires_grad=False)",
        "nn.Parameter(p.detach().clone(), requires_grad=False)",
        LORA,
    ),
    Fault("fidelity: gain of the whole answer", "genft_kernels/fidelity.py", "found - frozen", "found", FIDELITY),
    Fault(
        "together: scales of several adapters lost",
        "genft_kernels/together.py",
        "part.factors.b if equal else part.factors.b * part.config.scaling",
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
        'self.__dict__.update({name: value for name, value in vars(base_layer).items() if "_hooks" in name})',
        "pass",
        TUNER,
    ),
    Fault("peft: a new layer is in training", f"{PEFT}/layer.py", "self.train(base_layer.training)", "pass", TUNER),
    Fault(
        "peft: merged on top of a merged weight",
        f"{PEFT}/layer.py",
        "merged = self.stored_weight\n",
        "merged = self.base_layer.weight\n",
        TUNER,
    ),
    Fault(
        "peft: adapters merged before are lost",
        f"{PEFT}/layer.py",
        "for name in (*self.merged_adapters, *names):",
        "for name in names:",
        TUNER,
    ),
    Fault(
        "peft: merged in place, into tied weights",
        f"{PEFT}/layer.py",
        "self.base_layer.weight = nn.Parameter(merged, requires_grad=False)",
        "self.base_layer.weight.data = merged",
        TUNER,
    ),
    Fault(
        "peft: another adapter trains once one is added",
        f"{PEFT}/model.py",
        "            parameter.requires_grad_(train)",
        "            pass",
        TUNER,
    ),
    Fault(
        "peft: another base is not noticed",
        f"{PEFT}/model.py",
        "        _check_base(config, model)",
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
        "            if held_at:",
        "            if False:",
        TUNER,
    ),
    Fault(
        "peft: layers stay after a failed adapter",
        f"{PEFT}/model.py",
        "                if path not in adapted:",
        "                if False:",
        TUNER,
    ),
    Fault(
        "peft: a generator for each layer",
        f"{PEFT}/model.py",
        "        if shape not in generators:",
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
]
