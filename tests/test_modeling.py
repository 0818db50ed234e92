import copy
import itertools
import math

import pytest
import torch
from helpers import (
    MASK,
    OBJECTIVES,
    PAD,
    digits,
    implementations_beside_eager,
    normal,
    of_the_same_weights,
    pad_row,
    padded_batch,
    posterior_of_row,
    scored_by_hand,
    tiny_config,
    tiny_model,
    uniform,
)
from torch.distributions import Normal
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from vmd_hf import VMDForMaskedDiffusion, VMDModel
from vmd_hf.checks_vmd import check_labels

GRID = [[i // 4 for i in range(16)], [i % 4 for i in range(16)]]
POSITIONS = {
    "both": {"position_embedding_type": "both"},
    "rotary": {"position_embedding_type": "rotary"},
    "learned": {"position_embedding_type": "learned"},
    "groups": {"position_embedding_type": "none", "position_groups": GRID},
    "group bias": {"position_embedding_type": "none", "position_groups": GRID, "position_group_bias": True},
    "rotary and groups": {"position_embedding_type": "rotary", "position_groups": GRID},
}


def latents_for(model, batch_size, length):
    """(batch_size, latent_size), with blocks (batch_size, blocks, latent_size)."""
    config = model.config
    blocks = () if config.block_size is None else (-(-length // config.block_size),)
    return normal(batch_size, *blocks, config.latent_size)


def some_masked(input_ids, seed=7):
    return input_ids.masked_fill(uniform(*input_ids.shape, seed=seed) < 0.5, MASK)


# ---------------------------------------------------------------------------------------------------------------------
# Denoising: forward without labels
# ---------------------------------------------------------------------------------------------------------------------


def test_logits_have_the_shape_and_the_forbidden_tokens_of_the_config():
    logits = tiny_model()(input_ids=some_masked(digits(3, 6))).logits
    assert logits.shape == (3, 6, 12)
    assert logits[..., [MASK, PAD]].eq(-math.inf).all()
    assert logits[..., :MASK].isfinite().all()


def test_a_pad_token_that_ends_texts_may_be_predicted():
    logits = tiny_model(pad_token_id=9, eos_token_id=9)(input_ids=digits(1, 4)).logits
    assert logits[..., 9].isfinite().all()
    assert logits[..., MASK].eq(-math.inf).all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_heads_start_looking_at_one_grouping_each(implementation):
    config = tiny_config(**POSITIONS["group bias"], attn_implementation=implementation)
    attention = VMDForMaskedDiffusion(config).eval().model.layers[0].attention
    torch.nn.init.zeros_(attention.qkv_proj.weight[:64])  # queries and keys: what is left are the biases
    torch.nn.init.eye_(attention.qkv_proj.weight.data[64:])
    torch.nn.init.eye_(attention.o_proj.weight)
    x = normal(1, 16, 32)
    same = torch.stack([torch.tensor(group)[:, None] == torch.tensor(group) for group in GRID], -1)[None].float()
    output, *_ = attention(x, same_group=same)
    same_row, same_column = same[0].bool().unbind(-1)
    for head, sees in enumerate([same_row, same_column, torch.zeros(16, 16, dtype=torch.bool), same_row]):
        scores = torch.where(sees, math.exp(4), 1.0)  # four of a group, twelve others
        expected = (scores / scores.sum(-1, keepdim=True)) @ x[0, :, 8 * head : 8 * head + 8]
        torch.testing.assert_close(output[0, :, 8 * head : 8 * head + 8], expected, atol=1e-5, rtol=1e-5)


def test_group_bias_needs_an_attention_that_takes_biases():
    model = tiny_model(**POSITIONS["group bias"], attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="attn_implementation must be eager or sdpa with position_group_bias, got"):
        model(digits(1, 16))


@pytest.mark.parametrize("block_size", [None, 3])
def test_the_default_latent_is_zero(block_size):
    model, x_t = tiny_model(block_size=block_size), some_masked(digits(2, 5))
    assert torch.equal(model(x_t).logits, model(x_t, latents=0 * latents_for(model, 2, 5)).logits)


def test_the_latent_changes_the_logits_of_its_own_row_only():
    model, x_t = tiny_model(), some_masked(digits(1, 5)).repeat(3, 1)
    z = normal(3, 4)
    z[2] = 0
    logits = model(x_t, latents=z).logits[..., :MASK]
    assert (logits[0] - logits[1]).abs().max() > 0.1
    torch.testing.assert_close(logits[2], model(x_t).logits[2, :, :MASK])
    torch.testing.assert_close(logits[:1], model(x_t[:1], latents=z[:1]).logits[..., :MASK])


PER_POSITION = {"latent_input": "position_slices", "latent_size": 48}  # three for each of sixteen positions


@pytest.mark.parametrize("settings", [{}, PER_POSITION, {"block_size": 3}])
@pytest.mark.parametrize("position", ["both", "groups"])
def test_a_fresh_model_is_a_plain_masked_diffusion_model(position, settings):
    """The modulation starts as the identity: z has no effect, and the logits are those without the latent path."""
    config = tiny_config(initializer_range=0.3, **POSITIONS[position], **settings)
    with_latent = VMDForMaskedDiffusion(config).eval()
    blocks = {"block_size": config.block_size}
    plain = VMDForMaskedDiffusion(tiny_config(latent_size=0, **blocks, **POSITIONS[position])).eval()
    missing, unexpected = plain.load_state_dict(with_latent.state_dict(), strict=False)
    assert not missing
    latent_path = ("modulation", "conditioner", "latent_encoder", "position_inputs")
    assert all(any(part in name for part in latent_path) for name in unexpected)

    x_t = some_masked(digits(3, 6))
    expected = plain(x_t).logits
    assert expected[..., :MASK].std() > 0.1
    for z in (None, 10 * latents_for(with_latent, 3, 6)):
        torch.testing.assert_close(with_latent(x_t, latents=z).logits, expected)


def test_a_model_without_a_latent_has_no_latent_parameters():
    names = [name for name, _ in VMDForMaskedDiffusion(tiny_config(latent_size=0)).named_parameters()]
    assert not [name for name in names if "latent" in name or "modulation" in name or "conditioner" in name]


def test_the_posterior_starts_with_means_of_unit_scale_and_little_noise():
    model = VMDForMaskedDiffusion(tiny_config(latent_size=64, hidden_size=128)).eval()
    means, log_variances = model.latent_encoder.out_proj(normal(500, 128)).chunk(2, dim=-1)
    assert means.std().item() == pytest.approx(1, rel=0.1)
    assert (log_variances == -3).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"input_ids must have shape \(batch, length\), got \(3,\)"),
        ({"input_ids": torch.zeros(1, 2, 3, dtype=torch.long)}, r"input_ids.*got \(1, 2, 3\)"),
        ({"input_ids": None}, "input_ids.*None"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask.*\(2, 3\), got \(2, 4\)"),
        ({"attention_mask": torch.ones(2, 1, 3, 3)}, r"attention_mask.*got \(2, 1, 3, 3\)"),
        ({"position_ids": torch.zeros(1, 3, dtype=torch.long)}, r"position_ids.*\(2, 3\), got \(1, 3\)"),
        ({"latents": torch.zeros(2, 5)}, r"latents.*\(2, 4\), got \(2, 5\)"),
        ({"latents": torch.zeros(1, 4)}, r"latents.*\(2, 4\), got \(1, 4\)"),
        ({"latents": torch.zeros(4)}, r"latents.*\(2, 4\), got \(4,\)"),
    ],
)
def test_wrong_shapes_are_errors(arguments, message):
    model = tiny_model()
    for module in (model, model.model):
        with pytest.raises(ValueError, match=message):
            module(**({"input_ids": digits(2, 3)} | arguments))


def test_latents_for_a_model_without_a_latent_are_an_error():
    with pytest.raises(ValueError, match="latent_size = 0"):
        tiny_model(latent_size=0)(digits(2, 3), latents=torch.zeros(2, 4))


@pytest.mark.parametrize("position", ["learned", "groups"])
def test_more_tokens_than_a_position_table_has_are_an_error(position):
    model = tiny_model(**POSITIONS[position])
    assert model(digits(1, 16)).logits.shape == (1, 16, 12)
    with pytest.raises(ValueError, match=r"max_position_embeddings = 16.*17"):
        model(digits(1, 17))


def test_rotary_positions_have_no_hard_limit():
    assert tiny_model(position_embedding_type="rotary")(digits(1, 40)).logits[..., :MASK].isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Padding, batches and attention implementations
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", list(POSITIONS))
def test_padding_on_either_side_leaves_the_logits_of_a_row_alone(position, side):
    model = tiny_model(**POSITIONS[position])
    x_t, z = some_masked(digits(1, 5)), normal(1, 4)
    alone = model(x_t, latents=z).logits[0, :, :MASK]
    mask = pad_row(torch.ones(5, dtype=torch.long), 9, side, 0)
    for pad_token in (PAD, 3):  # what padding holds does not matter, and is not how it is recognised
        padded = model(pad_row(x_t[0], 9, side, pad_token), attention_mask=mask, latents=z).logits[0, :, :MASK]
        torch.testing.assert_close(padded[mask[0].bool()], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("position", list(POSITIONS))
def test_padding_on_either_side_leaves_the_loss_of_a_row_alone(position, objective):
    model, row = tiny_model(objective=objective, **POSITIONS[position]), digits(1, 5, seed=1)
    labels = row.clone()
    labels[0, 1] = -100  # context
    alone = model(input_ids=row, labels=labels)
    assert alone.reconstruction_loss > 0
    assert alone.kl_per_latent > 0
    for side in ("left", "right"):
        padded = model(
            input_ids=pad_row(row[0], 9, side, PAD),
            attention_mask=pad_row(torch.ones_like(row[0]), 9, side, 0),
            labels=pad_row(labels[0], 9, side, -100),
        )
        for name in ("loss", "reconstruction_loss", "kl", "kl_per_latent", "posterior_shift"):
            torch.testing.assert_close(padded[name], alone[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"latent_input": "layers_and_positions"}, PER_POSITION, {"block_size": 3}])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_padded_batch_is_its_rows(objective, settings):
    model = tiny_model(objective=objective, **settings)
    rows = [digits(1, length, seed=length)[0] for length in (3, 5, 7, 4)]
    batch = {
        "input_ids": torch.cat([pad_row(row, 7, side, PAD) for row, side in zip(rows, SIDES, strict=True)]),
        "attention_mask": torch.cat(
            [pad_row(torch.ones_like(row), 7, side, 0) for row, side in zip(rows, SIDES, strict=True)]
        ),
    }
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    together = model(**batch, labels=labels)
    alone = [model(input_ids=row[None], labels=row[None]) for row in rows]
    for index, output in enumerate(alone):  # with blocks, 0 for those beyond the row
        of_row, own = together.kl_per_latent[index].flatten(), output.kl_per_latent.flatten()
        torch.testing.assert_close(of_row[: len(own)], own, rtol=1e-4, atol=1e-5)
        assert of_row[len(own) :].eq(0).all()
    # Summed over everything and divided by the number of labelled tokens: 3 + 5 + 7 + 4.
    for name in ("loss", "reconstruction_loss", "kl"):
        expected = sum(len(row) * output[name] for row, output in zip(rows, alone, strict=True)) / 19
        torch.testing.assert_close(together[name], expected, rtol=1e-5, atol=1e-5)

    z = latents_for(model, 4, 7)
    logits = model(**batch, latents=z).logits
    for index, row in enumerate(rows):
        own = z[index : index + 1]
        own = own if model.config.block_size is None else own[:, : -(-len(row) // 3)]
        expected = model(row[None], latents=own).logits[0]
        actual = logits[index][batch["attention_mask"][index].bool()]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


SIDES = ("left", "right", "left", "right")


def test_given_positions_replace_the_counted_ones():
    model, x_t = tiny_model(**POSITIONS["learned"]), some_masked(digits(1, 4))
    counted = model(x_t).logits
    assert torch.equal(model(x_t, position_ids=torch.arange(4)[None]).logits, counted)
    assert (model(x_t, position_ids=torch.arange(4, 8)[None]).logits - counted)[..., :MASK].abs().max() > 0.1


def test_attention_looks_both_ways():
    model, x_t = tiny_model(), torch.tensor([[1, 2, MASK, 3, 4]])
    for position in (0, 4):
        other = x_t.clone()
        other[0, position] = 7
        difference = (model(x_t).logits - model(other).logits)[0, 2, :MASK]
        assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("block_size", [None, 3])
@implementations_beside_eager
def test_attention_implementations_agree(implementation, block_size):
    device = "cuda" if implementation == "flex_attention" and torch.cuda.is_available() else "cpu"
    model = tiny_model(block_size=block_size).to(device)
    input_ids, mask = (tensor.to(device) for tensor in padded_batch())
    z = latents_for(model, 2, 7).to(device)
    labels = input_ids.masked_fill(mask == 0, -100)
    results = []
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        with torch.no_grad():
            plain = model(some_masked(digits(2, 7)).to(device), latents=z).logits
            padded = model(input_ids, attention_mask=mask, latents=z).logits[mask.bool()]
            loss = model(input_ids, attention_mask=mask, labels=labels).loss
        results.append((plain, padded, loss))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


PACKED = {"side by side": "AAABBBBC", "padding": ".AAA..BB.CC"}


@implementations_beside_eager
@pytest.mark.parametrize("position", ["both", "learned", "group bias"])
@pytest.mark.parametrize("case", list(PACKED))
def test_documents_of_a_packed_row_do_not_see_one_another(case, position, implementation):
    """They restart where positions do, and have the logits and the loss of rows of their own."""
    model, pattern = tiny_model(latent_size=0, **POSITIONS[position]), PACKED[case]
    if position == "group bias" and implementation == "flex_attention":
        pytest.skip("flex attention takes no biases")
    device = "cuda" if implementation == "flex_attention" else "cpu"
    x_0, mask = digits(2, len(pattern)), torch.tensor([[letter != "." for letter in pattern]]).long().expand(2, -1)
    columns = {letter: [i for i, other in enumerate(pattern) if other == letter] for letter in "ABC"}
    position_ids = torch.zeros(2, len(pattern), dtype=torch.long)
    for own in columns.values():
        position_ids[:, own] = torch.arange(len(own))
    mask_or_none = None if "." not in pattern else mask.to(device)
    labels, noise = x_0.masked_fill(mask == 0, -100), {"times": torch.full((2,), 0.5)}
    noise["position_noise"] = uniform(2, len(pattern))
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        model.to(device)
        inputs = {"position_ids": position_ids.to(device), "attention_mask": mask_or_none}
        logits = model(some_masked(x_0).to(device), **inputs).logits
        given = {key: value.to(device) for key, value in noise.items()}
        packed = model(x_0.to(device), labels=labels.to(device), **inputs, **given)
        total = 0.0
        for own in columns.values():
            alone = model(some_masked(x_0)[:, own].to(device)).logits
            torch.testing.assert_close(logits[:, own], alone, rtol=1e-4, atol=1e-4)
            tokens, own_noise = x_0[:, own].to(device), given | {"position_noise": given["position_noise"][:, own]}
            total = total + model(tokens, labels=tokens, num_items_in_batch=mask.sum(), **own_noise).loss
        torch.testing.assert_close(packed.loss, total, rtol=1e-4, atol=1e-4)


def test_documents_of_a_packed_row_cannot_share_a_latent():
    model, x_t = tiny_model(), digits(1, 5)
    model(x_t, position_ids=torch.tensor([[3, 4, 6, 7, 9]]))  # one document
    for labels in (None, x_t):
        with pytest.raises(ValueError, match="position_ids must not restart within a row"):
            model(x_t, position_ids=torch.tensor([[0, 1, 2, 0, 1]]), labels=labels)


# ---------------------------------------------------------------------------------------------------------------------
# What transformers expects of a model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_labels", [False, True])
def test_hidden_states_on_request(with_labels):
    model, input_ids = tiny_model(), digits(2, 5)
    labels = input_ids if with_labels else None
    assert model(input_ids, labels=labels).hidden_states is None
    hidden_states = model(input_ids, labels=labels, output_hidden_states=True).hidden_states
    # The embeddings and the two layers of the denoiser; the latent encoder's are not among them.
    assert [tuple(states.shape) for states in hidden_states] == [(2, 5, 32)] * 3
    if not with_labels:
        torch.testing.assert_close(hidden_states[0], model.model.embeddings(input_ids, torch.arange(5)))
        torch.testing.assert_close(hidden_states[-1], model.model(input_ids).last_hidden_state)


@pytest.mark.parametrize("with_labels", [False, True])
def test_attention_weights_on_request(with_labels):
    model = tiny_model()
    model.set_attn_implementation("eager")
    input_ids, mask = padded_batch()
    labels = input_ids.masked_fill(mask == 0, -100) if with_labels else None
    attentions = model(input_ids, attention_mask=mask, labels=labels, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 4, 7, 7)] * 2
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
        assert weights[0, :, :, :4].max() < 1e-6  # the first row has four pads on the left


@pytest.mark.parametrize("block_size", [None, 3])
def test_a_tuple_on_request(block_size):
    model, input_ids = tiny_model(block_size=block_size), digits(2, 5)
    assert torch.equal(model(input_ids, return_dict=False)[0], model(input_ids).logits)
    assert torch.equal(
        model(input_ids, labels=input_ids, return_dict=False)[0], model(input_ids, labels=input_ids).loss
    )


@pytest.mark.parametrize("tied", [True, False])
def test_word_embeddings_are_tied_as_the_config_says(tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    for current in (model, VMDForMaskedDiffusion.from_pretrained(tmp_path)):
        assert (current.lm_head.weight is current.get_input_embeddings().weight) == tied
        assert current.get_output_embeddings() is current.lm_head
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied


def test_a_vocabulary_keeps_its_special_tokens():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"mask_token_id, pad_token_id and eos_token_id \(10, 11, None\).*got 11"):
        model.resize_token_embeddings(11)
    assert model.lm_head.weight.shape[0] == 12
    model.resize_token_embeddings(12)


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_can_grow(tied, tmp_path):
    model, input_ids = tiny_model(tie_word_embeddings=tied), digits(2, 5)
    before = model(input_ids).logits
    model.resize_token_embeddings(20)
    assert model.config.vocab_size == model.model.config.vocab_size == 20
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied

    model.save_pretrained(tmp_path)
    for current in (model, VMDForMaskedDiffusion.from_pretrained(tmp_path)):
        logits = current(input_ids).logits
        assert logits.shape == (2, 5, 20)
        torch.testing.assert_close(logits[..., :12], before)
        assert logits[..., 12:].isfinite().all()
        assert logits[..., [MASK, PAD]].eq(-math.inf).all()
        new_tokens = torch.tensor([[12, 19, 3]])
        assert current(new_tokens, labels=new_tokens).loss.isfinite()


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, implementation, block_size):
    config = tiny_config(block_size=block_size, attn_implementation=implementation)
    model, input_ids = VMDForMaskedDiffusion(config).eval(), digits(4, 6)
    expected = model(input_ids, labels=input_ids)
    model = model.to(dtype)
    logits = model(input_ids, latents=latents_for(model, 4, 6)).logits
    assert logits.dtype == dtype
    assert logits[..., :MASK].isfinite().all()
    output = model(input_ids, labels=input_ids)
    output.loss.backward()
    assert model.latent_encoder.kl_warmup_progress.dtype == torch.long
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    for name in ("loss", "reconstruction_loss", "kl", "kl_per_latent"):
        assert output[name].dtype == torch.float32
        torch.testing.assert_close(output[name], expected[name], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("block_size", [None, 3])
def test_autocast(block_size):
    model, input_ids = VMDForMaskedDiffusion(tiny_config(block_size=block_size)).eval(), digits(4, 6)
    expected = model(input_ids, labels=input_ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(input_ids).logits.dtype == torch.bfloat16
        loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "dropout, silenced",
    [
        ("attention_dropout", "mlp.down_proj"),
        ("hidden_dropout", "mlp.down_proj"),  # drops what the attention adds
        ("hidden_dropout", "attention.o_proj"),  # drops what the feed-forward layer adds
    ],
)
def test_dropout_acts_in_training_only(dropout, silenced, implementation):
    model, input_ids = tiny_model(**{dropout: 0.5}), digits(2, 6)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.get_submodule(silenced).weight.zero_()
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("settings", [*POSITIONS.values(), {"block_size": 3, "prior": "learned"}])
def test_save_and_load(settings, tmp_path):
    model = tiny_model(kl_warmup_steps=10, objective="per_sample", **settings)
    model.latent_encoder.kl_warmup_progress.fill_(3)
    model.save_pretrained(tmp_path)
    x_t, z = some_masked(digits(2, 6)), latents_for(model, 2, 6)
    for loader in (VMDForMaskedDiffusion, AutoModelForMaskedLM):
        loaded, report = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is VMDForMaskedDiffusion
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert not loaded.training
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        assert loaded.latent_encoder.kl_warmup_progress == 3
        assert torch.equal(loaded(x_t, latents=z).logits, model(x_t, latents=z).logits)
        assert torch.equal(
            loaded(digits(2, 6), labels=digits(2, 6)).loss, model(digits(2, 6), labels=digits(2, 6)).loss
        )


def test_the_backbone_loads_from_the_whole_model_and_the_other_way_round(tmp_path):
    model, x_t = tiny_model(**POSITIONS["rotary and groups"]), some_masked(digits(2, 6))
    model.save_pretrained(tmp_path / "whole")
    for loader in (VMDModel, AutoModel):
        backbone = loader.from_pretrained(tmp_path / "whole")
        assert type(backbone) is VMDModel
        assert torch.equal(backbone(x_t).last_hidden_state, model.model(x_t).last_hidden_state)

    backbone.save_pretrained(tmp_path / "backbone")
    loaded = VMDForMaskedDiffusion.from_pretrained(tmp_path / "backbone")
    assert torch.equal(loaded(x_t).logits, model(x_t).logits)
    assert loaded.latent_encoder.kl_warmup_progress == 0  # missing in the file: must not be left as it was in memory
    assert loaded(digits(2, 6), labels=digits(2, 6)).loss.isfinite()


def test_loading_in_low_precision_keeps_counters_whole(tmp_path):
    model = tiny_model(kl_warmup_steps=1000, **POSITIONS["groups"])
    model.latent_encoder.kl_warmup_progress.fill_(301)  # not a bfloat16 number
    model.save_pretrained(tmp_path)
    loaded = VMDForMaskedDiffusion.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.latent_encoder.kl_warmup_progress.item() == 301
    assert loaded.model.embeddings.position_groups.tolist() == GRID


def test_a_checkpoint_of_another_model_type_is_an_error(tmp_path):
    config = BertConfig(
        vocab_size=12, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bert"):
        VMDForMaskedDiffusion.from_pretrained(tmp_path)


@pytest.mark.parametrize("targets", ["all-linear", ["qkv_proj"], ["modulation"]])
def test_low_rank_adapters_can_be_put_on_every_linear_layer(targets):
    peft = pytest.importorskip("peft")
    model, input_ids = tiny_model(), digits(2, 5)
    expected = model(input_ids, labels=input_ids).loss
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets)).eval()
    loss = adapted(input_ids=input_ids, labels=input_ids).loss
    torch.testing.assert_close(loss, expected)  # an adapter starts without effect
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in adapted.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("tied", [True, False])
def test_a_pad_token_that_ends_texts_has_an_embedding_that_learns(tied):
    """As an end-of-sequence token it is context that the model must be able to tell from nothing."""
    torch.manual_seed(0)
    model = VMDForMaskedDiffusion(tiny_config(pad_token_id=9, eos_token_id=9, latent_size=0, tie_word_embeddings=tied))
    embedding = model.get_input_embeddings().weight
    assert embedding[9].abs().max() > 0
    # Only what the embedding does as an input: the logits of a fixed vector do not enter.
    model.model(torch.tensor([[1, 9, MASK]])).last_hidden_state[0, 2].square().mul(torch.arange(32)).sum().backward()
    assert embedding.grad[9].abs().max() > 0


# ---------------------------------------------------------------------------------------------------------------------
# What positions can tell
# ---------------------------------------------------------------------------------------------------------------------


def test_rotary_positions_alone_cannot_tell_masked_tokens_apart():
    """A known limit: attention over equal values gives the same value everywhere, whatever its weights."""
    model, canvas, z = tiny_model(**POSITIONS["rotary"]), torch.full((1, 5), MASK), normal(1, 4)
    logits = model(canvas, latents=z).logits[0, :, :MASK]
    torch.testing.assert_close(logits, logits[:1].expand(5, -1), rtol=1e-5, atol=1e-5)
    # One visible token is enough to break the tie.
    canvas[0, 0] = 3
    logits = model(canvas, latents=z).logits[0, 1:, :MASK]
    assert (logits - logits[:1]).abs().max() > 1e-2


@pytest.mark.parametrize("position", ["learned", "groups"])
def test_position_tables_tell_masked_tokens_apart(position):
    logits = tiny_model(**POSITIONS[position])(torch.full((1, 5), MASK)).logits[0, :, :MASK]
    for first, second in itertools.combinations(logits, 2):
        assert (first - second).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def loss_batch(batch_size=6, length=7, latent_size=4):
    """Rows with padding on both sides, context in places, and one that is nothing but context; explicit noise."""
    input_ids, attention_mask = digits(batch_size, length), torch.ones(batch_size, length, dtype=torch.long)
    attention_mask[1, :2] = 0
    attention_mask[2, 4:] = 0
    input_ids[attention_mask == 0] = PAD
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[1, 3] = labels[3, 0] = labels[4, 2] = labels[4, 5] = -100
    labels[5] = -100
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return batch, explicit_noise(batch_size, length, latent_size=latent_size)


def explicit_noise(batch_size, length, seed=0, latent_size=4):
    return {
        "times": uniform(batch_size, seed=seed + 11),
        "position_noise": uniform(batch_size, length, seed=seed + 12),
        "latent_noise": normal(batch_size, latent_size, seed=seed + 13),
    }


def state_by_hand(config, maskable, time, noise):
    """(masked, revealed, weight) of one row: lists of positions, and the factor of its reconstruction term."""
    if config.objective == "vmd":
        masked = [position for position in maskable if noise[position] < time]
        return masked, masked, 1 / time
    choice = time * len(config.objective_steps)
    row_steps = min(config.objective_steps[int(choice)], len(maskable))
    step = int((choice - int(choice)) * row_steps) + 1
    order = sorted(maskable, key=lambda position: noise[position])
    start, end = (step - 1) * len(order) // row_steps, step * len(order) // row_steps
    return order[start:], order[start:end], row_steps


def slow_loss(model, batch, noise):
    """Reconstruction and KL terms over the number of labels, and the KL of each row: row by row, token by token."""
    config, reconstruction, kl, kl_of_rows = model.config, 0.0, 0.0, []
    for index, (row, mask, labels) in enumerate(zip(*batch.values(), strict=True)):
        keep = mask.nonzero().flatten()
        row, labels = row[keep], labels[keep].tolist()
        maskable = [position for position, label in enumerate(labels) if label != -100]
        kl_of_rows.append(0.0)
        if not maskable:
            continue
        row_noise = noise["position_noise"][index, keep].tolist()
        masked, revealed, weight = state_by_hand(config, maskable, noise["times"][index].item(), row_noise)
        if not revealed:
            continue
        # The posterior of `per_sample` has to serve all steps: everything is masked.
        flags = (maskable, maskable) if config.objective == "per_sample" else (masked, revealed)
        mean, log_variance = posterior_of_row(model, row, *flags)
        z = mean + log_variance.exp().sqrt() * noise["latent_noise"][index]
        x_t = row.clone()
        x_t[masked] = MASK
        log_probability = model(x_t[None], latents=z[None]).logits[0].log_softmax(-1)
        scored, share = scored_by_hand(config, masked, revealed)
        reconstruction -= weight * share * sum(log_probability[position, row[position]] for position in scored)
        kl_of_row = 0.5 * sum(mean**2 + log_variance.exp() - 1 - log_variance)
        kl_of_rows[-1] = kl_of_row.item()
        kl += kl_of_row * (1 if config.objective == "per_sample" else weight)
    num_labels = (batch["labels"] != -100).sum()
    return reconstruction / num_labels, kl / num_labels, torch.tensor(kl_of_rows)


@pytest.mark.parametrize("seed", [0, 100])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_loop_over_rows_and_tokens(objective, training, seed):
    model = tiny_model(objective=objective, objective_steps=[2, 1, 4], kl_weight=0.7).train(training)
    batch, _ = loss_batch()
    noise = explicit_noise(6, 7, seed)
    with torch.no_grad():
        output = model(**batch, **noise)
        reconstruction, kl, kl_of_rows = slow_loss(model, batch, noise)
    torch.testing.assert_close(output.reconstruction_loss, reconstruction, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.kl, kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.kl_per_latent, kl_of_rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, reconstruction + 0.7 * kl, rtol=1e-5, atol=1e-5)
    assert output.logits is None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_is_that_of_the_loop_over_rows_and_tokens(objective):
    """In particular both mean and variance of the posterior learn through z."""
    model, (batch, noise) = tiny_model(objective=objective).train(), loss_batch()
    parameters = dict(model.named_parameters())
    reconstruction, kl, _ = slow_loss(model, batch, noise)
    expected = torch.autograd.grad(reconstruction + kl, list(parameters.values()))
    actual = torch.autograd.grad(model(**batch, **noise).loss, list(parameters.values()))
    for name, first, second in zip(parameters, actual, expected, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4 * second.abs().max().item(), msg=name)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_a_latent_the_loss_is_the_reconstruction(objective):
    batch, noise = loss_batch()
    del noise["latent_noise"]
    output = tiny_model(latent_size=0, objective=objective)(**batch, **noise)
    assert torch.equal(output.loss, output.reconstruction_loss)
    assert output.kl == 0
    assert output.kl_per_latent is None and output.posterior_shift is None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_sum_of_the_terms_that_are_reported(objective, training):
    model = tiny_model(objective=objective, kl_weight=0.3, kl_warmup_steps=5).train(training)
    model.latent_encoder.kl_warmup_progress.fill_(5)
    input_ids = digits(5, 6)
    output = model(input_ids=input_ids, labels=input_ids)
    torch.testing.assert_close(output.loss, output.reconstruction_loss + 0.3 * output.kl)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("blocks", [{}, {"block_size": 3}, {"block_size": 3, "prior": "learned"}])
@pytest.mark.parametrize(("objective", "steps"), [("vmd", 1), ("per_step", 2), ("per_sample", 1)])
def test_several_draws_are_weighted_under_the_logarithm_of_each_latent(objective, steps, blocks, training):
    """Each block of each row by itself, from the reconstruction terms of single draws and densities of the normal."""
    num_blocks, draws = 2 if blocks else 1, 3
    settings = {"objective": objective, "objective_steps": [steps], "kl_weight": 0.6, **blocks}
    model = tiny_model(**settings, objective_draws=draws).train(training)
    single = tiny_model(**settings).train(training)
    said = {"prior": (torch.zeros(2, 4), torch.zeros(2, 4))}  # means and log-variances of the last pass
    single.latent_encoder.register_forward_hook(lambda *args: said.update(posterior=args[-1]))
    if "prior" in blocks:
        single.model.latent_prior.register_forward_hook(lambda *args: said.update(prior=args[-1]))
    input_ids, epsilon = digits(3, 6), normal(3, num_blocks, draws, 4)
    times, position_noise = 0.6 + 0.4 * uniform(3, num_blocks), uniform(3, 6)
    shape = (3, num_blocks) if blocks else (3,)

    total = 0.0
    for row in range(3):
        for block in range(num_blocks):
            labels = torch.full((1, 6), -100)
            columns = slice(3 * block, 3 * block + 3) if blocks else slice(None)
            labels[0, columns] = input_ids[row, columns]
            terms = []
            for draw in range(draws):
                output = single(
                    input_ids[row : row + 1],
                    labels=labels,
                    times=times[row : row + 1].view(1, *shape[1:]),
                    position_noise=position_noise[row : row + 1],
                    latent_noise=epsilon[row : row + 1, :, draw].view(1, *shape[1:], 4),
                    num_items_in_batch=1,
                )
                q, p = (
                    Normal(mean.view(-1, 4)[block], (0.5 * log.view(-1, 4)[block]).exp())
                    for mean, log in (said["posterior"], said["prior"])
                )
                z = q.mean + q.stddev * epsilon[row, block, draw]
                weight = 1 / times[row, block] if objective == "vmd" else steps
                terms.append(0.6 * (p.log_prob(z) - q.log_prob(z)).sum() - output.reconstruction_loss / weight)
            total += -weight * (torch.stack(terms).logsumexp(0) - math.log(draws))
    output = model(
        input_ids,
        labels=input_ids,
        times=times.view(shape),
        position_noise=position_noise,
        latent_noise=epsilon.view(*shape, draws, 4),
    )
    torch.testing.assert_close(output.loss, total / 18, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"objective": "per_sample", "objective_steps": [2]}, {"block_size": 3, "latent_size": 0}]
)
def test_with_a_loop_loss_earlier_loops_pay_as_models_of_so_many_loops(settings):
    """(With blocks and a latent z would differ: the posterior reads what all loops made of the clean context.)"""
    model = tiny_model(**settings, kl_weight=0.3, num_loops=3, loop_loss=True).train()
    input_ids = digits(2, 6)
    blocks = "block_size" in settings
    noise = {"times": uniform(2, 2) if blocks else uniform(2), "position_noise": uniform(2, 6)}
    if not blocks:
        noise["latent_noise"] = normal(2, 4)
    batch = {"input_ids": input_ids, "labels": input_ids} | noise
    trained = model(**batch)
    reported = [trained.reconstruction_loss, trained.kl]
    terms = []
    model.config.loop_loss = False
    for num_loops in (1, 2, 3):
        model.config.num_loops = num_loops
        terms.append(model(**batch).reconstruction_loss)
    assert len({round(term.item(), 3) for term in terms}) == 3
    torch.testing.assert_close(trained.loss, terms[2] + (terms[0] + terms[1]) / 2 + 0.3 * trained.kl)
    model.config.loop_loss = True
    evaluated = model.eval()(**batch)
    torch.testing.assert_close(reported, [evaluated.reconstruction_loss, evaluated.kl])
    torch.testing.assert_close(evaluated.loss, terms[2] + 0.3 * trained.kl)


