"""Faults in `accumulate`: its sums, and what it takes for a `zero_grad`."""

from tests.faults.planting import Fault

ACCUMULATION = ["tests/sharing/test_accumulation.py"]
SHORT_ROAD = ["tests/sharing/test_short_road.py"]
DISTRIBUTED = ["tests/sharing/test_distributed.py"]
ZERO_GRAD = ["tests/sharing/test_zero_grad.py"]

FAULTS = [
    Fault(
        "accumulate: offloaded layers taken",
        "genft_kernels/sharing/accumulate.py",
        "if any(tensor.is_meta for tensor in (*source.watched, *source.shared.values()))",
        "if False",
        ["tests/integrations/test_peft.py", "-k", "offloaded"],
    ),
    Fault(
        "accumulate: casts without gradients",
        "genft_kernels/sharing/accumulate.py",
        "            with torch.enable_grad():\n                shares",
        "            if True:\n                shares",
        ACCUMULATION,
    ),
    Fault(
        "accumulate: zero_grad before a backward unnoticed",
        "genft_kernels/sharing/accumulate.py",
        "            self._heed_zero_grad()\n            end",
        "            end",
        ACCUMULATION,
    ),
    Fault(
        "accumulate: marks left behind",
        "genft_kernels/sharing/accumulate.py",
        "            self._unmark(parameter)\n        self._marks.clear()",
        "            pass\n        self._marks.clear()",
        ACCUMULATION,
    ),
    Fault(
        "accumulate: sums in 16 bits",
        "genft_kernels/sharing/accumulate.py",
        "wide = torch.promote_types(factor.dtype, torch.float32)",
        "wide = factor.dtype",
        ACCUMULATION,
    ),
    Fault(
        "accumulate: nothing sent on",
        "genft_kernels/sharing/accumulate.py",
        "        _send_on(held)\n",
        "",
        ACCUMULATION,
    ),
    Fault(
        "accumulate: an exception keeps the leaves",
        "genft_kernels/sharing/accumulate.py",
        "    finally:\n        accumulation.stop()",
        "    finally:\n        pass",
        ACCUMULATION,
    ),
    Fault(
        "accumulate: a step inside unnoticed",
        "genft_kernels/sharing/accumulate.py",
        "if not self._share.holds(source):",
        "if False:",
        ACCUMULATION,
    ),
    Fault(
        "accumulate: a late backward lost",
        "genft_kernels/sharing/accumulate.py",
        "if not self.active:  # nobody will fetch it",
        "if False:",
        ACCUMULATION,
    ),
    Fault(
        "accumulate: zero_grad within it unnoticed",
        "genft_kernels/sharing/accumulate.py",
        "        if self._end() is None:\n            self._heed_zero_grad()\n        held",
        "        held",
        ACCUMULATION,
    ),
    Fault(
        "accumulate: marks are looked at for every leaf",
        "genft_kernels/sharing/accumulate.py",
        "            self._end = weakref.ref(end)",
        "            weakref.ref(end)",
        SHORT_ROAD,
    ),
    Fault(
        "accumulate: zeros that a penalty adds are taken for zero_grad",
        "genft_kernels/sharing/accumulate.py",
        "            _torch_private.when_backward_ends(end)\n",
        "            self._held_end = end\n",
        ["tests/sharing/test_group_contexts.py", "-k", "zero_grad"],
    ),
    Fault(
        "accumulate: zero_grad before a penalty's gradients unnoticed",
        "genft_kernels/sharing/accumulate.py",
        "        self._hooks += [parameter.register_hook(self._look) for parameter in new]\n",
        "",
        ZERO_GRAD,
    ),
    Fault(
        "accumulate: zero_grad of some drops the sums of all",
        "genft_kernels/sharing/accumulate.py",
        "if spared := self._marks.renew(cleared):",
        "if spared := self._marks.renew(cleared) and []:",
        ZERO_GRAD,
    ),
    Fault(
        "accumulate: zero_grad of some sends the sums on to all",
        "genft_kernels/sharing/accumulate.py",
        "_send_on(self._held, spared)",
        "_send_on(self._held)",
        ZERO_GRAD,
    ),
    Fault(
        "accumulate: after a pass what was not added to is not marked anew",
        "genft_kernels/sharing/accumulate.py",
        "            if parameter.grad is not grad or grad._version != version\n",
        "            if parameter.grad is not grad or grad.any()\n",
        ZERO_GRAD,
    ),
    Fault(
        "accumulate: zeros that are scaled are taken for zero_grad",
        "genft_kernels/sharing/accumulate.py",
        "(grad.signbit() | (grad != 0))",
        "(grad != 0)",
        ZERO_GRAD,
    ),
    Fault(
        "accumulate: zeros that are there are no marks",
        "genft_kernels/sharing/accumulate.py",
        "grad.masked_fill_(grad == 0, -0.0)",
        "pass",
        ZERO_GRAD,
    ),
    Fault(
        "accumulate: marks are looked at in a pass within a pass",
        "genft_kernels/sharing/accumulate.py",
        "        if self._end() is None:\n            self._heed_zero_grad()\n            end",
        '        if self._end() is None or torch._C._current_graph_task_id() != getattr(self, "_last", None):\n'
        "            self._last = torch._C._current_graph_task_id()\n"
        "            self._heed_zero_grad()\n            end",
        ZERO_GRAD,
    ),
    Fault(
        "accumulate: a pass that failed never ends",
        "genft_kernels/sharing/accumulate.py",
        "            end = self._marks.note\n",
        "            end = self._kept = self._marks.note\n",
        ZERO_GRAD,
    ),
    Fault(
        "accumulate: a flush within a pass looks at marks",
        "genft_kernels/sharing/accumulate.py",
        "        if self._end() is None:\n            self._heed_zero_grad()\n        held",
        "        if True:\n            self._heed_zero_grad()\n        held",
        ZERO_GRAD,
    ),
    Fault(
        "accumulate: a static graph takes the adapter for unused",
        "genft_kernels/sharing/accumulate.py",
        'for option in ("find_unused_parameters", "static_graph"):',
        'for option in ("find_unused_parameters",):',
        DISTRIBUTED,
    ),
    Fault(
        "accumulate: the Trainer's static graph is not asked for",
        "genft_kernels/integrations/transformers.py",
        'if wrapped and getattr(args, "ddp_static_graph", None):',
        "if False:",
        ["tests/integrations/test_integrations.py"],
    ),
]
