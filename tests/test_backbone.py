"""VMDs around masked language models that somebody else trained."""

import peft
import pytest
import torch
from helpers import normal, padded, seeded
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    EuroBertConfig,
    ModernBertConfig,
    RobertaConfig,
    Trainer,
    TrainingArguments,
    XLMRobertaConfig,
)

from vmd_hf import VMDConfig, VMDForMaskedDiffusion
from vmd_hf.data.synthetic import synthetic_tokenizer
from vmd_hf.hub import export_model
from vmd_hf.likelihood import nelbo

VOCABULARY, PAD, MASK = 40, 1, 4
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 20,
    "pad_token_id": PAD,
}
FAMILIES = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "xlm-roberta": XLMRobertaConfig(**SIZES),
    "deberta-v2": DebertaV2Config(**SIZES),
    "distilbert": DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=20,
        pad_token_id=PAD,
    ),
    "modernbert": ModernBertConfig(**SIZES, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3),
    "eurobert": EuroBertConfig(**SIZES, mask_token_id=MASK, bos_token_id=2, eos_token_id=3),
}
REAL = [token for token in range(VOCABULARY) if token not in (PAD, MASK)]


def tokens(*shape, seed=0):
    return torch.randint(5, VOCABULARY, shape, generator=seeded(seed))


@pytest.fixture(params=FAMILIES)
def original(request, tmp_path):
    """A checkpoint of somebody else's, in a folder of its own."""
    torch.manual_seed(0)
    folder = tmp_path / "original"
    AutoModelForMaskedLM.from_config(FAMILIES[request.param]).save_pretrained(folder)
    return folder


@pytest.fixture
def model(original):
    """A VMD around it, in which z has a say."""
    torch.manual_seed(1)
    model = VMDForMaskedDiffusion.from_masked_lm(original, latent_size=3, mask_token_id=MASK, kl_warmup_steps=0).eval()
    torch.nn.init.normal_(model.model.modulation.weight, std=0.3)
    for linear in (model.model.conditioner.in_proj, model.model.conditioner.out_proj):
        torch.nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    return model


def test_at_the_start_the_logits_are_the_originals_whatever_z_is(original):
    ids = tokens(2, 10)
    ids[:, 3:5] = MASK
    masked_lm = AutoModelForMaskedLM.from_pretrained(original).eval()
    expected = masked_lm(ids).logits
    model = VMDForMaskedDiffusion.from_masked_lm(masked_lm, latent_size=3, mask_token_id=MASK).eval()
    assert model.model.masked_lm is masked_lm
    for latents in (None, normal(2, 3)):
        logits = model(ids, latents=latents).logits
        assert torch.equal(logits[..., REAL], expected[..., REAL])
        assert (logits[..., [PAD, MASK]] == -torch.inf).all()


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    ids, latents = tokens(2, 10), normal(2, 3)
    model.save_pretrained(tmp_path / "vmd")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "vmd").eval()
    assert isinstance(loaded, VMDForMaskedDiffusion)
    assert loaded.config.backbone_config.model_type == model.config.backbone_config.model_type
    logits = model(ids, latents=latents).logits
    assert torch.equal(loaded(ids, latents=latents).logits, logits)
    assert not torch.allclose(model(ids).logits, logits, atol=1e-2)  # z has a say
    embedding, output = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert (embedding is output) == loaded.config.backbone_config.tie_word_embeddings
    for name, parameter in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    rows, latents = [tokens(7, seed=1), tokens(4, seed=2)], normal(2, 3)
    ids, mask = padded([row.tolist() for row in rows], side, fill=PAD)
    logits = model(ids, attention_mask=mask, latents=latents).logits
    noise = {"times": torch.tensor([0.7]), "latent_noise": normal(1, 3)}
    for index, row in enumerate(rows):
        alone = model(row[None], latents=latents[index : index + 1]).logits[0]
        torch.testing.assert_close(logits[index, mask[index] == 1], alone, rtol=0, atol=1e-5)
        draws = torch.linspace(0, 1, len(row))
        padded_draws = torch.ones(1, 7)
        padded_draws[:, mask[index] == 1] = draws
        labels = ids[index].masked_fill(mask[index] == 0, -100)[None]
        batch = {"input_ids": ids[index : index + 1], "attention_mask": mask[index : index + 1], "labels": labels}
        one = model(**batch, position_noise=padded_draws, **noise)
        other = model(row[None], labels=row[None], position_noise=draws[None], **noise)
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=1e-5)