def test_the_given_number_of_items_is_the_normaliser():
    model, (batch, noise) = tiny_model(), loss_batch()
    num_labels = (batch["labels"] != -100).sum().item()
    own = model(**batch, **noise)
    for num_items in (num_labels, torch.tensor(3 * num_labels)):
        given = model(**batch, **noise, num_items_in_batch=num_items)
        for name in ("loss", "reconstruction_loss", "kl"):
            torch.testing.assert_close(given[name] * num_items, own[name] * num_labels)
        assert torch.equal(given.kl_per_latent, own.kl_per_latent)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_give_the_gradient_of_the_whole_batch(objective):
    """Also with rows that are all context in one of them, as the Trainer accumulates."""
    model = tiny_model(objective=objective, kl_weight=0.1).train().double()
    batch, noise = loss_batch(batch_size=8)
    noise = {name: value.double() for name, value in noise.items()}
    num_items = (batch["labels"] != -100).sum()
    model(**batch, **noise, num_items_in_batch=num_items).loss.backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for start in range(0, 8, 2):
        part = {name: value[start : start + 2] for name, value in (batch | noise).items()}
        model(**part, num_items_in_batch=num_items).loss.backward()
    for name, parameter in model.named_parameters():
        scale = whole[name].abs().max().clamp(min=1)
        torch.testing.assert_close(parameter.grad / scale, whole[name] / scale, rtol=0, atol=1e-6, msg=name)


