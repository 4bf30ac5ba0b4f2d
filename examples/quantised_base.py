"""QLoRA's place: GenFT over a base in 4 bits (bitsandbytes), which stays in 4 bits and is made dense for one layer at a
time.

The language model is made here, tiny and untrained; a real one comes from AutoModelForCausalLM.from_pretrained(...,
quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")).
"""

import tempfile

import bitsandbytes as bnb
import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from genft_kernels import GenFTConfig, apply_genft, load_adapter, parameter_groups, remove_genft, save_adapter


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)  # the base has to be the same each time: an adapter belongs to its base
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, **sizes))
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
            packed.load_state_dict(linear.state_dict())
            model.model.set_submodule(name, packed.to("cpu"))  # which quantises
    return model


model = prepare_model_for_kbit_training(new_model())
apply_genft(model, GenFTConfig.preset("fast", target_modules=["q_proj", "v_proj"]))
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

with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    logits = model(tokens).logits
    save_adapter(model, folder)
    again = load_adapter(new_model(), folder)  # a base with another byte would be refused
    loaded = (again(tokens).logits - logits).abs().max().item()
    remove_genft(again, keep_update=True, dequantize=True)  # q_proj and v_proj dense, with the update; all else 4 bits
    dense = (again(tokens).logits - logits).abs().max().item()
print(f"saving and loading changes logits by {loaded:.1e}, dense layers by {dense:.1e}")
