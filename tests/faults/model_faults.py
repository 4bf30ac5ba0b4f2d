"""Faults in what works on whole models: grouped generation, `accumulate` and the Trainer's callback."""

from tests.faults.planting import Fault

GROUPS = ["tests/sharing/test_groups.py", "tests/sharing/test_group_contexts.py"]
ACCUMULATION = ["tests/sharing/test_accumulation.py"]
TRAINER = ["tests/integrations/test_integrations.py"]

FAULTS = [
    Fault(
        "generation: within reach of checkpointing's hooks",
        "genft_kernels/sharing/node.py",
        "with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):",
        "with torch.enable_grad():",
        GROUPS,
    ),
    Fault(
        "generation: never consumed",
        "genft_kernels/sharing/node.py",
        "            generation.factors = None",
        "            pass",
        GROUPS,
    ),
    Fault(
        "generation: its graph kept after the backward",
        "genft_kernels/sharing/node.py",
        "ctx.graphs.pop()",
        "ctx.graphs[-1]",
        GROUPS,
    ),
    Fault(
        "generation: a changed parameter unnoticed by a further backward",
        "genft_kernels/sharing/node.py",
        "if [parameter._version for parameter in ctx.parameters] != ctx.versions:",
        "if False:",
        GROUPS,
    ),
    Fault(
        "generation: zeros for layers that had no part",
        "genft_kernels/sharing/node.py",
        "ctx.recipe.owner(i) in owners",
        "True",
        GROUPS,
    ),
    Fault(
        "generation: specific units of the neighbour",
        "genft_kernels/sharing/node.py",
        "[of_layers[owner] for owner in self.owners]",
        "[of_layers[owner - 1] for owner in self.owners]",
        GROUPS,
    ),
    Fault(
        "group: versions not looked at",
        "genft_kernels/sharing/cache.py",
        "(tensor._version, tensor.data_ptr(), tensor.requires_grad)",
        "(0, tensor.data_ptr(), tensor.requires_grad)",
        GROUPS,
    ),
    Fault(
        "group: steps of fused optimizers not seen",
        "genft_kernels/sharing/cache.py",
        "            group.steps += 1\n            group.forget()",
        "            pass",
        GROUPS,
    ),
    Fault(
        "group: one column mask for two forwards",
        "genft_kernels/sharing/cache.py",
        "(self.taken and settings.dropout > 0)",
        "False",
        GROUPS,
    ),
    Fault(
        "group: one column mask for all layers",
        "genft_kernels/sharing/cache.py",
        "seeds[0] + others",
        "seeds[0] + 0 * others",
        GROUPS,
    ),
    Fault(
        "group: column seeds that a repetition does not draw",
        "genft_kernels/sharing/cache.py",
        "if settings.dropout > 0 and _may_be_repeated():",
        "if False:",
        GROUPS,
    ),
    Fault(
        "group: the whole group for each repeated region",
        "genft_kernels/sharing/cache.py",
        "[layer] if in_backward else self.together_with(layer)",
        "self.together_with(layer)",
        GROUPS,
    ),
    Fault(
        "group: layers in another mode left in",
        "genft_kernels/sharing/cache.py",
        "_cell(each) == cell]",
        "True]",
        GROUPS,
    ),
    Fault(
        "group: factors travel with a copy",
        "genft_kernels/sharing/cache.py",
        "        return LayerGroup, ()",
        "        return object.__reduce_ex__(self, 4)",
        GROUPS,
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
        "            torch.autograd.backward(roots, grads)",
        "            pass",
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
        "if not self._share.holds(layer):",
        "if False:",
        ACCUMULATION,
    ),
    Fault(
        "accumulate: a late backward lost",
        "genft_kernels/sharing/accumulate.py",
        "trained.register_hook(accumulation.check_active)",
        "pass",
        ACCUMULATION,
    ),
    Fault(
        "Trainer: the gradients come after clipping",
        "genft_kernels/integrations/transformers.py",
        "torch.autograd.Variable._execution_engine.queue_callback(self._accumulation.flush)",
        "pass",
        TRAINER,
    ),
    Fault(
        "Trainer: sent on after every micro-batch",
        "genft_kernels/integrations/transformers.py",
        " and GradientState().sync_gradients",
        "",
        TRAINER,
    ),
]