def test_the_kl_weight_warms_up_over_training_passes_and_goes_on_after_loading(tmp_path):
    model = tiny_model(kl_weight=2.0, kl_warmup_steps=4).train()
    batch, noise = loss_batch()

    def factor(model):
        output = model(**batch, **noise)
        return ((output.loss - output.reconstruction_loss) / output.kl).item()

    # kl_weight times the cube of the share of the warm-up that is done: 1/4, 2/4, 3/4, 1.
    assert [factor(model) for _ in range(2)] == pytest.approx([2 / 64, 2 * 8 / 64], rel=1e-4)
    model.eval()
    assert factor(model) == pytest.approx(2, rel=1e-4)  # evaluation has the full weight, and does not count
    model(digits(2, 3))
    with torch.no_grad():  # nor does a pass in training mode that is no step
        assert factor(model.train()) == pytest.approx(2 * 8 / 64, rel=1e-4)
    model.save_pretrained(tmp_path)
    assert model.state_dict()["latent_encoder.kl_warmup_progress"] == 2
    loaded = VMDForMaskedDiffusion.from_pretrained(tmp_path).train()
    expected = [2 * 27 / 64, 2, 2, 2]
    assert [factor(loaded) for _ in range(4)] == pytest.approx(expected, rel=1e-4)
    assert [factor(model.train()) for _ in range(4)] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"block_size": 3, "prior": "learned"}])
