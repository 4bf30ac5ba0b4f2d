"""Private parts of torch are looked up in one file, and one that is missing is told in a sentence."""

import re
from pathlib import Path

import pytest
import torch

from genft_kernels import _torch_private

PACKAGE = Path(_torch_private.__file__).parent
PRIVATE = re.compile(
    r"torch(\.\w+)*\._[a-z]|from torch(\.\w+)* import .*\b_[a-zA-Z]|\._C\b|_execution_engine|\b_qualname|_opoverload|"
    r"_dynamo_marked"
)


def test_no_other_file_uses_private_parts_of_torch():
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "_torch_private.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if PRIVATE.search(line)
    ]
    assert not found


@pytest.mark.parametrize("module, name", [("torch._C", "_no_such_thing"), ("torch._no_such_module", "thing")])
def test_a_missing_part_is_named_with_torchs_version_and_what_to_do(module, name):
    with pytest.raises(RuntimeError) as raised:
        _torch_private._private(module, name)
    message = str(raised.value)
    assert message.startswith(f"torch {torch.__version__} has no {module}.{name}, which genft_kernels")
    assert "install a version of torch that it is tested with" in message


def test_parts_are_looked_up_when_they_are_used_and_not_before(monkeypatch):
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    _torch_private._private.cache_clear()
    try:
        assert not _torch_private.in_backward()
        with pytest.raises(RuntimeError, match="has no torch._C._len_torch_dispatch_stack"):
            _torch_private.dispatch_modes_active()
    finally:
        _torch_private._private.cache_clear()


def test_answers_follow_the_state_of_torch():
    seen = []
    x = torch.zeros(1, requires_grad=True)
    x.register_hook(lambda grad: seen.append(_torch_private.in_backward()))
    y = x * 1
    y.register_hook(lambda grad: _torch_private.when_backward_ends(lambda: seen.append("end")))
    y.backward()
    assert seen == [True, "end"] and not _torch_private.in_backward()
    assert not _torch_private.saved_tensors_are_hooked() and not _torch_private.differentiates_forward()
    with torch.autograd.graph.save_on_cpu(), torch.autograd.forward_ad.dual_level():
        assert _torch_private.saved_tensors_are_hooked() and _torch_private.differentiates_forward()
