"""Preference tuning as DPO does it: the reference policy is the same model with the adapter disabled.

The language model is made here, tiny and untrained; a real one comes from AutoModelForCausalLM.from_pretrained(...).
"""

import math

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from genft_kernels import GenFTConfig, apply_genft, disabled, parameter_groups

BETA = 0.1


def log_probability(model, sequences: torch.Tensor, prompt: int) -> torch.Tensor:
    """Of each answer, the tokens after the first `prompt` ones."""
    log_probabilities = F.log_softmax(model(sequences).logits[:, :-1], -1)
    of_tokens = log_probabilities.gather(-1, sequences[:, 1:, None]).squeeze(-1)
    return of_tokens[:, prompt - 1 :].sum(-1)


torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
apply_genft(model, GenFTConfig.preset("fast", target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.AdamW(parameter_groups(model, 4e-3))

prompts = torch.randint(100, (8, 6))
chosen = torch.cat([prompts, torch.randint(0, 50, (8, 6))], 1)
rejected = torch.cat([prompts, torch.randint(50, 100, (8, 6))], 1)
with torch.no_grad(), disabled(model):
    reference = log_probability(model, chosen, 6) - log_probability(model, rejected, 6)

losses = []
for _ in range(20):
    margin = log_probability(model, chosen, 6) - log_probability(model, rejected, 6) - reference
    loss = -F.logsigmoid(BETA * margin).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.4f} (log 2 is {math.log(2):.4f}: the update starts at zero) -> {losses[-1]:.4f}")
