"""Several processes: DistributedDataParallel, or FSDP2 with "fsdp2". On one machine, without a GPU:

    torchrun --nproc-per-node 2 examples/distributed.py [ddp | fsdp2]

On GPUs: backend "nccl", and the model and its inputs on this process's device.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from genft_kernels import GenFTConfig, apply_genft, load_adapter, parameter_groups, save_adapter


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)  # the base has to be the same each time: an adapter belongs to its base
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, **sizes))


kind = sys.argv[1] if len(sys.argv) > 1 else "ddp"
dist.init_process_group("gloo")
rank = dist.get_rank()
model = apply_genft(new_model(), GenFTConfig.preset("fast"))  # before it is wrapped or sharded
if kind == "fsdp2":
    for layer in model.model.layers:
        fully_shard(layer)
    wrapped = fully_shard(model)  # the shared generators are in this one
else:
    wrapped = DistributedDataParallel(model)

tokens = torch.randint(100, (4, 12), generator=torch.Generator().manual_seed(rank))  # each process has its own
optimizer = torch.optim.AdamW(parameter_groups(model, 4e-3))
losses = []
for _ in range(60):
    loss = wrapped(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

folder = [tempfile.mkdtemp() if rank == 0 else None]
dist.broadcast_object_list(folder)
if kind == "fsdp2" or rank == 0:
    save_adapter(model, folder[0])  # under FSDP2 all processes call, and the first one writes
with torch.no_grad():
    logits = wrapped(tokens).logits
dist.barrier()
fresh = load_adapter(new_model(), folder[0])  # whole, in each process
with torch.no_grad():
    difference = (fresh(tokens).logits - logits).abs().max().item()
if rank == 0:
    print(f"{kind}: loss {losses[0]:.3f} -> {losses[-1]:.3f}; saving and loading changes logits by {difference:.1e}")
dist.destroy_process_group()
