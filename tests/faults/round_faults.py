"""Faults in what a round of a model's layers compares, and in the glance that is left to each."""

from tests.faults.planting import Fault

ROUNDS = ["tests/sharing/test_rounds.py"]

FAULTS = [
    Fault(
        "together: objects, places, versions and lengths not looked at",
        "genft_kernels/sharing/snapshot.py",
        "_flat_states(tensors) == self._states",
        "_flat_states(tensors)",
        ROUNDS,
    ),
    Fault(
        "together: values not compared",
        "genft_kernels/sharing/snapshot.py",
        "            and not any(map(_memcmp, self._addresses, self._copies, self._sizes))\n",
        "",
        ROUNDS,
    ),
    Fault(
        "together: a weight's values not compared",
        "genft_kernels/sharing/snapshot.py",
        "            and self._now == self._then\n        )",
        "        )",
        ROUNDS,
    ),
    Fault(
        "together: what a layer trains not looked at",
        "genft_kernels/sharing/snapshot.py",
        "(Tensor.is_contiguous, _requires_grad)",
        "(Tensor.is_contiguous,)",
        ROUNDS,
    ),
    Fault(
        "together: order of memory not looked at",
        "genft_kernels/sharing/snapshot.py",
        "(Tensor.is_contiguous, _requires_grad)",
        "(_requires_grad,)",
        ROUNDS,
    ),
    Fault(
        "glance: versions not looked at",
        "genft_kernels/sharing/snapshot.py",
        "            and list(map(self._state, tensors)) == self._states\n",
        "",
        ROUNDS,
    ),
    Fault(
        "glance: what trains not looked at",
        "genft_kernels/sharing/snapshot.py",
        "_version_and_training if gradients else _version",
        "_version",
        ROUNDS,
    ),
    Fault(
        "glance: places not looked at",
        "genft_kernels/sharing/snapshot.py",
        "            and list(map(Tensor.data_ptr, tensors)) == self._addresses\n",
        "",
        ROUNDS,
    ),
    Fault(
        "glance: first values not looked at",
        "genft_kernels/sharing/snapshot.py",
        "            and self._now == self._then  # their",
        "            # their",
        ROUNDS,
    ),
    Fault(
        "round: layers of another forward taken for compared",
        "genft_kernels/sharing/share.py",
        "if share.asked_in == last]",
        "]",
        ROUNDS,
    ),
    Fault(
        "round: begins anew with a generation in mid-forward",
        "genft_kernels/sharing/share.py",
        "if goes_on and before.asked_in",
        "if False and before.asked_in",
        ROUNDS,
    ),
    Fault(
        "round: goes on where the layer that generates has asked in it",
        "genft_kernels/sharing/cache.py",
        "goes_on = before is None or before.asked_in != before.batch.round",
        "goes_on = True",
        ROUNDS,
    ),
    Fault(
        "round: a change with a version alarms a device",
        "genft_kernels/sharing/share.py",
        "if same and len(shares) == len(self.shares):",
        "if True:",
        ROUNDS,
    ),
    Fault(
        "round: every layer compares for itself",
        "genft_kernels/sharing/share.py",
        "        self._members, self._together = members, Together(snapshots, tensors) if flat else None\n",
        "",
        ROUNDS,
    ),
]
