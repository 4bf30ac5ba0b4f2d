"""Faults in what meets other libraries: default targets, heads, checkpoints, sharded models, exports."""

from tests.faults.planting import Fault

DEFAULTS = ["tests/model/test_defaults.py"]
BLOCKS = ["tests/model/test_row_blocks.py"]
CHECKPOINTS = ["tests/integrations/test_adapter_checkpoints.py"]
SHARDED = ["tests/files/test_sharded.py"]
EXPORTS = ["tests/ops/test_exports.py"]

FAULTS = [
    Fault(
        "blocks: those of another size have no update",
        "genft_kernels/modules.py",
        'return {"": self, **{f"{MORE_BLOCKS}.{rows}": update for rows, update in more.items()}}',
        'return {"": self}',
        BLOCKS,
    ),
    Fault(
        "blocks: cut into equal parts",
        "genft_kernels/row_blocks.py",
        "return list(self.cut)",
        "return [sum(self.cut) // len(self.cut)] * len(self.cut)",
        BLOCKS,
    ),
    Fault(
        "blocks: rows of another weight",
        "genft_kernels/row_blocks.py",
        "if sum(self.cut) != out_features:",
        "if False:",
        BLOCKS,
    ),
    Fault("blocks: adapted twice", "genft_kernels/modules.py", "or set(taken) & set(more.blocks.adapted)", "", BLOCKS),
    Fault(
        "defaults: no table of types",
        "genft_kernels/defaults.py",
        'BY_MODEL_TYPE.get(getattr(of_model, "model_type", ""), {}) or _OF_TIMM',
        "_OF_TIMM",
        DEFAULTS,
    ),
    Fault(
        "defaults: keys for values",
        "genft_kernels/defaults.py",
        "keys * size, keys * size), (0, 2))",
        "keys * size, keys * size), (0, 1))",
        DEFAULTS,
    ),
    Fault("heads: adapted with all linear layers", "genft_kernels/targets.py", " | set(heads(model))", "", DEFAULTS),
    Fault(
        "heads: fresh ones freeze in silence",
        "genft_kernels/adapt.py",
        "    warn_of_fresh_heads(model)\n",
        "",
        DEFAULTS,
    ),
    Fault(
        "heads: trained ones are warned of",
        "genft_kernels/heads.py",
        "return bool(as_pytorch or",
        "return bool(True or",
        DEFAULTS,
    ),
    Fault("heads: timm's is not asked for", "genft_kernels/heads.py", "if callable(of_timm):", "if False:", DEFAULTS),
    Fault(
        "settings: LoRA's are unexpected keywords",
        "genft_kernels/foreign_settings.py",
        "            if name not in known:",
        "            if False:",
        DEFAULTS,
    ),
    Fault(
        "checkpoints: all in one folder",
        "genft_kernels/integrations/transformers.py",
        "            save_adapter(model, folder)\n",
        "            save_adapter(model, self.args.output_dir)\n",
        CHECKPOINTS,
    ),
    Fault(
        "checkpoints: training resumes from nothing",
        "genft_kernels/integrations/transformers.py",
        "load_adapter(self._adapted_model(), resume_from_checkpoint)",
        "pass",
        CHECKPOINTS,
    ),
    Fault(
        "checkpoints: the last model for the best",
        "genft_kernels/integrations/transformers.py",
        "load_adapter(self._adapted_model(), self.state.best_model_checkpoint)",
        "pass",
        CHECKPOINTS,
    ),
    Fault(
        "folders: a whole model is no adapter, in other words",
        "genft_kernels/files/adapter.py",
        "    explain_foreign_folder(directory)\n",
        "",
        CHECKPOINTS,
    ),
    Fault(
        "sharded: a part is taken for the whole",
        "genft_kernels/files/sharded.py",
        "return tensor.full_tensor() if is_sharded(tensor) else tensor",
        "return tensor.to_local() if is_sharded(tensor) else tensor",
        SHARDED,
    ),
    Fault(
        "sharded: adapted after it",
        "genft_kernels/modules.py",
        'if any(type(parameter).__name__ == "DTensor" for parameter in linear.parameters(recurse=False)):',
        "if False:",
        SHARDED,
    ),
    Fault(
        "fsdp1: not named",
        "genft_kernels/checks.py",
        "if weight.requires_grad and not weight.is_leaf:",
        "if False:",
        SHARDED,
    ),
    Fault(
        "tracing: what is at hand becomes a constant",
        "genft_kernels/together.py",
        "    if torch.jit.is_tracing():",
        "    if False:",
        EXPORTS,
    ),
    Fault(
        "tracing: masks become constants",
        "genft_kernels/together.py",
        "if any(update.training and update.config.dropout for update in updates):",
        "if False:",
        EXPORTS,
    ),
    Fault(
        "onnx: fails where nobody understands it",
        "genft_kernels/checks.py",
        "    if _exports_to_onnx():",
        "    if False:",
        EXPORTS,
    ),
]
