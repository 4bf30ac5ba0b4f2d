"""Train with GenFT, serve as LoRA: export the adapter, and load it in PEFT, which knows nothing of GenFT.

The language model is made here, tiny and untrained; a real one comes from AutoModelForCausalLM.from_pretrained(...).
"""

import tempfile

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from genft_kernels import GenFTConfig, apply_genft, export_lora, parameter_groups


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)  # the base has to be the same each time: an adapter belongs to its base
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, **sizes))


model = apply_genft(new_model(), GenFTConfig.preset("fast"))
tokens = torch.randint(100, (4, 12))
optimizer = torch.optim.AdamW(parameter_groups(model, 4e-3))
losses = []
for _ in range(50):
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

model.eval()
with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    export = export_lora(model, folder, inputs=dict(input_ids=tokens))  # PEFT has to agree before anything is written
    print(export)
    lora = PeftModel.from_pretrained(new_model(), folder).eval()
    difference = (lora(tokens).logits - model(tokens).logits).abs().max().item()
print(f"PEFT's LoRA of rank {export.rank} changes logits by {difference:.1e}")
