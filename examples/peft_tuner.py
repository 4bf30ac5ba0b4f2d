"""GenFT as a tuner of PEFT: `get_peft_model`, several adapters, saving and merging as for any other PEFT method.

The language model is made here, tiny and untrained; a real one comes from AutoModelForCausalLM.from_pretrained(...).
"""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from genft_kernels import parameter_groups
from genft_kernels.integrations.peft import PeftGenFTConfig  # the import registers GENFT


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)  # the base has to be the same each time: an adapter belongs to its base
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, **sizes))


model = get_peft_model(new_model(), PeftGenFTConfig(preset="fast", target_modules=["q_proj", "v_proj"]))
model.print_trainable_parameters()
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
    logits = model(tokens).logits
    with model.disable_adapter():
        change = (model(tokens).logits - logits).abs().max().item()
    model.save_pretrained(folder)
    merged = PeftModel.from_pretrained(new_model(), folder).merge_and_unload()
    difference = (merged(tokens).logits - logits).abs().max().item()
print(f"the adapter changes logits by {change:.2f}; saving, loading and merging by {difference:.1e}")