def test_huge_log_variances_have_a_finite_kl(settings, dtype):
    model, input_ids = tiny_model(**settings).to(dtype), digits(3, 6)
    for signs in (1, -1):
        with torch.no_grad():
            model.latent_encoder.out_proj.weight.zero_()
            model.latent_encoder.out_proj.bias[4:] = signs * 6e4
            if model.model.latent_prior is not None:
                model.model.latent_prior.out_proj.weight.zero_()
                model.model.latent_prior.out_proj.bias[4:] = -signs * 6e4
        output = model(input_ids, labels=input_ids, noise_seeds=torch.arange(3))
        assert output.kl.isfinite() and output.kl > 1
        if dtype == torch.float32:  # such a z is beyond what layers in float16 can take
            assert output.loss.isfinite()
            output.loss.backward()
            assert gradients_are_finite(model)


def gradients_are_finite(model):
    return all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_of_context_costs_nothing(objective, training):
    model = tiny_model(objective=objective, kl_warmup_steps=3).train(training)
    input_ids = digits(3, 5)
    output = model(input_ids=input_ids, labels=torch.full_like(input_ids, -100))
    for name in ("loss", "reconstruction_loss", "kl"):
        assert output[name] == 0
    assert output.kl_per_latent.tolist() == [0, 0, 0]
    assert output.posterior_shift.eq(0).all()
    output.loss.backward()
    assert gradients_are_finite(model)