def test_generation_fills_the_gaps_and_its_logits_are_those_of_the_masks(model):
    ids, latents = tokens(2, 8), normal(2, 3)
    ids[0, 2:5] = ids[1, 6] = MASK
    output = model.generate(ids, latents=latents, num_steps=1)
    expected = model(ids, latents=latents).logits.argmax(-1)
    assert torch.equal(output, torch.where(ids == MASK, expected, ids))


def test_the_likelihood_bound_is_that_of_its_logits(original):
    """Without a latent and in one step: the cross-entropy of everything at once."""
    model = VMDForMaskedDiffusion.from_masked_lm(original, latent_size=0, mask_token_id=MASK).eval()
    ids = tokens(3, 6)
    logits = model(torch.full_like(ids, MASK)).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none").sum(-1)
    bound = nelbo(model, ids, bound="per_step", num_steps=1)
    torch.testing.assert_close(bound.nelbo, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bound", ["per_sample", "per_step"])
def test_bounds_with_a_latent_are_those_of_rows_without_padding(model, bound):
    rows = [tokens(6, seed=1), tokens(4, seed=2)]
    ids, mask = padded([row.tolist() for row in rows], "right", fill=PAD)
    settings = {"bound": bound, "num_steps": 2, "num_samples": 2}
    together = nelbo(model, ids, attention_mask=mask, generator=[seeded(0), seeded(1)], **settings)
    for index, row in enumerate(rows):
        alone = nelbo(model, row[None], generator=[seeded(index)], **settings)
        torch.testing.assert_close(together.nelbo[index], alone.nelbo[0], rtol=1e-4, atol=1e-4)
        assert 0.5 < alone.nelbo[0] / len(row) < 10


@pytest.mark.parametrize("way", ["wholly", "frozen", "adapters"])
def test_a_folder_becomes_a_vmd_that_trains_saves_and_loads(way, tmp_path):
    """As the README shows it, with the plain Trainer: whichever way, z has a say in the end, and the original stays as
    it is unless it is trained."""
    torch.manual_seed(0)
    bert(vocab_size=16).save_pretrained(tmp_path / "original")
    synthetic_tokenizer().save_pretrained(tmp_path / "original")

    def start():
        torch.manual_seed(1)
        return VMDForMaskedDiffusion.from_masked_lm(tmp_path / "original", latent_size=3, kl_warmup_steps=0)

    model = start()
    assert model.config.mask_token_id == synthetic_tokenizer().mask_token_id
    original = {name: value.clone() for name, value in model.model.masked_lm.state_dict().items()}
    assert all(
        torch.equal(original[name], value)
        for name, value in AutoModelForMaskedLM.from_pretrained(tmp_path / "original").state_dict().items()
    )
    if way == "frozen":
        model.model.masked_lm.requires_grad_(False)
    if way == "adapters":
        latent_path = ["conditioner", "modulation", "latent_encoder"]
        model = peft.get_peft_model(model, peft.LoraConfig(modules_to_save=latent_path))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(2, 10, (8, 6)).sort().values]
    arguments = {"max_steps": 4, "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    Trainer(model, TrainingArguments(str(tmp_path), **arguments), train_dataset=rows).train()

    ids = tokens(2, 6) % 10
    logits = [model.eval()(ids, latents=z).logits for z in (normal(2, 3), normal(2, 3, seed=1))]
    assert (logits[0] - logits[1])[..., 2:10].abs().max() > 1e-4
    model.save_pretrained(tmp_path / "trained")
    if way == "adapters":
        loaded = peft.PeftModel.from_pretrained(start(), tmp_path / "trained").eval()
        model = model.base_model.model
    else:
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "trained").eval()
    assert torch.equal(loaded(ids, latents=normal(2, 3)).logits, logits[0])
    trained = {name.replace("base_layer.", ""): value for name, value in model.model.masked_lm.state_dict().items()}
    unchanged = all(torch.equal(trained[name], value) for name, value in original.items())
    assert unchanged == (way != "wholly")


def test_the_latent_path_trains_with_the_original_frozen(model):
    model.train().model.masked_lm.requires_grad_(False)
    ids = tokens(4, 8)
    model(ids, labels=ids).loss.backward()
    trained = {
        name.split(".")[0 if name.startswith("latent") else 1]
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    assert trained == {"latent_encoder", "conditioner", "modulation"}


def test_low_rank_adapters_need_no_target_modules_and_merge(model):
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False)).eval()
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name and "masked_lm" in name]
    assert len(names) >= 2 and all("layer" in name for name in names)
    ids, latents = tokens(2, 6), normal(2, 3)
    logits = adapted(ids, latents=latents).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids, latents=latents).logits, logits, rtol=1e-4, atol=1e-4)


