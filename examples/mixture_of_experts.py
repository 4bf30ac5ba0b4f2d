"""A mixture-of-experts model: the experts that transformers keeps in one stacked parameter, adapted expert by expert.

The language model is made here, tiny and untrained; a real one comes from AutoModelForCausalLM.from_pretrained(...).
"""

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from genft_kernels import GenFTConfig, apply_genft, parameter_groups, trainable_summary

torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = MixtralForCausalLM(MixtralConfig(vocab_size=100, num_local_experts=8, num_experts_per_tok=2, **sizes))

# One generator serves all experts of a shape, of all layers; each expert has a few units of its own besides.
experts = ["experts.gate_up_proj", "experts.down_proj"]
config = GenFTConfig.preset("fast", target_modules=["q_proj", "v_proj"], target_parameters=experts)
apply_genft(model, config)
print(trainable_summary(model))

tokens = torch.randint(100, (4, 12))
optimizer = torch.optim.AdamW(parameter_groups(model, 4e-3))
losses = []
for _ in range(40):
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
