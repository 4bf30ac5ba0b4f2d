"""Faults in what keeps files whole, refuses bad ones, and tells of what a model does to its adapter."""

from tests.faults.planting import Fault

FOLDER = ["tests/files/test_folder.py", "-m", "not slow"]
ADAPTER = ["tests/files/test_adapter_io.py", "tests/files/test_adapter_refusals.py"]
HOSTILE = ["tests/files/test_hostile_files.py"]
BAD_INPUT = ["tests/method/test_bad_input.py"]
OFFICIAL = ["tests/files/test_official_files.py", "tests/files/test_official_refusals.py"]

FAULTS = [
    Fault(
        "fidelity: a processor's mapping taken for a leaf",
        "genft_kernels/fidelity.py",
        "dict(inputs) if isinstance(inputs, Mapping) else inputs",
        "inputs",
        ["tests/files/test_fidelity.py"],
    ),
    Fault(
        "torch: a private module imported beside the file of private parts",
        "genft_kernels/fidelity.py",
        "import Tensor, nn\n",
        "import Tensor, nn\nfrom torch.utils import _pytree  # noqa: F401\n",
        ["tests/method/test_torch_private.py"],
    ),
    Fault("save: no lock", "genft_kernels/files/folder.py", "lock = _lock(directory)", "lock = None", FOLDER),
    Fault(
        "save: a lock counts that its holder has removed",
        "genft_kernels/files/folder.py",
        "if _is_still_at(path, descriptor):",
        "if True:",
        FOLDER,
    ),
    Fault(
        "save: planted links are followed",
        "genft_kernels/files/folder.py",
        'os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)',
        "0",
        FOLDER,
    ),
    Fault("save: not on the disk", "genft_kernels/files/folder.py", "os.fsync(file.fileno())", "pass", FOLDER),
    Fault(
        "save: the new tensors are not announced",
        "genft_kernels/files/format.py",
        "folder.put(announced, config_path)",
        "pass",
        FOLDER,
    ),
    Fault(
        "load: tensors not looked at",
        "genft_kernels/files/adapter.py",
        "    _check_tensors(wanted, adapter.tensors)\n",
        "",
        HOSTILE,
    ),
    Fault(
        "load: another base model goes unnoticed",
        "genft_kernels/files/adapter.py",
        "    _check_base(weights, adapter.fingerprints)\n",
        "",
        ADAPTER,
    ),
    Fault(
        "load: half an adapter stays after a failure",
        "genft_kernels/files/adapter.py",
        "            module.load_state_dict(state_before[path])\n",
        "            pass\n",
        ADAPTER,
    ),
    Fault(
        "load: YAML with aliases",
        "genft_kernels/files/untrusted.py",
        "if isinstance(event, yaml.AliasEvent):",
        "if False:",
        HOSTILE,
    ),
    Fault(
        "load: a checkpoint claims more than it holds",
        "genft_kernels/files/untrusted.py",
        "for tensor in tensors.values()) > size:",
        "for tensor in tensors.values()) < 0:",
        HOSTILE,
    ),
    Fault(
        "state dict: no mark of merged layers",
        "genft_kernels/merging.py",
        "destination[prefix + MARK] = torch.tensor(True)",
        "pass",
        ["tests/model/test_merged_state.py"],
    ),
    Fault(
        "state dict: loaded into a merged layer",
        "genft_kernels/merging.py",
        "        if self.merged:\n            errors",
        "        if False:\n            errors",
        ["tests/model/test_merged_state.py"],
    ),
    Fault(
        "load: layers compared by how they were named",
        "genft_kernels/files/adapter.py",
        "but=MODULE_CHOICES if adapter.fingerprints else ()",
        "but=()",
        ["tests/files/test_adapter_refusals.py", "-k", "named_in_another_way"],
    ),
    Fault(
        "modules to save: a frozen end of a tie trains",
        "genft_kernels/saved_modules.py",
        "if {id(parameter), id(module._parameters.get(name))} & trained:",
        "if id(parameter) in trained:",
        ["tests/model/test_saved_modules.py"],
    ),
    Fault(
        "modules to save: tied again",
        "genft_kernels/saved_modules.py",
        "module._parameters[name] = parameter",
        "pass",
        ["tests/model/test_saved_modules.py"],
    ),
    Fault(
        "adapt: a layer that is not called",
        "genft_kernels/first_forward.py",
        "if names and not _is_compiled(model):",
        "if False:",
        ["tests/model/test_first_forward.py"],
    ),
    Fault(
        "adapt: hooks of accelerate dropped",
        "genft_kernels/instance_forward.py",
        "if _HOOK in vars(old):",
        "if False:",
        ["tests/model/test_instance_forward.py"],
    ),
    Fault(
        "remove: the update in a path that was not adapted",
        "genft_kernels/adapt.py",
        "if keep_update and id(original) in present:",
        "if False:",
        ["tests/model/test_remove.py"],
    ),
    Fault(
        "bad input: blocks as they come",
        "genft_kernels/units.py",
        'RowBlocks.checked("blocks", blocks)',
        "blocks",
        BAD_INPUT,
    ),
    Fault(
        "bad input: any bias",
        "genft_kernels/adaptable.py",
        "check_bias(linear.bias,",
        "(lambda *ignored: None)(linear.bias,",
        BAD_INPUT,
    ),
    Fault(
        "bad input: training by any word",
        "genft_kernels/checks.py",
        'check_flag("training", training)',
        "pass",
        BAD_INPUT,
    ),
    Fault(
        "bad input: 1 is taken for True",
        "genft_kernels/config.py",
        "isinstance(self.zero_delta, (bool, str)) and ",
        "",
        BAD_INPUT,
    ),
    Fault(
        "official: of the layers only the first has its units",
        "genft_kernels/files/official.py",
        "for owner, layer in layers.items()]",
        "for owner, layer in list(layers.items())[:1]]",
        OFFICIAL,
    ),
    Fault(
        "official: copies of the generator may differ",
        "genft_kernels/files/official.py",
        "_check_copies(path, tensors, copies, layout.shared)",
        "pass",
        OFFICIAL,
    ),
]
