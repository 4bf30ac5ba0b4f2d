"""The README's Python blocks run as they are printed, one after the other."""

import re
from pathlib import Path

import torch
import transformers

from genft_kernels import GenFTConfig, apply_genft, trainable_summary
from tests.helpers.tiny_models import Encoder, GroupedQueryBlock

README = Path(__file__).parents[2] / "README.md"


def test_the_python_blocks_run(monkeypatch, tmp_path, capsys):
    def small(name, num_labels):
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
        return transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(num_labels=num_labels, pad_token_id=0, **sizes)
        )

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", small)
    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    batch = torch.randint(3, 50, (2, 6))
    names = {}
    exec(first, names)
    assert "trainable" in capsys.readouterr().out
    assert torch.equal(names["model"].eval()(batch).logits, names["fresh"](batch).logits)  # nothing is trained yet
    names |= dict(micro_batches=[batch, batch], loss_of=lambda model, batch: model(batch).logits.square().sum())
    before = [parameter.detach().clone() for parameter in names["model"].parameters() if parameter.requires_grad]
    exec(second, names)
    after = [parameter for parameter in names["model"].parameters() if parameter.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_the_parameter_counts_are_those_of_the_formula():
    config = GenFTConfig(shared_dim=2, specific_dim=1)
    square = trainable_summary(apply_genft(Encoder(layers=2, dim=8), config))
    assert (square["generators"], square["specific"]) == (2 * 2 * 16, 4 * 1 * 16)
    both = trainable_summary(apply_genft(GroupedQueryBlock(), config))  # q 8 x 8, v 8 x 4
    assert (both["generators"], both["specific"]) == (2 * 2 * (16 + 12), 16 + 2 * 12)
