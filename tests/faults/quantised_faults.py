"""Faults in what holds of layers whose weight is stored quantised, that tests without a library notice."""

from tests.faults.planting import Fault

FILES = [f"tests/quantised/test_{name}.py" for name in ("frozen_weight", "quantised_states", "quantised_refusals")]


def of(words: str) -> list[str]:
    """The tests with these words in their names."""
    return [*FILES, "-k", words]


KEPT = of("dequantisations or kept or one_weight or flop or together")
SAME = of("gradient or blocks or compute_dtype or is_the_one and row or rms or codes")
STATES = of("disabled or remov or merging or dense or stored_bytes")
REFUSED = of("refused or registration or quantised_and or not_quantised or without_values")
HANDLE, OPS, LINEAR = "genft_kernels/frozen_weight.py", "genft_kernels/ops.py", "genft_kernels/quantised_linear.py"
OPERATION = "genft_kernels/operation.py"

FAULTS = [
    Fault("quantised: a copy has no norm", HANDLE, "self.module not in _tried", "False", of("copy_of_an_adapted")),
    Fault(
        "quantised: a copy of an unknown kind has no cure",
        HANDLE,
        " and self.of(self.module) is None:\n            self.dense()\n",
        ":\n            self.of(self.module)\n",
        REFUSED,
    ),
    Fault(
        "quantised: fidelity in other dtypes",
        "genft_kernels/fidelity.py",
        "if (path := quantised_layer(model)) is not None:",
        "if (path := None):",
        of("fidelity"),
    ),
    Fault(
        "quantised: W is kept for backward",
        OPERATION,
        "    ctx.handles = {place: value for place, value in enumerate(values) if isinstance(value, FrozenWeight)}\n",
        "    values = tuple(map(opened, values))\n    ctx.handles = {}\n",
        KEPT,
    ),
    Fault(
        "quantised: all W of a generation are dense at once",
        OPS,
        '{FrozenWeight} if backend == "eager" else {FrozenWeight, list}',
        "{FrozenWeight, list}",
        KEPT,
    ),
    Fault(
        "quantised: FLOP counters see no operations",
        OPERATION,
        "                results: tuple[Any, ...] = backward_op(*map(opened, args))\n",
        '                results: tuple[Any, ...] = compute(args[-1], f"{self._name}_backward", *args[:-1])\n',
        KEPT,
    ),
    Fault(
        "quantised: generated alone",
        "genft_kernels/sharing/source.py",
        "if not isinstance(tensor, nn.Parameter) and not (tensor is self.weight and quantised):",
        "if not isinstance(tensor, nn.Parameter):",
        KEPT,
    ),
    Fault(
        "quantised: both stages of a sum make W dense in backward",
        "genft_kernels/sharing/node.py",
        "            with dense_once():",
        "            if True:",
        KEPT,
    ),
    Fault(
        "quantised: what is dense for both stages of a sum stays",
        HANDLE,
        "        _made.last = before\n",
        "        pass\n",
        KEPT,
    ),
    Fault(
        "quantised: layers of a sum are dense at once",
        HANDLE,
        "        last.clear()  # first, so that one is dense at a time\n",
        "",
        KEPT,
    ),
    Fault("quantised: the scales are watched", HANDLE, "max(sizes)", "min(sizes)", SAME),
    Fault(
        "quantised: the norm outlives the codes",
        HANDLE,
        "        if tried.state != state:\n            tried = _tried",
        "        if False:\n            tried = _tried",
        SAME,
    ),
    Fault(
        "quantised: the norm is taken anew",
        HANDLE,
        "        if part not in tried.norms:\n",
        "        if True:\n",
        KEPT,
    ),
    Fault("quantised: blocks are all the first rows", HANDLE, "slice(start, start + size)", "slice(size)", SAME),
    Fault("quantised: the transpose is not", HANDLE, "weight.t() if self._transposed else weight", "weight", SAME),
    Fault(
        "quantised: x gets no gradient from blocks that are not adapted",
        HANDLE,
        "return grad @ ctx.weight.to(grad.dtype), None, None",
        "return None, None, None",
        SAME,
    ),
    Fault(
        "quantised: what does not become dense is taken",
        HANDLE,
        "if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.dtype not in SUPPORTED_DTYPES:",
        "if False:",
        REFUSED,
    ),
    Fault("quantised: meta", HANDLE, 'if codes.device.type == "meta":', "if False:", REFUSED),
    Fault(
        "quantised: an earlier registration counts",
        HANDLE,
        "for kind in reversed(_registered):",
        "for kind in _registered:",
        REFUSED,
    ),
    Fault("quantised: GPTQ and its like are not known", HANDLE, '"gptqmodel": "GPTQ", ', "", REFUSED),
    Fault(
        "quantised: GPTQ is left out of all-linear without a word",
        "genft_kernels/targets.py",
        "return without_dense(module) is not None and not any(module.children())",
        "return False",
        REFUSED,
    ),
    Fault(
        "quantised: unknown kinds of tensors are taken for dense",
        "genft_kernels/adaptable.py",
        'if is_tensor_subclass(weight) and not type(weight).__module__.startswith("torch."):',
        "if False:",
        REFUSED,
    ),
    Fault(
        "quantised: further blocks are generated from the codes",
        "genft_kernels/modules.py",
        "        return self.layer.frozen_weight",
        "        return self.layer.stored_weight",
        ["tests/quantised/test_quantised_states.py", "-k", "several_sizes"],
    ),
    Fault(
        "quantised: an adapted layer's weight may be replaced by a quantised one",
        "genft_kernels/modules.py",
        'if name == "weight" and is_tensor_subclass(value)',
        "if False",
        REFUSED,
    ),
    Fault(
        "quantised: disabled is the dequantised layer with its update",
        LINEAR,
        "        if not self.enabled:\n            return self.base_layer.forward(x)\n",
        "",
        STATES,
    ),
    Fault(
        "quantised: the layer's compute dtype is ignored", LINEAR, "weight.compute_dtype or x.dtype", "x.dtype", SAME
    ),
    Fault(
        "quantised: dense layers in float32",
        "genft_kernels/adapt.py",
        "dtype = frozen_dtype(model) if dequantize else None",
        "dtype = torch.float32 if dequantize else None",
        STATES,
    ),
    Fault(
        "quantised: dense layers without the update", LINEAR, ".to(delta.dtype) + delta)", ".to(delta.dtype))", STATES
    ),
    Fault(
        "quantised: keep_update leaves quantised layers behind",
        LINEAR,
        "if isinstance(layer, QuantisedGenFTLinear) and not leave_out:",
        "if False:",
        STATES,
    ),
    Fault(
        "quantised: fingerprints do not cover the bytes",
        "genft_kernels/files/fingerprint.py",
        "_replace(packed=_digest(packed_tensors(weight.module)))",
        "_replace(packed=None)",
        STATES,
    ),
    Fault(
        "quantised: fingerprints cover the first tensor only",
        "genft_kernels/files/fingerprint.py",
        "    for tensor in tensors:\n",
        "    for tensor in list(tensors)[-1:]:\n",
        STATES,
    ),
    Fault(
        "quantised: a layer that is no longer whole has no name",
        "genft_kernels/first_forward.py",
        "            with about(repr(name)):\n                check_stored(layer)\n",
        "",
        REFUSED,
    ),
    Fault(
        "quantised: a name that means every layer",
        HANDLE,
        "if _is_called(each, kind) or kind in",
        "if kind in (each, each.__name__) or kind in",
        of("means_every_layer"),
    ),
    Fault(
        "quantised: what lets no gradient through since is not looked at",
        "genft_kernels/adapted_model.py",
        "    check_gradients_pass(model, {layer: name for name, layer in adapted_layers(model).items()})\n",
        "",
        REFUSED,
    ),
    Fault(
        "quantised: what lets no gradient through is refused without gradients",
        "genft_kernels/adapted_model.py",
        "    if not (torch.is_grad_enabled() and model.training):\n",
        "    if False:\n",
        REFUSED,
    ),
    Fault(
        "quantised: trained copies of quantised modules",
        "genft_kernels/saved_modules.py",
        "        check_not_quantised(path, original)\n",
        "",
        REFUSED,
    ),
    Fault(
        "quantised: trained modules that are quantised later",
        "genft_kernels/adapted_model.py",
        "        check_not_quantised(path, model.get_submodule(path))\n",
        "        pass\n",
        REFUSED,
    ),
]
