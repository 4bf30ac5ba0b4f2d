"""FLOP counters: what they count for the operations, and which counters do."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from genft_kernels import apply_genft
from tests.helpers.adapted_models import adapted, loss_of


@pytest.fixture
def early_counter():
    """One that was made before anything had told of this package's operations."""
    counter = FlopCounterMode(display=False)
    counter.flop_registry = {op: count for op, count in counter.flop_registry.items() if "genft" not in str(op)}
    return counter


def operations(counter) -> set[str]:
    return {str(op) for op, flops in counter.get_flop_counts()["Global"].items() if flops and "genft" in str(op)}


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.1}], ids=["factored", "dropout"])
def test_counter_made_before_the_formulas_counts_the_operations(early_counter, settings):
    with early_counter:
        loss_of(adapted(settings=settings).train()).backward()
    of_layers = {"genft.column", "genft.row", "genft.linear"}
    assert operations(early_counter) == of_layers | {f"{name}_backward" for name in of_layers}


def test_counter_made_before_the_formulas_counts_experts(early_counter):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.helpers.expert_models import mixtral, settings, tokens  # which needs it

    model = apply_genft(mixtral(), settings()).train()
    with early_counter:
        model(tokens()).logits.sum().backward()
    assert {"genft.expert_linear", "genft.expert_linear_backward"} <= operations(early_counter)
