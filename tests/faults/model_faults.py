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
        "generation: a change before the backward unnoticed",
        "genft_kernels/sharing/node.py",
        "        _Generate._check_unchanged(ctx, owners)",
        "        pass",
        GROUPS,
    ),
    Fault(
        "generation: zeros for layers that had no part",
        "genft_kernels/sharing/node.py",
        "if leaf.requires_grad and used and recipe.owner(i) in owners",
        "if leaf.requires_grad and used",
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
        "group: values not looked at, as those that fused optimizers change",
        "genft_kernels/sharing/snapshot.py",
        "return all(copy.equals(part) for copy, part in zip(self._copies, parts, strict=True))",
        "return True",
        GROUPS,
    ),
    Fault(
        "group: the same factors for two forwards in training",
        "genft_kernels/sharing/cache.py",
        "spent = source.training and reader in self._readers and not repeats",
        "spent = False",
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
        "sources = {layer: source} if repeats else self.together_with(layer, source)",
        "sources = self.together_with(layer, source)",
        GROUPS,
    ),
    Fault(
        "group: layers in another mode left in",
        "genft_kernels/sharing/cache.py",
        "other.cell == source.cell and ",
        "",
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
        "        if self._marks.cleared():\n            self._drop_sums()\n        held",
        "        held",
        ACCUMULATION,
    ),
    Fault(
        "Trainer: the gradients come after clipping",
        "genft_kernels/integrations/transformers.py",
        "_torch_private.when_backward_ends(self._accumulation.flush)",
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