def test_a_window_of_context_costs_nothing_when_the_trainer_counts_no_label():
    model, input_ids = tiny_model().train(), digits(3, 5)
    output = model(input_ids=input_ids, labels=torch.full_like(input_ids, -100), num_items_in_batch=torch.tensor(0))
    assert output.loss == 0
    output.loss.backward()
    assert gradients_are_finite(model)


def test_rows_in_which_nothing_is_masked_cost_nothing():
    model, input_ids = tiny_model().train(), digits(3, 5)
    noise = explicit_noise(3, 5) | {"position_noise": torch.ones(3, 5)}
    output = model(input_ids=input_ids, labels=input_ids, **noise)
    assert output.loss == 0 and output.kl == 0
    output.loss.backward()
    assert gradients_are_finite(model)

    noise["position_noise"][1] = 0.0  # now the row in the middle is masked
    together = model(input_ids=input_ids, labels=input_ids, **noise)
    one = slice(1, 2)
    alone = model(input_ids=input_ids[one], labels=input_ids[one], **{key: value[one] for key, value in noise.items()})
    torch.testing.assert_close(together.loss * 15, alone.loss * 5)
    assert (together.kl_per_latent != 0).tolist() == [False, True, False]
    assert (together.posterior_shift != 0).any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_row_of_padding_costs_nothing(implementation):
    model, (input_ids, mask) = tiny_model().train(), padded_batch()
    model.set_attn_implementation(implementation)
    mask[1] = 0
    labels = input_ids.masked_fill(mask == 0, -100)
    noise = explicit_noise(2, 7)
    output = model(input_ids=input_ids, attention_mask=mask, labels=labels, **noise)
    output.loss.backward()
    assert gradients_are_finite(model)
    alone = model(
        input_ids=input_ids[:1], attention_mask=mask[:1], labels=labels[:1], **{k: v[:1] for k, v in noise.items()}
    )
    torch.testing.assert_close(output.loss, alone.loss)


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_evaluation_depends_on_nothing_but_the_row(objective, block_size):
    model, input_ids = tiny_model(objective=objective, block_size=block_size), digits(6, 5)
    first = model(input_ids=input_ids, labels=input_ids)
    torch.manual_seed(99)
    second = model(input_ids=input_ids, labels=input_ids)
    for name in ("loss", "reconstruction_loss", "kl", "kl_per_latent", "posterior_shift"):
        assert torch.equal(first[name], second[name])

    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = model(input_ids=input_ids[order], labels=input_ids[order])
    torch.testing.assert_close(shuffled.kl_per_latent, first.kl_per_latent[order])
    torch.testing.assert_close(shuffled.posterior_shift, first.posterior_shift[order])
    torch.testing.assert_close(shuffled.loss, first.loss)
    alone = [model(input_ids=row[None], labels=row[None]) for row in input_ids]
    torch.testing.assert_close(torch.cat([output.kl_per_latent for output in alone]), first.kl_per_latent)
    torch.testing.assert_close(sum(output.loss for output in alone) / 6, first.loss)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_noise_comes_from_the_default_generator(objective):
    model, input_ids = tiny_model(objective=objective).train(), digits(6, 5)

    def loss(seed):
        torch.manual_seed(seed)
        return model(input_ids=input_ids, labels=input_ids).loss.item()

    assert loss(1) == loss(1)
    assert len({loss(seed) for seed in range(5)}) == 5


