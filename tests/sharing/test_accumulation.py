"""`accumulate`: one generation for all micro-batches, and the gradients of separate ones."""

import contextlib
from functools import partial

import pytest
import torch
from torch import nn

from genft_kernels import GenFTConfig, GenFTLinear, accumulate, disabled
from tests.helpers.adapted_models import DROPOUT, Checkpointed, adapted, assert_close, generations, gradients, groups
from tests.helpers.tiny_models import (
    Encoder,
    FusedEncoder,
    FusedGroupedQueryBlock,
    GroupedQueryBlock,
    TiedModel,
    Wrapper,
)

MODELS = {
    "encoder": (Encoder, {}),
    "fused": (FusedEncoder, dict(fused_blocks={"qkv": (3, (0, 2))}, bias=True)),
    "fused-unequal": (FusedGroupedQueryBlock, dict(fused_blocks={"qkv_proj": ((8, 4, 4), (0, 2))}, bias=True)),
    "grouped-query": (GroupedQueryBlock, dict(target_modules=["q_proj", "v_proj", "up_proj"], outer_activation="silu")),
    "tied-and-shared": (TiedModel, dict(target_modules=["first", "second", "head"])),
    "column": (Encoder, dict(transform="column", outer_activation="gelu")),
    "out_in": (Encoder, dict(delta_layout="out_in", bias=True)),
}
every_model = pytest.mark.parametrize("make, settings", MODELS.values(), ids=MODELS)
BATCHES = [torch.randint(20, (4, 5), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def run(model, batches=BATCHES, seed=5):
    torch.manual_seed(seed)
    for batch in batches:
        model(batch).square().sum().backward()


def accumulated(model, batches=BATCHES, seed=5) -> dict:
    with accumulate(model):
        run(model, batches, seed)
    return gradients(model)


def separate(model, batches=BATCHES, seed=5) -> dict:
    run(model, batches, seed)
    return gradients(model)


@every_model
def test_the_gradients_are_those_of_separate_micro_batches(make, settings):
    model = adapted(make, settings)
    expected = separate(model)
    before = generations(model)
    assert_close(accumulated(model), expected)
    assert generations(model) - before == len(groups(model))
    assert all(group.accumulation is None for group in groups(model))


def test_they_add_to_those_that_are_there():
    model = adapted()
    expected = separate(model)
    run(model)
    with accumulate(model):
        run(model)
    assert_close(gradients(model), {name: 2 * grad for name, grad in expected.items()})


def test_row_masks_are_drawn_anew_and_the_column_mask_stands():
    model = adapted(settings=dict(transform="row", **DROPOUT)).train()
    assert_close(accumulated(model), separate(model))  # no column mask: the same draws
    model = adapted(settings=DROPOUT).train()
    outputs = []
    with accumulate(model):
        outputs += [model(BATCHES[0]) for _ in range(2)]
        held = list(model.layers[0].attention.query.generator.group.accumulation._held.values())
        assert len(held) == 4 and generations(model) == 1
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("settings", [{}, dict(transform="row", **DROPOUT)], ids=["", "dropout"])
def test_with_checkpointing(reentrant, settings):
    model = adapted(partial(Encoder, layers=4), settings).train()
    expected = separate(model)
    before = generations(model)
    assert_close(accumulated(Checkpointed(model, reentrant)) | {}, {f"model.{k}": v for k, v in expected.items()})
    assert generations(model) - before == 1


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_with_checkpointing_and_column_dropout_the_repetition_finds_the_same_mask(reentrant):
    model = adapted(partial(Encoder, layers=4), DROPOUT).train()
    assert_close(
        accumulated(model),
        {k.removeprefix("model."): v for k, v in accumulated(Checkpointed(model, reentrant)).items()},
    )


def test_partial_forwards_leave_the_rest_without_gradients():
    model = adapted()
    with accumulate(model):
        for batch in BATCHES:
            model.layers[0](model.embedding(batch)).square().sum().backward()
    used, unused = (model.layers[i].attention.query.specific_up for i in (0, 1))
    assert used.grad.any() and unused.grad is None


def test_evaluation_inside():
    model = adapted(settings=DROPOUT).eval()
    with torch.no_grad():
        evaluated = model(BATCHES[0])
    model.train()
    for layer in (model.classifier[0],):
        layer.eval()
    expected = accumulated(model)
    with accumulate(model):
        torch.manual_seed(5)
        for batch in BATCHES:
            model(batch).square().sum().backward()
            model.eval()
            with torch.no_grad():
                assert torch.allclose(model(BATCHES[0]), evaluated)
            with torch.inference_mode():
                assert torch.allclose(model(BATCHES[0]), evaluated)
            with disabled(model), torch.no_grad():
                assert not torch.allclose(model(BATCHES[0]), evaluated)
            model.train()
            model.classifier[0].eval()
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_kept_in_float32(dtype):
    model = adapted(dtype=torch.float32).eval()
    weights = torch.tensor([1.0] + [2.0**-9] * 64)  # lost one by one in 16 bits, together an eighth

    def micro_batches():
        for weight in weights:
            with torch.autocast("cpu", dtype):
                y = model(BATCHES[0])
            (y.float().sum() * weight).backward()

    with accumulate(model):
        micro_batches()
    ours = gradients(model)
    micro_batches()
    apart = gradients(model)  # float32 parameters sum in float32 as well
    for name, grad in apart.items():  # sums in 16 bits would lack a ninth; each gradient is rounded to 16 bits
        assert (ours[name] - grad).norm() < 0.05 * grad.norm(), name


@pytest.mark.parametrize("settings", [{}, dict(outer_activation="gelu")], ids=["", "tiled"])
@pytest.mark.parametrize("first", ["no_grad", "inference", "reentrant", "evaluation"])
@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)])
def test_first_forward_without_gradients_in_16_bits(dtype, autocast, first, settings):
    def run(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if first == "evaluation":
                with torch.no_grad():
                    model.eval()(BATCHES[0])
                model.train().classifier[0].eval()
            elif first != "reentrant":
                with torch.no_grad() if first == "no_grad" else torch.inference_mode():
                    model(BATCHES[0])
            for batch in BATCHES[:2]:
                answer = Checkpointed(model, reentrant=True) if first == "reentrant" else model
                answer(batch).float().square().sum().backward()

    model = adapted(settings=settings, dtype=dtype).train()
    model.classifier[0].eval()
    run(model)
    expected = gradients(model)
    with accumulate(model):
        run(model)
    for name, gradient in gradients(model).items():
        assert gradient is not None and gradient.any(), name
        # A micro-batch left out is half of it; the rest is what 16 bits round.
        assert (gradient - expected[name]).norm() < 0.2 * expected[name].norm(), name


PLACES = ["before-forward", "before-backward", "after-backward"]
KINDS = {
    "model": lambda model: model.zero_grad(),
    "optimizer": lambda model: torch.optim.SGD([p for p in model.parameters() if p.requires_grad]).zero_grad(),
    "zeros": lambda model: torch.optim.SGD([p for p in model.parameters() if p.requires_grad]).zero_grad(False),
}


@pytest.mark.parametrize("before", [False, True], ids=["", "gradients-there-before"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("clear", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("at", range(3))
def test_zero_grad_between_micro_batches_drops_what_came_before(at, clear, place, before):
    def run(model):
        for index, batch in enumerate(BATCHES[:3]):
            here = clear if index == at else lambda model: None
            if place == "before-forward":
                here(model)
            loss = model(batch).square().sum()
            if place == "before-backward":
                here(model)
            loss.backward()
            if place == "after-backward":
                here(model)

    model = adapted()
    if before:
        separate(model, BATCHES[3:])
        run_once = model(BATCHES[3]).square().sum()
        run_once.backward()
    start = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    run(model)
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.grad = start[name]
    with accumulate(model):
        run(model)
    actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in expected.items():
        left = gradient is not None and gradient.any()
        assert (actual[name] is not None and actual[name].any()) == left, name
        assert not left or torch.allclose(actual[name], gradient, rtol=1e-10), name


def test_marks_leave_other_gradients_alone():
    model = adapted()
    expected = separate(model)
    name, parameter = "genft_generators.8x8.row_up", model.genft_generators["8x8"].row_up
    with accumulate(model):
        run(model, BATCHES[:2])
        (parameter * 3).sum().backward()  # a penalty of the user's
        run(model, BATCHES[2:])
    expected[name] = expected[name] + 3
    assert_close(gradients(model), expected)
    with accumulate(model):
        model.layers[0](model.embedding(BATCHES[0])).sum()
    assert all(p.grad is None for p in model.parameters())


FROZEN = [
    ("generators", "0.attention.query.specific"),
    ("generators", "1.attention.value.specific_up"),
    ("column", "row_down", "1.attention.query.specific"),
    ("down",),
    ("specific",),
]


@pytest.mark.parametrize("twice", [False, True], ids=["", "retained"])
@pytest.mark.parametrize("together", [False, True], ids=["", "accumulate"])
@pytest.mark.parametrize("frozen", FROZEN, ids="+".join)
def test_partly_frozen_adapters_with_checkpointing(frozen, together, twice):
    model = adapted(partial(Encoder, layers=4)).train()
    for name, parameter in model.named_parameters():
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)

    def run(answer):
        torch.manual_seed(5)
        for batch in BATCHES[:2]:
            loss = answer(batch).square().sum()
            loss.backward(retain_graph=twice)
            if twice:
                loss.backward()

    run(model)
    expected = gradients(model)
    with accumulate(model) if together else contextlib.nullcontext():
        run(Checkpointed(model, reentrant=False))
    assert_close(gradients(model), expected)


def test_grad_scaler():
    model = adapted(dtype=torch.float32).eval()
    expected = separate(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.0)
    with accumulate(model):
        for batch in BATCHES:
            scaler.scale(model(batch).square().sum()).backward()
    scaler.unscale_(optimizer)
    assert_close(gradients(model), expected, tolerance=1e-4)


# --- misuse ---------------------------------------------------------------------------------------------------------


def test_an_exception_leaves_nothing_behind():
    model = adapted()
    expected = separate(model)
    with pytest.raises(KeyError), accumulate(model):
        run(model)
        raise KeyError
    assert all(p.grad is None for p in model.parameters() if p.requires_grad)
    assert all(group.accumulation is None for group in groups(model))
    assert_close(accumulated(model), expected)
    assert_close(separate(model), expected)


def test_nesting_raises_and_does_not_disturb_the_outer_one():
    model = adapted()
    expected = separate(model)
    with accumulate(model):
        run(model, BATCHES[:2])
        with pytest.raises(RuntimeError, match="does not nest"), accumulate(model.layers[0]):
            pass
        run(model, BATCHES[2:])
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("options", [{}, dict(fused=True)], ids=["", "fused"])
def test_a_step_inside_raises(options):
    for at_once in (True, False):
        model = adapted()
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1, **options)
        with pytest.raises(RuntimeError, match="step the optimizer after the context"), accumulate(model):
            run(model)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
            optimizer.step()
            if at_once:
                run(model)
        assert all(group.accumulation is None for group in groups(model))
        gradients(model)
        separate(model)


def test_a_backward_after_the_end_raises():
    model = adapted()
    with accumulate(model):
        loss = model(BATCHES[0]).sum()
    with pytest.raises(RuntimeError, match="a backward came after the end"):
        loss.backward()


def test_a_model_without_layers_raises_and_a_wrapped_one_does_not():
    with pytest.raises(ValueError, match="apply_genft"), accumulate(nn.Linear(2, 2)):
        pass
    model = adapted()
    expected = separate(model)
    with accumulate(Wrapper(model)):
        run(model)
    assert_close(gradients(model), expected)
    layer = GenFTLinear(6, 6, config=GenFTConfig(shared_dim=2))
    with accumulate(layer):
        layer(torch.randn(2, 6)).sum().backward()
    assert layer.generator.row_up.grad.any()


def test_layers_that_join_late_keep_the_sums_of_the_others():
    model = adapted(settings=DROPOUT).train()
    late = model.layers[1].attention.value.eval()
    with accumulate(model):
        run(model)
        late.train()
        run(model)
        sums = [leaf.grad for each in late.generator.group.accumulation._held.values() for _, leaf in each.pairs()]
        assert len(sums) == 2 * 5 and all(grad is not None and grad.any() for grad in sums)
    assert generations(model) == 3
