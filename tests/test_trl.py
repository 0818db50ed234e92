"""TRL's `SFTTrainer`: with the model's own loss in `VMDSFTTrainer`, and stopped where it would train another."""

import pytest
import torch
from datasets import Dataset
from helpers import MASK, digits, tiny_config, tiny_model
from peft import LoraConfig
from test_training import HELD_OUT, ROWS, TOKENIZER, assert_equal_weights, logged, make_trainer, small_model, weights

from vmd_hf import VMDForMaskedDiffusion, VMDModel
from vmd_hf.training import VMDMetricsCallback


@pytest.fixture
def trl(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    return pytest.importorskip("trl")


def sft(trl, cls, folder, rows=None, callbacks=(), peft=None, **arguments):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 1}
    settings |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none"}
    settings |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    return cls(
        model=small_model(),
        args=trl.SFTConfig(str(folder), **({"loss_type": "nll"} | settings | arguments)),
        train_dataset=rows or Dataset.from_dict({"input_ids": ROWS["input_ids"][:].tolist()}),
        eval_dataset=Dataset.from_dict({"input_ids": HELD_OUT["input_ids"][:].tolist()}),
        processing_class=TOKENIZER,
        callbacks=list(callbacks),
        peft_config=peft,
    )


def test_it_trains_and_evaluates_like_the_plain_trainer(tmp_path, trl):
    from vmd_hf.training.trl import VMDSFTTrainer

    arguments = {"eval_strategy": "steps", "eval_steps": 2, "per_device_train_batch_size": 4}
    arguments["gradient_accumulation_steps"] = 2
    plain = make_trainer(small_model(), tmp_path, [VMDMetricsCallback()], **arguments)
    plain.train()
    trainer = sft(trl, VMDSFTTrainer, tmp_path, callbacks=[VMDMetricsCallback()], **arguments)
    trainer.train()
    for name in ("loss", "grad_norm", "reconstruction_loss", "kl", "active_units", "eval_loss", "eval_kl"):
        assert logged(trainer, name) == pytest.approx(logged(plain, name), rel=1e-6), name
    assert_equal_weights(weights(trainer.model), weights(plain.model), rtol=0, atol=1e-6)


def test_prompts_are_context_and_adapters_are_trained(tmp_path, trl):
    from vmd_hf.training.trl import VMDSFTTrainer

    ids = ROWS["input_ids"][:].tolist()
    ids = [row[: 3 + index % 2] for index, row in enumerate(ids)]  # some are padded
    rows = Dataset.from_dict({"input_ids": ids, "completion_mask": [[0, 0, 1, 1][: len(row)] for row in ids]})
    peft = LoraConfig(r=2, target_modules=["qkv_proj"])
    seen, settings = [], {"completion_only_loss": True, "max_steps": 2}
    trainer = sft(trl, VMDSFTTrainer, tmp_path, rows=rows, peft=peft, **settings)
    trainer.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert len(seen) == 4
    for batch in seen:
        assert (batch["labels"][:, :2] == -100).all()
        completion = batch["attention_mask"][:, 2:] == 1
        assert torch.equal(batch["labels"][:, 2:], batch["input_ids"][:, 2:].where(completion, -100))
    assert before and not any(torch.equal(before[n], p) for n, p in trainer.model.named_parameters() if n in before)


@pytest.mark.parametrize(
    "arguments, named",
    [({"loss_type": "dft"}, "loss_type"), ({"packing": True, "max_length": 16}, "padding_free")],
)
def test_settings_that_would_train_something_else_are_errors(tmp_path, trl, arguments, named):
    from vmd_hf.training.trl import VMDSFTTrainer

    with pytest.raises(ValueError, match=named):
        sft(trl, VMDSFTTrainer, tmp_path, **arguments)


@pytest.mark.parametrize("peft", [None, LoraConfig(r=2, target_modules=["qkv_proj"])], ids=["whole", "adapter"])
def test_the_first_step_of_its_own_loss_is_an_error_that_says_what_to_use(tmp_path, trl, peft):
    trainer = sft(trl, trl.SFTTrainer, tmp_path, peft=peft)
    with pytest.raises(ValueError, match=r"vmd_hf\.training\.trl\.VMDSFTTrainer"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("shape", [{}, {"block_size": 2, "prior": "learned"}], ids=["whole", "blocks"])
def test_only_training_the_denoiser_of_a_model_with_a_head_on_clean_tokens_is_an_error(shape):
    ids = digits(2, 4)
    masked = ids.index_fill(1, torch.tensor([1]), MASK)
    model = VMDForMaskedDiffusion(tiny_config(**shape)).train()
    with pytest.raises(ValueError, match="must hold mask tokens"):
        model.base_model(input_ids=ids)
    with pytest.raises(ValueError, match="next-token prediction"):
        model.loss_function(logits=None, labels=None)
    # A loss of one's own on what is masked, the whole model as it is made, features, and evaluations.
    assert model.base_model(input_ids=masked).last_hidden_state.requires_grad
    assert model(input_ids=ids).logits.requires_grad
    assert VMDModel(tiny_config(**shape)).train()(input_ids=ids).last_hidden_state.requires_grad
    with torch.no_grad():
        model.base_model(input_ids=ids)
    tiny_model(**shape).base_model(input_ids=ids)
