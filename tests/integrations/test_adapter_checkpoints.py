"""The transformers Trainer with `AdapterCheckpoints`: checkpoints without the base, resumed and reloaded."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from genft_kernels import GenFTConfig, apply_genft, load_adapter
from tests.helpers.tiny_models import randomise

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
from genft_kernels.integrations.transformers import AdapterCheckpoints  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of embeddings that are not deterministic


class AdapterTrainer(AdapterCheckpoints, transformers.Trainer):
    pass


def base(seed: int = 0):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    config = transformers.BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForSequenceClassification(config)


def adapted(**settings):
    config = GenFTConfig.preset("fast", **{"specific_dim": 64, "modules_to_save": "head", **settings})
    return apply_genft(base(), config)


def dataset(size: int = 16):
    tokens = torch.randint(20, (size, 6), generator=torch.Generator().manual_seed(1))
    return [dict(input_ids=row, labels=row[0] % 2) for row in tokens]


def trainer(model, folder, kind=AdapterTrainer, **settings):
    options = dict(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=2, learning_rate=1e-2, report_to=[],
        save_strategy="steps", save_steps=2, use_cpu=True, disable_tqdm=True, logging_strategy="no",
        dataloader_pin_memory=False, seed=3,
    )  # fmt: skip
    arguments = transformers.TrainingArguments(**{**options, **settings})
    return kind(model, arguments, train_dataset=dataset(), eval_dataset=dataset(4))


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(one, other):
    assert set(one) == set(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_checkpoints_hold_the_adapter_alone(tmp_path):
    model = adapted()
    trainer(model, tmp_path).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in (2, 4, 6, 8)]
    size = sum(p.numel() * p.element_size() for p in trained(model).values())
    for folder in tmp_path.iterdir():
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "trainer_state.json"} <= names
        assert not names & {"config.json", "model.safetensors"}
        written = sum((folder / name).stat().st_size for name in names if name.startswith("adapter_"))
        assert written <= 1.1 * size < 0.5 * sum(p.numel() * p.element_size() for p in model.parameters())
    assert_same(trained(load_adapter(base(), tmp_path / "checkpoint-8")), trained(model))


def test_training_resumes_from_a_checkpoint(tmp_path):
    whole = adapted()
    trainer(whole, tmp_path / "whole").train()
    resumed = randomise(adapted())  # what it holds is replaced
    again = trainer(resumed, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert again.state.global_step == 8
    assert_same(trained(resumed), trained(whole))
    last = trainer(adapted(), tmp_path / "whole")
    last.train(resume_from_checkpoint=True)
    assert_same(trained(last.model), trained(whole))


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model, kept = adapted(), {}
    settings = dict(metric_for_best_model="score", greater_is_better=True, eval_strategy="steps", eval_steps=2)
    best = trainer(model, tmp_path, load_best_model_at_end=True, **settings)

    def score(result) -> dict[str, float]:
        kept[best.state.global_step] = trained(model)
        return {"score": float(best.state.global_step == 4)}

    best.compute_metrics = score
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-4")
    assert_same(trained(model), kept[4])
    assert any(not torch.equal(kept[4][name], tensor) for name, tensor in kept[8].items())


def test_save_model_writes_what_load_adapter_reads(tmp_path):
    model = randomise(adapted())
    made = trainer(model, tmp_path / "out")
    made.processing_class = copy.copy(made)  # anything that saves itself
    made.processing_class.save_pretrained = lambda folder: Path(folder, "tokenizer.json").touch()
    made.save_model()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "training_args.bin"}
    assert_same(trained(load_adapter(base(), tmp_path / "out")), trained(model))
    made.save_model(str(tmp_path / "elsewhere"))
    assert_same(trained(load_adapter(base(), tmp_path / "elsewhere")), trained(model))


def test_another_base_is_refused_when_training_resumes(tmp_path):
    trainer(adapted(), tmp_path).train()
    other = apply_genft(base(seed=1), GenFTConfig.preset("fast", specific_dim=64, modules_to_save="head"))
    with pytest.raises(ValueError, match="belongs to another base model"):
        trainer(other, tmp_path).train(resume_from_checkpoint=True)


def test_model_without_an_adapter_is_refused_before_training(tmp_path):
    with pytest.raises(RuntimeError, match="AdapterCheckpoints: the Trainer's model has no adapter: call apply_genft"):
        trainer(base(), tmp_path)


def test_model_of_peft_needs_no_mixin(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from genft_kernels.integrations.peft import PeftGenFTConfig

    model = peft.get_peft_model(base(), PeftGenFTConfig(preset="fast"))
    with pytest.raises(RuntimeError, match="AdapterCheckpoints.*one of PEFT's.*leave this mixin out"):
        trainer(model, tmp_path)


def test_quantised_base_is_taken(tmp_path):
    model = adapted()
    model.is_quantized, model.hf_quantizer = True, SimpleNamespace(is_trainable=True)  # as from_pretrained leaves it
    with pytest.raises(ValueError, match="purely quantized models"):
        trainer(model, tmp_path, transformers.Trainer)
    trainer(model, tmp_path).train()
    assert not model._hf_peft_config_loaded
    assert_same(trained(load_adapter(base(), tmp_path / "checkpoint-8")), trained(model))


class Sharding(transformers.Trainer):
    """Says that it runs under DeepSpeed, or FSDP1, which need more than one process."""

    under_deepspeed = False

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_deepspeed_enabled = self.under_deepspeed
        plugin = None if self.under_deepspeed else SimpleNamespace(fsdp_version=1)
        self.accelerator.state = SimpleNamespace(fsdp_plugin=plugin)


@pytest.mark.parametrize(
    ("deepspeed", "message"), [(True, r"DeepSpeed .* fsdp=True"), (False, r"FSDP1: .*fsdp_config=\{'version': 2\}")]
)
def test_sharding_that_does_not_work_is_refused_before_training(tmp_path, deepspeed, message):
    kind = type("Kind", (AdapterCheckpoints, Sharding), {"under_deepspeed": deepspeed})
    with pytest.raises(NotImplementedError, match=message):
        trainer(adapted(), tmp_path, kind)


def test_whole_models_are_explained(tmp_path):
    trainer(adapted(), tmp_path, transformers.Trainer).train()
    with pytest.raises(ValueError, match="checkpoint-8 holds a whole model and no adapter.*resume_from_checkpoint"):
        load_adapter(base(), tmp_path / "checkpoint-8")
    with pytest.raises(FileNotFoundError, match="but checkpoints: name one, such as checkpoint-8"):
        load_adapter(base(), tmp_path)


def test_adapters_of_other_methods_are_explained(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["query"]))
    lora.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of the kind peft_type='LORA', not 'GENFT': peft.PeftModel.from_pretrained"):
        load_adapter(base(), tmp_path)
