"""Faults in the export as LoRA."""

from tests.faults.planting import Fault

LORA = ["tests/files/test_lora.py"]
COMMAND = ["tests/files/test_lora_command.py"]
MAIN = "genft_kernels/__main__.py"
FIDELITY = ["tests/files/test_fidelity.py"]
PEFT = "genft_kernels/integrations/peft"

FAULTS = [
    Fault(
        "export: the scale is not folded in",
        "genft_kernels/files/thin_update.py",
        "copy_(config.scaling * factors.b)",
        "copy_(factors.b)",
        LORA,
    ),
    Fault(
        "export: rank= is ignored where it is too small",
        "genft_kernels/files/thin_update.py",
        "if energy is None and (rank is None or self.rank <= rank):",
        "if energy is None:",
        LORA,
    ),
    Fault(
        "export: numpy's rank as it is",
        "genft_kernels/files/lora.py",
        "highest = int(rank or",
        "highest = (rank or",
        LORA,
    ),
    Fault("command: inputs that the model does not take", MAIN, "except Exception:", "except LookupError:", COMMAND),
    Fault("command: rows that nothing fills up", MAIN, "value[:1] for", "value for", COMMAND),
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
        "transposed = bool(linear) and all(layer.stored_transposed for layer in linear.values())",
        "transposed = False",
        LORA,
    ),
    Fault(
        "export: one rank more than asked for",
        "genft_kernels/files/thin_update.py",
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
        "if error > max(1 - energy[path], 0) ** 0.5 + _UPDATE_TOLERANCE + torch.finfo(theirs.dtype).eps:",
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
        "nn.Parameter(parameter.detach(), requires_grad=False)",
        "nn.Parameter(parameter.detach().clone(), requires_grad=False)",
        LORA,
    ),
    Fault("fidelity: gain of the whole answer", "genft_kernels/fidelity.py", "found - frozen", "found", FIDELITY),
]
