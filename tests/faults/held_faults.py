"""Faults in what is held between forwards: when factors are no longer the parameters', and evaluation's short road."""

from tests.faults.planting import Fault

GROUPS = ["tests/sharing/test_groups.py", "tests/sharing/test_group_contexts.py"]
STALE = ["tests/sharing/test_stale_factors.py"]
EVALUATION = ["tests/sharing/test_evaluation.py"]
CHANGED = ["tests/sharing/test_changed_modules.py"]

FAULTS = [
    Fault(
        "snapshot: versions not looked at",
        "genft_kernels/sharing/snapshot.py",
        'attrgetter("_version", "dtype"',
        'attrgetter("dtype"',
        STALE,
    ),
    Fault(
        "snapshot: objects not looked at",
        "genft_kernels/sharing/snapshot.py",
        "list(map(id, tensors))",
        "len(tensors)",
        CHANGED,
    ),
    Fault(
        "snapshot: values not compared",
        "genft_kernels/sharing/snapshot.py",
        "            if _memcmp(address, then, size if in_full or size < _FIRST_BYTES else _FIRST_BYTES) != 0:",
        "            if False:",
        STALE,
    ),
    Fault(
        "snapshot: a weight's values not compared",
        "genft_kernels/sharing/snapshot.py",
        "self._sample is None or self._sample.same()",
        "True",
        STALE,
    ),
    Fault(
        "snapshot: values of a strided tensor not compared",
        "genft_kernels/sharing/snapshot.py",
        "for index, copy in self._strided:",
        "for index, copy in ():",
        EVALUATION,
    ),
    Fault(
        "snapshot: strides not looked at",
        "genft_kernels/sharing/snapshot.py",
        ", list(map(Tensor.stride, tensors))",
        "",
        EVALUATION,
    ),
    Fault(
        "evaluation: whatever is asked gets the last answer",
        "genft_kernels/sharing/cache.py",
        "if share is None or share.asked != asked:",
        "if share is None or share.asked is None:",
        EVALUATION,
    ),
    Fault(
        "evaluation: what training asked is answered",
        "genft_kernels/evaluation.py",
        "if update.training or ",
        "if ",
        EVALUATION,
    ),
    Fault(
        "evaluation: dtypes not asked",
        "genft_kernels/evaluation.py",
        "return x.dtype, device,",
        "return device,",
        EVALUATION,
    ),
    Fault(
        "evaluation: the bias not asked",
        "genft_kernels/evaluation.py",
        "of_bias, update.backend, modes",
        "update.backend, modes",
        EVALUATION,
    ),
    Fault(
        "evaluation: modes not asked",
        "genft_kernels/evaluation.py",
        "of_bias, update.backend, modes",
        "of_bias, update.backend",
        EVALUATION,
    ),
    Fault(
        "evaluation: the backend not asked",
        "genft_kernels/evaluation.py",
        "of_bias, update.backend, modes",
        "of_bias, modes",
        EVALUATION,
    ),
    Fault(
        "evaluation: forward mode unnoticed",
        "genft_kernels/evaluation.py",
        "if _torch_private.listens():",
        "if False:",
        EVALUATION,
    ),
    Fault(
        "evaluation: hooks of the generator skipped",
        "genft_kernels/generator.py",
        "if own or self._forward_pre_hooks or self._forward_hooks or _torch_private.modules_have_global_hooks():",
        "if own:",
        EVALUATION,
    ),
    Fault(
        "evaluation: hooks of all modules skipped",
        "genft_kernels/generator.py",
        " or _torch_private.modules_have_global_hooks():",
        ":",
        EVALUATION,
    ),
    Fault(
        "evaluation: the long road for each forward",
        "genft_kernels/sharing/cache.py",
        "        self.asked = asked\n        return factors",
        "        return factors",
        EVALUATION,
    ),
    Fault(
        "snapshot: the generator's values not compared",
        "genft_kernels/sharing/cache.py",
        "self.shared = Snapshot(first.shared.values(), values=values)",
        "self.shared = Snapshot(first.shared.values(), values=False)",
        STALE,
    ),
    Fault(
        "share: the generator's values never compared in full",
        "genft_kernels/sharing/cache.py",
        "in_full=self._is_first_of_a_round()",
        "in_full=False",
        STALE,
    ),
    Fault(
        "watch: a device's answer never read",
        "genft_kernels/sharing/cache.py",
        "and self.watch.changed():",
        "and self.watch.changed() is None:",
        STALE,
    ),
    Fault(
        "watch: the stale factors kept",
        "genft_kernels/sharing/cache.py",
        "            self.generation.factors = None\n            raise",
        "            raise",
        STALE,
    ),
    Fault(
        "share: taken twice in training",
        "genft_kernels/sharing/cache.py",
        "spent = source.training and reader in self._readers and not repeats",
        "spent = False",
        STALE,
    ),
    Fault(
        "share: not found by a repetition",
        "genft_kernels/sharing/cache.py",
        "reader in self._readers and not repeats",
        "reader in self._readers",
        GROUPS,
    ),
    Fault(
        "share: another mode's taken",
        "genft_kernels/sharing/cache.py",
        " or self._settings != settings",
        "",
        GROUPS,
    ),
]