def spy_on_noisy_inputs(model):
    """The list to which every x_t is appended that the denoiser is called with."""
    seen = []

    def record(module, args, kwargs):
        seen.append((args[0] if args else kwargs["input_ids"]).clone())

    model.model.register_forward_pre_hook(record, with_kwargs=True)
    return seen


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_context_and_padding_are_never_masked_and_everything_else_is(objective, training):
    model = tiny_model(objective=objective).train(training)
    seen, ever_masked = spy_on_noisy_inputs(model), 0
    for seed in range(40):
        batch, _ = loss_batch()
        fresh = batch["attention_mask"].bool()
        batch["input_ids"] = torch.where(fresh, digits(6, 7, seed=seed), PAD)
        batch["labels"] = torch.where(batch["labels"] != -100, batch["input_ids"], -100)
        with torch.no_grad():
            model(**batch)
        x_t = seen[-1]
        masked = x_t == MASK
        assert not (masked & (batch["labels"] == -100)).any()
        assert torch.equal(x_t[~masked], batch["input_ids"][~masked])
        ever_masked = ever_masked + masked.int()
    assert len(seen) == 40
    assert torch.equal(ever_masked > 0, batch["labels"] != -100)


def test_times_are_stratified_over_the_batch_in_training():
    """A row's share of masked tokens tells its time: of 8 rows, sorted, row i has (i + 1/2)/8 in the mean."""
    model, input_ids = tiny_model(latent_size=0, **POSITIONS["rotary"]).train(), digits(8, 400)
    seen = spy_on_noisy_inputs(model)
    with torch.no_grad():
        for _ in range(10):
            model(input_ids=input_ids, labels=input_ids)
    shares = (torch.stack(seen) == MASK).float().mean(-1).sort(-1).values
    # Standard error of one share: 1/sqrt(4 * 400) = 0.025 from the masks and 1/8/sqrt(12) = 0.036 from the time.
    middle = (torch.arange(8) + 0.5) / 8
    assert (shares - middle).abs().max() < 1 / 16 + 4 * 0.025
    assert (shares.mean(0) - middle).abs().max() < 4 * math.hypot(0.025, 0.036) / 10**0.5


@pytest.mark.parametrize("training", [False, True])
def test_time_epsilon_is_the_smallest_time_of_the_paper_s_objective(training):
    input_ids = digits(8, 6)
    for objective, all_masked in (("vmd", True), ("per_step", False)):
        model = tiny_model(objective=objective, time_epsilon=0.9999).train(training)
        seen = spy_on_noisy_inputs(model)
        model(input_ids=input_ids, labels=input_ids)
        assert (seen[0] == MASK).all() == all_masked


def test_given_times_are_taken_as_they_are():
    model, input_ids = tiny_model(latent_size=0, time_epsilon=0.5), digits(1, 4)
    noise = {"times": torch.tensor([0.125]), "position_noise": torch.tensor([[0.1, 0.2, 0.9, 0.2]])}
    output = model(input_ids=input_ids, labels=input_ids, **noise)
    expected = 8 * cross_entropy_of(model, input_ids[0], [0], [0]) / 4  # weight 1/t, 4 labelled tokens
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def test_given_noise_decides_what_is_masked():
    model = tiny_model().train()
    seen, input_ids = spy_on_noisy_inputs(model), digits(2, 4)
    wanted = torch.tensor([[True, False, False, True], [False, True, True, True]])
    position_noise = 1 - wanted.float()
    for time in (1e-3, 0.5, 1.0):
        model(
            input_ids=input_ids, labels=input_ids, times=torch.full((2,), time), position_noise=position_noise
        ).loss.backward()
        assert torch.equal(seen[-1], input_ids.masked_fill(wanted, MASK))


