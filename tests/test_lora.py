"""PEFT's adapters on the model: training, saving, loading by all roads, merging."""

import peft
import pytest
import torch
from helpers import digits, normal, tiny_config, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from test_training import COLLATOR, HELD_OUT, held_out_output, logged, rows_with_noise, small_model, train
from transformers import AutoModelForMaskedLM, default_data_collator

from vmd_hf import VMDForMaskedDiffusion, VMDModel, nelbo
from vmd_hf.data.synthetic import synthetic_dataset
from vmd_hf.likelihood import corpus_bound
from vmd_hf.training import VMDMetricsCallback

LATENT_PATH = ["conditioner", "modulation", "latent_prior", "latent_encoder"]
BLOCKS = {"block_size": 2, "prior": "learned"}
CHAIN = {"latent_type": "chain", "objective": "per_step"}


def values_of(model):
    """Logits and bounds: all weights have a part in them."""
    ids, latents = digits(3, 4), normal(3, 2, 4) if model.config.block_size else normal(3, 4)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, latents=latents).logits
    bound = nelbo(model, ids, bound="per_step", num_steps=2, generator=torch.Generator().manual_seed(0))
    return torch.cat([logits[..., :10].flatten(), bound.nelbo])


def trained_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("task_type", "modules", "shape"),  # every pair of them
    [
        (None, None, {}),
        (None, LATENT_PATH, BLOCKS),
        ("FEATURE_EXTRACTION", None, BLOCKS),
        ("FEATURE_EXTRACTION", LATENT_PATH, {}),
        ("CAUSAL_LM", None, {}),
        ("CAUSAL_LM", LATENT_PATH, BLOCKS),
        (None, ["chain"], CHAIN),
    ],
)
def test_an_adapter_is_trained_saved_loaded_and_merged(tmp_path, task_type, modules, shape):
    tiny_model(**shape).save_pretrained(tmp_path / "base")
    base = VMDForMaskedDiffusion.from_pretrained(tmp_path / "base")
    untrained = values_of(base)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    parameters = [name for name, _ in base.named_parameters()]
    model = get_peft_model(base, LoraConfig(r=2, task_type=task_type, modules_to_save=modules))
    torch.testing.assert_close(values_of(model), untrained)  # an adapter starts without effect
    before = trained_weights(model)
    wholly = {name for name in before if ".modules_to_save." in name}
    latent_path = {name for name in parameters if any(f"{part}." in name for part in modules or ())}
    originals = {name.replace(".modules_to_save.default", "").removeprefix("base_model.model.") for name in wholly}
    assert originals == latent_path  # each part of the latent path, and no more
    assert all("lora_" in name for name in before.keys() - wholly)

    callbacks, rows = [VMDMetricsCallback()], synthetic_dataset("d1", 40, seed=0)
    assert len(logged(train(model, tmp_path / "run", callbacks, rows=rows, max_steps=4), "reconstruction_loss")) == 4
    after = trained_weights(model)
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    trained = values_of(model)
    assert corpus_bound(model, [{"input_ids": digits(2, 4)}]).num_tokens == 8
    assert (trained - untrained).abs().max() > 0.05
    model.save_pretrained(tmp_path / "adapter")

    fresh = VMDForMaskedDiffusion.from_pretrained(tmp_path / "base")
    loaded = [
        PeftModel.from_pretrained(fresh, tmp_path / "adapter"),
        AutoModelForMaskedLM.from_pretrained(tmp_path / "adapter"),  # transformers finds the base itself
    ]
    if task_type is None:
        settings = {"import_allowlist": ["vmd_hf.modeling_vmd"]}  # PEFT imports what its user trusts
        loaded.append(peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", **settings))
    for other in loaded:
        torch.testing.assert_close(values_of(other), trained)
    masks = torch.full((2, 4), base.config.mask_token_id)
    settings = {"num_steps": 2, "do_sample": True}
    first, second = (
        other.generate(input_ids=masks, generator=torch.Generator().manual_seed(0), **settings)
        for other in (model, loaded[1])
    )
    assert torch.equal(first, second) and first.max() < 10

    with model.disable_adapter():
        torch.testing.assert_close(values_of(model), untrained)
    model.merge_adapter()
    torch.testing.assert_close(values_of(model), trained, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(values_of(model), trained, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    assert type(merged) is VMDForMaskedDiffusion and merged.state_dict().keys() == frozen.keys()
    merged.save_pretrained(tmp_path / "merged")
    for other in (merged, AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")):
        torch.testing.assert_close(values_of(other), trained, rtol=1e-4, atol=1e-4)
    adapted = ("qkv_proj", "o_proj")
    for name, value in merged.state_dict().items():
        may_change = name in latent_path or any(part in name for part in adapted)
        assert may_change or torch.equal(value, frozen[name]), name


def test_the_model_without_a_head_is_what_features_are_extracted_with(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = VMDModel.from_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, task_type="FEATURE_EXTRACTION", init_lora_weights=False)
    model = get_peft_model(base, settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "adapter").eval()
    ids = digits(2, 5)
    features = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(loaded(input_ids=ids).last_hidden_state, features)
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=ids).last_hidden_state, features, atol=1e-2)


@pytest.mark.parametrize("cls", [VMDForMaskedDiffusion, VMDModel])
def test_no_target_modules_are_needed_though_peft_is_imported_after_the_model_was_made(monkeypatch, cls):
    targets = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    model = cls(tiny_config())
    monkeypatch.delitem(targets, "vmd", raising=False)  # as PEFT is when it was just imported
    adapted = get_peft_model(model, LoraConfig())
    names = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert names == {"qkv_proj", "o_proj"}


def test_accumulated_batches_train_an_adapter_like_one_batch_and_it_is_evaluated(tmp_path):
    """The wrapper passes on the number of labelled tokens over which the loss is to be averaged."""
    results = []
    for batch_size in (8, 2):
        torch.manual_seed(0)
        model = get_peft_model(small_model(), LoraConfig(r=2))
        trainer = train(
            model,
            tmp_path,
            rows=rows_with_noise(),
            collator=default_data_collator,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            max_steps=3,
        )
        results.append(trained_weights(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)
    trainer.data_collator = COLLATOR
    trainer.args.per_device_eval_batch_size = len(HELD_OUT)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(held_out_output(model).loss.item(), rel=1e-5)
