"""Quantised bases that FSDP2 shards over two processes (`make test-quantised`)."""

from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from genft_kernels import GenFTConfig, apply_genft, load_adapter, save_adapter
from tests.helpers.processes import in_two_processes
from tests.helpers.quantised_layers import gradients, share_units
from tests.helpers.quantised_models import TARGETS, bitsandbytes_4bit, bitsandbytes_8bit, hqq

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
for library in ("bitsandbytes", "hqq", "transformers"):
    pytest.importorskip(library, exc_type=ImportError)

IDS = torch.arange(18).reshape(2, 9)
KINDS = {
    "4bit": partial(bitsandbytes_4bit, torch.float32),  # stored in bytes
    "4bit-bfloat16": partial(bitsandbytes_4bit, torch.bfloat16, storage=torch.bfloat16),
    "hqq": partial(hqq, torch.float32),
}
CONFIG = GenFTConfig.preset("fast-both", shared_dim=4, specific_dim=2, target_modules=list(TARGETS))


def sharded(model, **options):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def step(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output = model.train()(IDS, labels=IDS)
    output.loss.backward()
    found = gradients(model)
    return output.logits.detach(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def new(kind: str):
    model = apply_genft(KINDS[kind](), CONFIG)
    share_units(model, model)
    return model


def trained(rank: int, kind: str, folder) -> dict:
    alone = step(new(kind))
    model = sharded(new(kind))
    together = step(model)
    codes = next(p for name, p in model.named_parameters() if "q_proj.base_layer" in name)
    save_adapter(model, folder / kind)  # all processes gather its bytes
    load_adapter(sharded(new(kind)), folder / kind)
    fresh = load_adapter(KINDS[kind](), folder / kind)
    return dict(
        alone=alone, together=together, sharded=isinstance(codes, DTensor), loaded=fresh.train()(IDS).logits.detach()
    )


def refusals(rank: int) -> list[str]:
    found = []
    for action in (
        lambda: step(sharded(apply_genft(bitsandbytes_8bit(torch.float32), CONFIG))),
        lambda: step(
            sharded(
                apply_genft(bitsandbytes_4bit(torch.float32, storage=torch.float32), CONFIG),
                mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16),
            )
        ),
        lambda: apply_genft(sharded(KINDS["4bit"]()), CONFIG),
    ):
        try:
            action()
        except (TypeError, ValueError) as error:
            found.append(str(error))
    return found


def test_quantised_base_is_sharded_and_goes_through_files(tmp_path):
    jobs = [partial(trained, kind=kind, folder=tmp_path) for kind in KINDS]
    *results, refused = in_two_processes(tmp_path, *jobs, refusals)
    for of_kind in results:
        for result in of_kind:
            (expected, gradients_alone), (logits, found) = result["alone"], result["together"]
            assert result["sharded"]
            assert torch.equal(logits, expected) and torch.equal(result["loaded"], expected)
            assert set(found) == set(gradients_alone) and found
            assert all(torch.equal(found[name], gradient) for name, gradient in gradients_alone.items())
    for eight_bits, cast, late in refused:
        layer = "'model.layers.0.self_attn.q_proj': "
        assert eight_bits.startswith(layer + "Linear8bitLt") and "FSDP has sharded it" in eight_bits
        assert cast.startswith(layer + "Linear4bit") and "bnb_4bit_quant_storage=torch.bfloat16" in cast
        assert layer in late and "apply_genft or load_adapter before fully_shard" in late