def test_inputs_and_labels_are_left_as_they_were():
    batch, noise = loss_batch()
    before = copy.deepcopy(batch | noise)
    tiny_model().train()(**batch, **noise).loss.backward()
    for name, value in (batch | noise).items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("settings", [{}, PER_POSITION])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_reconstruction_reaches_the_latent_encoder(objective, settings):
    """Through z itself: the KL term is switched off."""
    model = tiny_model(objective=objective, kl_weight=0, **settings).train()
    batch, noise = loss_batch(latent_size=model.config.latent_size)
    model(**batch, **noise).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_collapsed_start_still_teaches_the_modulation():
    """At the start z has no effect, so the encoder gets no gradient from it, but the modulation does."""
    torch.manual_seed(0)
    model = VMDForMaskedDiffusion(tiny_config(kl_weight=0)).train()
    batch, noise = loss_batch()
    model(**batch, **noise).loss.backward()
    for layer in model.model.layers:
        assert layer.modulation.weight.grad.abs().max() > 0


# ---------------------------------------------------------------------------------------------------------------------
# The posterior
# ---------------------------------------------------------------------------------------------------------------------


def test_the_posterior_tells_visible_from_revealed_from_still_masked():
    model, row = tiny_model(), torch.tensor([1, 2, 3, 4])
    states = [([0], [0]), ([0, 1], [0]), ([0, 1], [0, 1]), ([0, 1], [1]), ([0, 1, 2], [0])]
    means = [posterior_of_row(model, row, *state)[0] for state in states]
    for first, second in itertools.combinations(means, 2):
        assert (first - second).abs().max() > 1e-3


def test_the_posterior_pools_over_the_tokens_that_are_revealed():
    """Without attention each token speaks for itself: the posterior is the mean over those revealed, nothing else."""
    model, row = tiny_model(), torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        for layer in model.latent_encoder.layers:
            layer.attention.o_proj.weight.zero_()
    both = posterior_of_row(model, row, [0, 1, 2], [0, 2])
    alone = [posterior_of_row(model, row, [0, 1, 2], [position]) for position in (0, 2)]
    others_changed = posterior_of_row(model, torch.tensor([1, 9, 3, 8]), [0, 1, 2], [0, 2])
    for index in range(2):  # mean and log-variance are linear in what is pooled
        torch.testing.assert_close(both[index], (alone[0][index] + alone[1][index]) / 2)
        torch.testing.assert_close(both[index], others_changed[index])


def test_a_latent_adds_to_the_input_of_each_position_what_it_says_of_that_one():
    model, x_t, z = tiny_model(latent_input="layers_and_positions"), some_masked(digits(2, 5)), normal(2, 4)
    without, with_latent = (model(x_t, latents=latents, output_hidden_states=True) for latents in (0 * z, z))
    conditioner, weight = model.model.conditioner, model.model.position_inputs.weight
    expected = ((conditioner(z) - conditioner(0 * z)) @ weight.T).view(2, 16, 32)[:, :5]
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(with_latent.hidden_states[0] - without.hidden_states[0], expected)


def test_a_slice_of_a_latent_adds_to_the_input_of_its_position_alone():
    model, x_t, z = tiny_model(**PER_POSITION), some_masked(digits(2, 5)), normal(2, 48)
    without, with_latent = (model(x_t, latents=latents, output_hidden_states=True) for latents in (0 * z, z))
    conditioner, weight = model.model.conditioner, model.model.position_inputs.weight
    said = (conditioner(z) - conditioner(0 * z)) @ weight.T  # (batch, positions, hidden)
    difference = with_latent.hidden_states[0] - without.hidden_states[0]
    for position in range(5):
        assert said[:, position].abs().max() > 0.01
        torch.testing.assert_close(difference[:, position], said[:, position])
        other = z.clone()
        other[:, 3 * position : 3 * position + 3] = 0
        changed = (conditioner(other) != conditioner(z)).any(-1)[0]
        assert changed.nonzero().tolist() == [[position]]


@pytest.mark.parametrize("settings", [{"latent_input": "layers_and_positions"}, PER_POSITION])
def test_with_latents_in_inputs_rows_have_a_longest_length_but_blocks_do_not(settings):
    with pytest.raises(ValueError, match=r"max_position_embeddings = 16.*got 17"):
        tiny_model(**settings)(digits(1, 17))
    assert tiny_model(block_size=4, **settings, **POSITIONS["rotary"])(digits(1, 17)).logits.shape == (1, 17, 12)


def test_the_posterior_of_a_slice_is_read_off_the_token_at_its_position():
    """One map for all positions, of the state after the layers; where nothing is revealed, N(0, I)."""
    model = tiny_model(**PER_POSITION, position_embedding_type="none")
    encoder = model.latent_encoder
    with torch.no_grad():
        for layer in encoder.layers:
            layer.attention.o_proj.weight.zero_()  # a state is of its own token only
    row, other = torch.tensor([5, 2, 5, 4]), torch.tensor([5, 7, 5, 4])
    both = [torch.stack(posterior_of_row(model, ids, [0, 1, 2], [0, 1, 2])).view(2, 16, 3) for ids in (row, other)]
    for of_row, of_other in zip(*both, strict=True):
        assert (of_row[0] - of_row[1]).abs().max() > 0.1 and (of_other[1] - of_row[1]).abs().max() > 0.1
        torch.testing.assert_close(of_row[0], of_row[2])
        torch.testing.assert_close(of_other[[0, 2]], of_row[[0, 2]])
        assert (of_row[3:] == 0).all()
    for statistic in posterior_of_row(model, row, [0, 1, 2], [1]):
        assert (statistic.view(16, 3)[[0, 2]] == 0).all() and statistic.view(16, 3)[1].abs().max() > 0.1


def test_the_posterior_reads_the_whole_clean_row():
    model = tiny_model()
    first = posterior_of_row(model, torch.tensor([1, 2, 3, 4]), [0, 1], [0])[0]
    for position in range(4):
        other = torch.tensor([1, 2, 3, 4])
        other[position] = 9
        assert (posterior_of_row(model, other, [0, 1], [0])[0] - first).abs().max() > 1e-3


def test_where_nothing_is_revealed_the_posterior_is_the_prior():
    mean, log_variance = posterior_of_row(tiny_model(), torch.tensor([1, 2, 3, 4]), [0, 1], [])
    assert mean.eq(0).all() and log_variance.eq(0).all()


def test_the_posterior_of_per_sample_is_the_same_at_every_step():
    """One z has to serve them all; under `per_step` it may look at the step."""
    input_ids, noise = digits(1, 4).expand(6, 4), explicit_noise(6, 4)
    noise["position_noise"] = noise["position_noise"][:1].expand(6, 4)
    noise["times"] = (torch.arange(6) + 0.5) / 6
    for objective, same in (("per_sample", True), ("per_step", False)):
        output = tiny_model(objective=objective, objective_steps=[3])(input_ids=input_ids, labels=input_ids, **noise)
        difference = (output.posterior_shift - output.posterior_shift[:1]).abs().max()
        assert (difference < 1e-5) == same


# ---------------------------------------------------------------------------------------------------------------------
# The expected loss, by enumeration
# ---------------------------------------------------------------------------------------------------------------------


def cross_entropy_of(model, row, masked, revealed, latents=None):
    """Sum of -log p over the revealed positions of one row, in the state with `masked` masked."""
    x_t = row.clone()
    x_t[list(masked)] = MASK
    with torch.no_grad():
        log_probability = model(x_t[None], latents=latents).logits[0].log_softmax(-1)
    return -sum(log_probability[position, row[position]].item() for position in revealed)


