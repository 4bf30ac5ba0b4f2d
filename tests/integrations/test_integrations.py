"""The transformers Trainer with `AccumulateCallback`: the same steps, in one generation each."""

import copy
import warnings

import pytest
import torch

from genft_kernels import GenFTConfig, apply_genft
from tests.helpers.adapted_models import generations, groups
from tests.helpers.tiny_models import randomise

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
from genft_kernels.integrations.transformers import AccumulateCallback  # noqa: E402


def make_model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    config = transformers.BertConfig(
        **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=16
    )
    model = transformers.BertForSequenceClassification(config)
    adapter = GenFTConfig(shared_dim=3, specific_dim=1, inner_activation="tanh", modules_to_save=["classifier"])
    return randomise(apply_genft(model, adapter)).double()


def dataset(size=26):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(20, (size, 6), generator=generator)
    return [dict(input_ids=row, labels=row[0] % 2) for row in tokens]


def fit(model, folder, callbacks, **settings):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=4, max_grad_norm=0.05,
        num_train_epochs=2, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        logging_strategy="no", dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=dataset(), eval_dataset=dataset(4), callbacks=callbacks
    )
    trainer.train()
    return trainer.state.global_step


@pytest.fixture(autouse=True)
def nondeterministic_embeddings_allowed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


VARIANTS = {
    "": {},
    "evaluating": dict(eval_strategy="steps", eval_steps=1),
    "reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True)),
    "non-reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=False)),
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_trainer_takes_the_same_steps_with_one_generation_each(tmp_path, settings):
    plain, ours = make_model(), make_model()
    start = copy.deepcopy(plain.state_dict())
    fit(plain, tmp_path, [], **settings)
    steps = fit(ours, tmp_path, [AccumulateCallback()], **settings)
    assert steps == 2 * 4  # 13 micro-batches an epoch: three steps of four, and one of a single one
    evaluations = steps if "eval_steps" in settings else 0
    assert generations(ours) == steps + evaluations < generations(plain)
    for (name, expected), actual in zip(plain.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-12), name
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert all(not torch.equal(ours.state_dict()[name], start[name]) for name in trained)
    assert all(group.accumulation is None for group in groups(ours)) and not ours._forward_hooks


def test_interrupted_run_does_not_disturb_the_next(tmp_path):
    class Interrupts(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    plain, ours, callback = make_model(), make_model(), AccumulateCallback()
    with pytest.raises(KeyboardInterrupt):
        fit(ours, tmp_path, [callback, Interrupts()])
    ours.zero_grad()
    fit(plain, tmp_path, [])
    fit(ours, tmp_path, [callback])
    for (name, expected), actual in zip(plain.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-12), name


def test_settings_that_cannot_work_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="apply_genft"):
        fit(transformers.BertForSequenceClassification(make_model().config), tmp_path, [AccumulateCallback()])
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    distributed = copy.copy(arguments)
    distributed.__class__ = type("Distributed", (type(arguments),), {"world_size": property(lambda self: 2)})
    with pytest.raises(ValueError, match="ddp_find_unused_parameters=False"):
        AccumulateCallback().on_train_begin(distributed, None, None, model=make_model())
    distributed.ddp_find_unused_parameters = False
    callback = AccumulateCallback()
    callback.on_train_begin(distributed, None, None, model=make_model())
    callback.on_train_end(distributed, None, None)
    distributed.ddp_static_graph = True
    with pytest.raises(ValueError, match="ddp_static_graph=True"):
        callback.on_train_begin(distributed, None, None, model=make_model())
