"""The experiments for PEFT's method comparison: PEFT reads them, and they are of LoRA's size, or a quarter."""

import dataclasses
import json

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import genft_kernels.integrations.peft  # noqa: E402, F401
from benchmarks.measure.environment import REPOSITORY  # noqa: E402
from genft_kernels import GenFTConfig  # noqa: E402

EXPERIMENTS = REPOSITORY / "benchmarks" / "finetune" / "metamathqa" / "experiments" / "genft"
LORA_32 = 28 * 32 * ((3072 + 3072) + (3072 + 1024))


def attention(layers=28):
    """The q and v projections of Llama-3.2-3B, each of one number in memory."""
    blocks = nn.ModuleList()
    for _ in range(layers):
        block = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in ("q_proj", "v_proj")})
        for name, rows in (("q_proj", 3072), ("v_proj", 1024)):
            block[name].weight = nn.Parameter(torch.ones(()).expand(rows, 3072), requires_grad=False)
            block[name].in_features, block[name].out_features = 3072, rows
        blocks.append(block)
    return blocks


@pytest.mark.parametrize("name, budget", [("9M", LORA_32), ("2M", LORA_32 // 4)])
def test_experiment_is_fast_of_that_size(name, budget):
    config = peft.PeftConfig.from_pretrained(EXPERIMENTS / f"llama-3.2-3B-fast-{name}")
    sized = GenFTConfig.for_budget(attention(), budget)
    assert dataclasses.replace(config.native(), target_modules=None) == sized
    # The column stage's two matrices are as wide as the input, which q and v share.
    trained = 2 * 2 * 3072 * (sized.shared_dim + 28 * sized.specific_dim)
    assert budget - 2 * 2 * 3072 < trained <= budget
    assert set(config.target_modules) == {"q_proj", "v_proj"} and config.task_type == "CAUSAL_LM"


def test_all_that_the_training_sets_is_the_optimizer():
    for path in EXPERIMENTS.glob("*/training_params.json"):
        assert json.loads(path.read_text()) == {"optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}}


def test_a_small_model_trains_from_the_files():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))
    adapted = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(EXPERIMENTS / "llama-3.2-3B-fast-2M"))
    trained, _ = adapted.get_nb_trainable_parameters()
    assert trained == 2 * (2 * 64) * (18 + 2 * 6)
    ids = torch.arange(16).view(2, 8)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters())