def test_the_expected_vmd_loss_weights_mask_sets_by_their_size():
    """E over t and masks of (1/t) sum CE = sum over k of f(k)/k, f(k) = mean over the sets of k masked tokens.

    Because the integral of t^(k-1) (1-t)^(n-k) over t, times the n-choose-k sets, is 1/k.
    """
    model, row = tiny_model(latent_size=0, time_epsilon=1e-6, **POSITIONS["rotary"]).train(), torch.tensor([9, 9, 8])
    cost_of_a_token = []
    for size in (1, 2, 3):
        sets = list(itertools.combinations(range(3), size))
        cost_of_a_token.append(sum(cross_entropy_of(model, row, masked, masked) for masked in sets) / len(sets) / size)
    expected = sum(cost_of_a_token) / 3  # nats a labelled token
    # These weights guess this row well from two of its tokens, badly from none: so the test sees how often each size
    # is drawn, and not only the weight.
    assert cost_of_a_token[2] > 2 * cost_of_a_token[0]

    batch = row.expand(2000, 3)
    with torch.no_grad():
        losses = torch.stack([model(input_ids=batch, labels=batch).loss for _ in range(20)])
    error = losses.std() / 20**0.5
    assert error < 0.01 * expected
    assert abs(losses.mean().item() - expected) < 4 * error


@pytest.mark.parametrize(
    "latent", [{"latent_size": 0}, {}, {"objective": "per_step"}, {"objective": "per_step", "latent_min_tokens": 2}]
)
@pytest.mark.parametrize("objective_steps", [[1], [2], [3], [1, 2, 4]])
def test_the_expected_few_step_loss_is_the_bound(objective_steps, latent):
    """Over a grid of times and all six orders of three tokens, the mean is exactly the bound of the sampler."""
    model = tiny_model(**{"objective": "per_sample", "objective_steps": objective_steps} | latent)
    mdm = of_the_same_weights(model, latent_size=0)
    config, row, latent_noise = model.config, torch.tensor([4, 7, 1]), normal(4)
    orders = list(itertools.permutations(range(3)))
    expected = 0.0
    for num_steps, order in itertools.product(objective_steps, orders):
        row_steps = min(num_steps, 3)
        cuts = [step * 3 // row_steps for step in range(row_steps + 1)]
        for start, end in itertools.pairwise(cuts):
            masked, revealed = order[start:], order[start:end]
            if config.latent_size == 0 or len(revealed) < config.latent_min_tokens:
                expected += cross_entropy_of(mdm, row, masked, revealed)
                continue
            flags = (order, order) if config.objective == "per_sample" else (masked, revealed)
            with torch.no_grad():
                mean, log_variance = posterior_of_row(model, row, *flags)
            latents = (mean + (0.5 * log_variance).exp() * latent_noise)[None]
            expected += cross_entropy_of(model, row, masked, revealed, latents)
    expected /= len(objective_steps) * len(orders) * 3

    cells = 6 * len(objective_steps)  # each T has six cells of time, whichever of 1, 2 or 3 steps it takes
    times = (torch.arange(cells) + 0.5) / cells
    ranks = torch.empty(6, 3)
    for index, order in enumerate(orders):
        ranks[index, list(order)] = torch.tensor([0.1, 0.5, 0.9])
    batch = row.expand(6 * cells, 3)
    noise = {"times": times.repeat(6), "position_noise": ranks.repeat_interleave(cells, 0)}
    if config.latent_size:
        noise["latent_noise"] = latent_noise.expand(len(batch), -1)
    output = model(input_ids=batch, labels=batch, **noise)
    assert output.reconstruction_loss.item() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def changed(tensor, position, value):
    tensor = tensor.clone()
    tensor[position] = value
    return tensor


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
LABEL_ERRORS = {
    "label on padding": (
        {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])},
        "labels must be -100 where attention_mask is 0",
    ),
    "mask token": ({"input_ids": changed(IDS, (0, 1), MASK), "labels": changed(IDS, (0, 1), MASK)}, "mask token"),
    "pad token": ({"input_ids": changed(IDS, (1, 2), PAD), "labels": changed(IDS, (1, 2), PAD)}, "pad token"),
    "masked by a collator": ({"input_ids": changed(IDS, (0, 1), MASK)}, r"collator.*mlm=False"),
    "other token": ({"labels": changed(IDS, (0, 1), 7)}, "labels must equal input_ids"),
    "label shape": ({"labels": IDS[:, :2]}, r"labels must have shape \(2, 3\), got \(2, 2\)"),
    "latents": ({"latents": torch.zeros(2, 4)}, "latents must be None when labels are given"),
    "times": ({"times": torch.ones(3)}, r"times must have shape \(2,\), got \(3,\)"),
    "position noise": ({"position_noise": torch.ones(2)}, r"position_noise must have shape \(2, 3\), got \(2,\)"),
    "latent noise": ({"latent_noise": torch.ones(2, 3)}, r"latent_noise must have shape \(2, 4\), got \(2, 3\)"),
    "labels held back": ({"labels": None, "num_items_in_batch": 6}, "label_smoothing_factor"),
    "no inputs": ({"input_ids": None}, r"input_ids must have shape \(batch, length\), got None"),
    "no rows": ({"input_ids": IDS[:0], "labels": IDS[:0]}, r"at least one row and one column, got shape \(0, 3\)"),
    "no columns": ({"input_ids": IDS[:, :0], "labels": IDS[:, :0]}, r"one row and one column, got shape \(2, 0\)"),
    "slip of the pen": ({"position_noize": IDS}, "forward knows no argument 'position_noize'"),
}


@pytest.mark.parametrize("case", list(LABEL_ERRORS))
@pytest.mark.parametrize("training", [False, True])
def test_misuse_of_the_loss_is_an_error(case, training):
    arguments, message = LABEL_ERRORS[case]
    model = tiny_model().train(training)
    model(input_ids=IDS, labels=IDS)
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": IDS, "labels": IDS} | arguments))


def test_where_python_must_not_wait_for_labels_the_device_checks_them(monkeypatch):
    """As on an accelerator: the check is an operation of the device's own, whose error comes later."""
    model, checks = tiny_model(), []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch, "_assert_async", lambda holds, message: checks.append((bool(holds), message)))
    for labels, wrong in ((IDS, []), (changed(IDS, (0, 1), 7), ["labels must equal input_ids where"])):
        checks.clear()
        check_labels(IDS, labels, torch.ones_like(IDS), model.config)
        assert len(checks) == 3
        assert [message[: len(wrong[0])] for holds, message in checks if not holds] == wrong


def test_denoising_knows_its_arguments_too():
    for model in (tiny_model(), tiny_model().model):
        model(IDS, inputs_embeds=None, output_router_logits=None, use_cache=False)
        with pytest.raises(ValueError, match="forward knows no argument 'latent', 'temperature'"):
            model(IDS, temperature=2, latent=torch.zeros(2, 4))
        with pytest.raises(ValueError, match="at least one row and one column"):
            model(IDS[:, :0])


def test_a_loss_needs_a_mask_token_and_denoising_does_not():
    model = tiny_model(mask_token_id=None)
    assert model(IDS).logits[..., MASK].isfinite().all()
    with pytest.raises(ValueError, match=r"mask_token_id must be set.*None"):
        model(input_ids=IDS, labels=IDS)


def test_mask_and_pad_tokens_may_be_context():
    """Under -100 anything goes: the rule is about what has to be predicted."""
    input_ids = torch.tensor([[1, MASK, 3, PAD]])
    output = tiny_model()(input_ids=input_ids, labels=torch.tensor([[1, -100, 3, -100]]))
    assert output.loss.isfinite()


def test_a_pad_token_that_ends_texts_may_be_a_label():
    input_ids = torch.tensor([[1, 2, 9]])
    assert tiny_model(pad_token_id=9, eos_token_id=9)(input_ids=input_ids, labels=input_ids).loss.isfinite()