def test_an_exported_folder_loads_with_its_code(model, tmp_path):
    export_model(model, tmp_path / "export")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "export", trust_remote_code=True).eval()
    ids, latents = tokens(2, 6), normal(2, 3)
    assert torch.equal(loaded(ids, latents=latents).logits, model(ids, latents=latents).logits)


def test_the_vocabulary_may_grow(model):
    ids = tokens(2, 6)
    before = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 5)
    assert model.config.vocab_size == model.config.backbone_config.vocab_size == VOCABULARY + 5
    after = model(ids).logits
    assert after.shape == (2, 6, VOCABULARY + 5)
    torch.testing.assert_close(after[..., REAL], before[..., REAL])


# --- errors ----------------------------------------------------------------------------------------------------------


def bert(**changes):
    return AutoModelForMaskedLM.from_config(BertConfig(**(SIZES | changes)))


def test_a_model_object_needs_its_mask_token():
    with pytest.raises(ValueError, match=r"mask_token_id must be given.*None"):
        VMDForMaskedDiffusion.from_masked_lm(bert())


def test_a_folder_needs_a_tokenizer_that_fits(tmp_path):
    """Without its files transformers makes one up, of special tokens alone."""
    bert(vocab_size=200).save_pretrained(tmp_path)
    message = "the tokenizer beside .* must be the model's own, of at most 200 tokens and a mask token, got"
    with pytest.raises(ValueError, match=message):
        VMDForMaskedDiffusion.from_masked_lm(tmp_path)
    synthetic_tokenizer().save_pretrained(tmp_path)  # of twelve
    bert(vocab_size=11).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message.replace("200", "11") + " 12 tokens"):
        VMDForMaskedDiffusion.from_masked_lm(tmp_path)
    assert VMDForMaskedDiffusion.from_masked_lm(tmp_path, mask_token_id=7).config.mask_token_id == 7
    bert(vocab_size=16).save_pretrained(tmp_path)  # padded to a round number
    assert VMDForMaskedDiffusion.from_masked_lm(tmp_path).config.mask_token_id == synthetic_tokenizer().mask_token_id


def test_models_without_an_encoder_or_a_head_are_errors():
    for model in (bert().base_model, AutoModel.from_config(FAMILIES["modernbert"])):
        with pytest.raises(ValueError, match="model must be a masked language model"):
            VMDForMaskedDiffusion.from_masked_lm(model, mask_token_id=MASK)
    electra = AutoModelForMaskedLM.from_config(ElectraConfig(**SIZES, embedding_size=16))
    with pytest.raises(ValueError, match=r"token embeddings as wide as its hidden states.*16 and 32"):
        VMDForMaskedDiffusion.from_masked_lm(electra, mask_token_id=MASK)


@pytest.mark.parametrize("settings", [{"prior": "learned", "block_size": 2}, {"num_loops": 2}])
def test_a_backbone_with_loops_or_a_learned_prior_is_an_error(settings):
    with pytest.raises(ValueError, match="a backbone is run through once and has no prior of its own"):
        VMDForMaskedDiffusion.from_masked_lm(bert(), mask_token_id=MASK, **settings)


def test_sequences_beyond_its_position_table_and_given_positions_are_errors():
    model = VMDForMaskedDiffusion.from_masked_lm(
        AutoModelForMaskedLM.from_config(FAMILIES["roberta"]), latent_size=2, mask_token_id=MASK
    )
    assert model.config.max_position_embeddings == 18  # RoBERTa's table begins after the pad token's id
    model(tokens(1, 18))
    with pytest.raises(ValueError, match="at most max_position_embeddings = 18"):
        model(tokens(1, 19))
    with pytest.raises(ValueError, match="position_ids must be None with a backbone"):
        model(tokens(1, 4), position_ids=torch.arange(4)[None])


def test_the_bare_model_class_says_what_to_load(tmp_path):
    VMDForMaskedDiffusion.from_masked_lm(bert(), latent_size=2, mask_token_id=MASK).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="VMDForMaskedDiffusion"):
        AutoModel.from_pretrained(tmp_path)
    assert VMDConfig.from_pretrained(tmp_path).backbone_config.hidden_size == 32
