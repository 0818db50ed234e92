"""Block diffusion around language models that somebody else trained, causal and masked ones."""

from pathlib import Path

import peft
import pytest
import torch
from accelerate import cpu_offload
from helpers import normal, padded, randomise, seeded, uniform, unpadded
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BloomConfig,
    DistilBertConfig,
    EuroBertConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    SmolLM3Config,
)

from vmd_hf import VMDConfig, VMDForMaskedDiffusion, nelbo
from vmd_hf.blocks_vmd import PADDING
from vmd_hf.data.synthetic import synthetic_tokenizer
from vmd_hf.data.text import bpe_tokenizer
from vmd_hf.hub import check_tokenizer, export_model, load_tokenizer
from vmd_hf.recipes import parse
from vmd_hf.training_run import train

VOCABULARY, EOS, MASK = 20, 3, 20  # the mask token is one more
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
    "pad_token_id": None,
    "bos_token_id": 2,
    "eos_token_id": EOS,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 8}
CAUSAL = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "qwen3-moe": Qwen3MoeConfig(**GEMMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mistral": MistralConfig(**GROUPED),
    "smollm3": SmolLM3Config(**GROUPED),
    "gpt2": GPT2Config(**SIZES),
    "gemma": GemmaConfig(**GEMMA),
    "gemma2": Gemma2Config(**GEMMA, query_pre_attn_scalar=8, sliding_window=12),
}
MASKED = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES | {"pad_token_id": 1, "max_position_embeddings": 26}),
    "eurobert": EuroBertConfig(**SIZES, mask_token_id=4),
}
each_family = pytest.mark.parametrize("family", CAUSAL)


def causal_lm(family="llama", **changes):
    config = CAUSAL[family].__class__(**CAUSAL[family].to_dict() | changes)
    torch.manual_seed(0)
    return randomise(AutoModelForCausalLM.from_config(config), std=0.4).eval()


def around(family, **settings):
    """A model in blocks of 3, by default without a latent, around a causal or a masked language model."""
    settings = {"block_size": 3, "latent_size": 0, "kl_warmup_steps": 0, "conditioning_size": 8} | settings
    if family not in MASKED:
        vmd = VMDForMaskedDiffusion.from_causal_lm(causal_lm(family), **settings)
    else:
        masked_lm = AutoModelForMaskedLM.from_config(MASKED[family])
        vmd = VMDForMaskedDiffusion.from_masked_lm(masked_lm, mask_token_id=4, **settings)
    return randomise(vmd).eval()


# By causal models with and without the shift, and by masked ones.
KINDS = {
    "llama": {"family": "llama"},
    "gpt2-unshifted": {"family": "gpt2", "token_shift": False},
    "bert": {"family": "bert"},
    "bert-shifted": {"family": "bert", "token_shift": True},
    "roberta": {"family": "roberta"},
    "eurobert": {"family": "eurobert"},
}
LATENTS = {
    "none": {"latent_size": 0},
    "chain": {"latent_size": 3, "latent_type": "chain"},
    "gaussian": {"latent_size": 4, "latent_type": "gaussian"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_latent = pytest.mark.parametrize("latent", LATENTS)


def tokens(*shape, seed=0):
    return torch.randint(5, VOCABULARY, shape, generator=seeded(seed))


# --- the golden test: blocks of one token are the causal model -------------------------------------------------------


@each_family
@torch.no_grad()
def test_blocks_of_one_token_are_the_causal_model(family):
    causal, ids = causal_lm(family), tokens(3, 9)
    expected = causal(ids).logits
    new = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    continued = causal.generate(ids[:, :4], attention_mask=torch.ones(3, 4), pad_token_id=0, **new)
    model = VMDForMaskedDiffusion.from_causal_lm(causal, block_size=1, latent_size=0)
    assert model.model.causal_lm is causal and not model.training
    logits = model(ids).logits
    torch.testing.assert_close(logits[:, 1:, :VOCABULARY], expected[:, :-1], rtol=1e-5, atol=1e-5)
    assert (logits[..., MASK] == -torch.inf).all()
    labels = ids.clone()
    labels[:, 0] = -100  # context, as a BOS token is
    losses = cross_entropy(expected[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(-1)
    torch.testing.assert_close(nelbo(model, ids, labels=labels).nelbo, losses, rtol=1e-5, atol=1e-5)
    for use_cache in (True, False):
        assert torch.equal(model.generate(ids[:, :4], use_cache=use_cache, **new), continued)


@torch.no_grad()
def test_prompts_of_any_length_continue_as_the_causal_model_does():
    causal = causal_lm()
    rows = [tokens(5, seed=1), tokens(2, seed=2)]
    ids, mask = padded([row.tolist() for row in rows], "right")
    new = {"max_new_tokens": 6, "eos_token_id": None}
    expected = [causal.generate(row[None], do_sample=False, pad_token_id=0, **new)[0].tolist() for row in rows]
    model = VMDForMaskedDiffusion.from_causal_lm(causal, block_size=1, latent_size=0)
    output = model.generate(ids, attention_mask=mask, **new)
    assert [row.tolist()[-len(other) :] for row, other in zip(output, expected, strict=True)] == expected


def test_a_text_ends_with_the_causal_models_own_token():
    model = VMDForMaskedDiffusion.from_causal_lm(causal_lm(), block_size=2, latent_size=0)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == EOS
    model.model.causal_lm.lm_head.weight.data[EOS] = 100 * model.model.causal_lm.lm_head.weight.data.mean(0)
    output = model.generate(tokens(8, 3), max_new_tokens=8)
    ended = (output[:, 3:] == EOS).any(-1)
    assert ended.any()
    after = (output[:, 3:] == EOS).cumsum(-1) > 0
    assert (output[:, 3:][after] == EOS).all()  # what follows is padding


# --- the attention pattern, against one pass of the model itself under a mask made by loops --------------------------


def by_one_pass(lm, x_0, x_t, width, causal):
    """Hidden states of noisy tokens, (batch, length, hidden), and of clean ones: [clean, noisy] in one sequence."""
    length = x_0.shape[1]
    allowed = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for query in range(length):
        for key in range(length):
            of_query, of_key = query // width, key // width
            sees = key <= query if causal else of_key <= of_query
            allowed[query, key] = sees
            allowed[length + query, key] = of_key < of_query
            allowed[length + query, length + key] = of_key == of_query
    positions = torch.arange(length).repeat(2)[None]
    if lm.config.model_type == "roberta":
        positions = positions + lm.config.pad_token_id + 1
    mask = torch.zeros(1, 1, 2 * length, 2 * length).masked_fill(~allowed, torch.finfo(torch.float).min)
    lm.set_attn_implementation("eager")
    states = lm.base_model(torch.cat([x_0, x_t], 1), attention_mask=mask, position_ids=positions, use_cache=False)
    clean, noisy = states.last_hidden_state.split(length, dim=1)
    return noisy, clean


@each_kind
@torch.no_grad()
def test_losses_and_logits_are_those_of_one_pass_under_a_mask_by_hand(kind):
    model = around(**KINDS[kind])
    lm, mask_id, shift = model.model.language_model, model.config.mask_token_id, model.config.token_shift
    ids, masked = tokens(2, 9), uniform(2, 9) < 0.6
    x_t = ids.masked_fill(masked, mask_id)
    logits = model(x_t).logits
    loss = model(ids, labels=ids, times=torch.full((2, 3), 0.5), position_noise=1 - masked.float()).loss
    causal = model.config.backbone_type == "causal_lm"
    # Logits have earlier blocks as they stand, and losses the clean ones.
    for clean, check in ((x_t, "logits"), (ids, "loss")):
        noisy, states = by_one_pass(lm, clean, x_t, 3, causal)
        if shift:
            left = torch.cat([noisy[:, :1], noisy[:, :-1]], 1)
            left[:, [3, 6]] = states[:, [2, 5]]
            noisy = left
        expected = model.compute_logits(noisy)
        if check == "logits":
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        else:
            losses = cross_entropy(expected.transpose(1, 2), ids, reduction="none")
            torch.testing.assert_close(loss, (losses * masked).sum() / 0.5 / 18, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_documents_first_token_is_predicted_from_its_own_masks_state():
    model = around("llama", block_size=2)
    alone = model.model.causal_lm(torch.tensor([[MASK]])).logits[0, 0, :VOCABULARY]
    ids = torch.cat([torch.tensor([[MASK]]), tokens(1, 1), torch.full((1, 1), MASK), tokens(1, 2, seed=1)], dim=1)
    positions = torch.tensor([[0, 0, 0, 1, 2]])  # documents of one, one and three tokens
    logits = model(ids, position_ids=positions).logits[0, :, :VOCABULARY]
    torch.testing.assert_close(logits[0], alone)
    first_two = model.model.causal_lm(  # which see one another
        ids[:, 2:4], attention_mask=torch.zeros(1, 1, 2, 2), position_ids=torch.tensor([[0, 1]])
    ).logits[0, 0, :VOCABULARY]
    torch.testing.assert_close(logits[[2, 3]], first_two.expand(2, -1))
    # A document that begins within a block: what is on its left there is padding.
    later = model(ids[:, 2:4], position_ids=torch.tensor([[1, 2]])).logits[0]
    own = model.model.causal_lm(ids[:, 2:3], position_ids=torch.tensor([[1]])).logits[0, 0]
    torch.testing.assert_close(later[0, :VOCABULARY], own[:VOCABULARY])


# --- what must not matter --------------------------------------------------------------------------------------------


@each_latent
@each_kind
@torch.no_grad()
def test_neither_padding_nor_packing_changes_anything(kind, latent):
    model = around(**KINDS[kind], **LATENTS[latent])
    rows = [tokens(7, seed=1), tokens(4, seed=2)]
    noise = [uniform(7, seed=3), uniform(4, seed=4)]
    ids = [row.masked_fill(part < 0.5, model.config.mask_token_id) for row, part in zip(rows, noise, strict=True)]
    alone = [model(row[None]).logits[0] for row in ids]
    for side in ("left", "right"):
        together, mask = padded([row.tolist() for row in ids], side, width=8)
        logits = model(together, attention_mask=mask).logits
        for index in range(2):
            torch.testing.assert_close(logits[index, mask[index] == 1], alone[index], rtol=0, atol=1e-4)
    positions = torch.cat([torch.arange(7), torch.arange(4)])[None]
    packed = model(torch.cat(ids)[None], position_ids=positions).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-4)

    def loss_of(rows, noise, blocks, **inputs):
        fixed = {"times": torch.full((1, blocks), 0.5), "position_noise": noise[None]}
        if latent == "gaussian":
            fixed["latent_noise"] = normal(1, 1, 4).expand(-1, blocks, -1)
        return model(rows[None], labels=rows[None], **fixed, **inputs).loss

    losses = [loss_of(rows[0], noise[0], 3), loss_of(rows[1], noise[1], 2)]
    packed = loss_of(torch.cat(rows), torch.cat(noise), 5, position_ids=positions)
    torch.testing.assert_close(packed, (7 * losses[0] + 4 * losses[1]) / 11, rtol=1e-4, atol=1e-4)


@each_latent
@each_kind
def test_generation_with_a_cache_is_generation_without(kind, latent):
    model = around(**KINDS[kind], **LATENTS[latent])
    ids, mask = padded([tokens(5, seed=1).tolist(), tokens(2, seed=2).tolist(), tokens(1, seed=3).tolist()], "left")
    settings = {"attention_mask": mask, "max_new_tokens": 8, "num_steps": 2, "do_sample": True, "eos_token_id": None}
    outputs = [
        model.generate(ids, generator=[seeded(row) for row in range(3)], **settings, **cache)
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    alone = model.generate(ids[1:2, 3:], generator=[seeded(1)], **settings | {"attention_mask": None})
    assert alone[0].tolist() == unpadded(outputs[0], torch.cat([mask, torch.ones_like(outputs[0][:, 5:])], 1))[1]


@each_kind
@torch.no_grad()
def test_one_step_of_generation_takes_the_most_probable_tokens_of_forward(kind):
    model = around(**KINDS[kind])
    gaps, mask_id = tokens(2, 8), model.config.mask_token_id
    gaps[0, 4:6] = gaps[1, 1] = gaps[1, 7] = mask_id
    output = model.generate(gaps, num_steps=1, output_confidences=True, return_dict_in_generate=True)
    expected, confidences = gaps.clone(), torch.ones(2, 8)
    for block in range(3):  # each of them given those before
        best = model(expected).logits.softmax(-1).max(-1)
        is_open = (expected == mask_id) & (torch.arange(8) // 3 == block)
        expected[is_open], confidences[is_open] = best.indices[is_open], best.values[is_open]
    assert torch.equal(output.sequences, expected)
    torch.testing.assert_close(output.confidences, confidences, rtol=1e-4, atol=1e-5)


@each_kind
def test_likelihoods_of_a_batch_are_those_of_its_rows(kind):
    """Given their first blocks, in which masks that see nothing else could say the same of themselves."""
    model = around(**KINDS[kind], **LATENTS["chain"])
    rows = [tokens(8, seed=1), tokens(6, seed=2)]
    given = [torch.cat([torch.full((3,), -100), row[3:]]) for row in rows]
    ids, mask = padded([row.tolist() for row in rows], "left")
    labels, _ = padded([row.tolist() for row in given], "left", fill=-100)
    for order in ("left_to_right", "entropy"):
        settings = {"num_steps": 3, "order": order}
        together = nelbo(model, ids, labels, attention_mask=mask, batch_size=1, **settings).nelbo
        pairs = zip(rows, given, strict=True)
        alone = torch.cat([nelbo(model, row[None], labels[None], **settings).nelbo for row, labels in pairs])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    generator = [seeded(0), seeded(1)]
    together = nelbo(model, ids, attention_mask=mask, num_steps=3, generator=generator).nelbo
    alone = [nelbo(model, row[None], num_steps=3, generator=[seeded(i)]).nelbo for i, row in enumerate(rows)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_guidance_of_scale_one_changes_nothing_and_of_two_something():
    model = around("llama")
    settings = {"max_new_tokens": 6, "num_steps": 1, "eos_token_id": None}
    outputs = [model.generate(tokens(4, 4), **settings, guidance_scale=scale) for scale in (None, 1.0, 3.0)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_probabilities_of_all_blocks_given_what_is_before_sum_to_one(kind):
    """With a chain, whose joint distribution nelbo gives exactly."""
    model = around(**KINDS[kind], **LATENTS["chain"], block_size=2)
    pairs = torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))
    ids = torch.cat([tokens(3).expand(len(pairs), -1), pairs], dim=1)
    labels = ids.clone()
    labels[:, :4] = -100  # the second of a pair alone, given the first: blocks are (0, 1), (2, 3), (4)
    impossible = [token for token in model.config.forbidden_token_ids if token < VOCABULARY]
    real = ~torch.isin(pairs, torch.tensor(impossible)).any(-1)
    of_last = nelbo(model, ids[real], labels=labels[real]).nelbo.neg().exp()
    torch.testing.assert_close(of_last.sum(), torch.tensor(float(VOCABULARY - len(impossible))))
    ids = torch.cat([tokens(2).expand(len(pairs), -1), pairs], dim=1)[real]
    labels = ids.clone()
    labels[:, :2] = -100
    torch.testing.assert_close(nelbo(model, ids, labels=labels).nelbo.neg().exp().sum(), torch.tensor(1.0))


def test_the_layout_of_a_causal_stream_is_one_of_single_tokens():
    layout = around("llama").model.lay_out(tokens(1, 4))
    assert layout.document.tolist() == [[0, 0, 0, 0, PADDING, PADDING]]
    assert layout.token_index(clean=True).block.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert layout.token_index(clean=False).block.tolist() == [[0, 0, 0, 3, 3, 3]]
    assert layout.select(torch.tensor([0, 0])).causal


@torch.no_grad()
def test_a_chain_over_whole_sequences_of_a_masked_model():
    """Its probabilities sum to one, and padding takes no part in them."""
    model = around("bert", **LATENTS["chain"], block_size=None)
    real = [token for token in range(VOCABULARY) if token != model.config.mask_token_id]
    pairs = torch.cartesian_prod(torch.tensor(real), torch.tensor(real))
    ids = torch.cat([tokens(2).expand(len(pairs), -1), pairs], dim=1)
    labels = ids.clone()
    labels[:, [0, 1]] = -100
    bound = nelbo(model, ids, labels=labels).nelbo
    torch.testing.assert_close(bound.neg().exp().sum(), torch.tensor(1.0))
    mask = torch.ones(len(ids), 6, dtype=torch.long)
    mask[:, [0, 5]] = 0
    padded_ids, padded_labels = (
        torch.nn.functional.pad(part, (1, 1), value=v) for part, v in ((ids, 0), (labels, -100))
    )
    found = nelbo(model, padded_ids, labels=padded_labels, attention_mask=mask).nelbo
    torch.testing.assert_close(found, bound, rtol=1e-4, atol=1e-4)
    assert model.generate(ids.index_fill(1, torch.tensor([1, 3]), model.config.mask_token_id)).shape == ids.shape


# --- latents ---------------------------------------------------------------------------------------------------------


@each_kind
@torch.no_grad()
def test_a_gaussian_latent_has_a_say_in_its_own_block_alone(kind):
    model = around(**KINDS[kind], **LATENTS["gaussian"])
    ids = tokens(1, 9).index_fill(1, torch.tensor([0, 3, 4, 5, 7]), model.config.mask_token_id)
    latents = normal(1, 3, 4)
    other = latents.clone()
    other[:, 1] = 1.0
    changed = (model(ids, latents=latents).logits != model(ids, latents=other).logits).any(-1)[0]
    # With the shift, the first token of a block is predicted by the clean one before it.
    first = not model.config.token_shift
    assert changed.tolist() == [False] * 3 + [first, True, True] + [False] * 3


@pytest.mark.parametrize("kind", ["llama", "gpt2-unshifted", "bert"])
def test_with_the_backbone_frozen_the_chain_starts_as_the_model_without_and_learns(kind):
    torch.manual_seed(0)
    settings = {"latent_type": "chain", "latent_size": 8, "conditioning_size": 32, "block_size": 4}
    family = KINDS[kind]["family"]
    if family in MASKED:
        lm = AutoModelForMaskedLM.from_config(MASKED[family])
        model = VMDForMaskedDiffusion.from_masked_lm(lm, mask_token_id=4, **settings)
    else:
        model = VMDForMaskedDiffusion.from_causal_lm(causal_lm(family), **settings)
    ids = torch.arange(16).remainder(5).add(5).expand(8, -1)
    fixed = {"labels": ids, "noise_seeds": torch.arange(8)}
    with torch.no_grad():
        start = model.eval()(ids, **fixed).loss
        chain, model.chain = model.chain, None
        without = model(ids, **fixed).loss
    model.chain = chain
    torch.testing.assert_close(start, without, rtol=5e-3, atol=0)
    model.train().model.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        model(ids, **fixed).loss.backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert model.eval()(ids, **fixed).loss < 0.9 * start


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_chain_saves_and_loads_as_an_adapter(kind, tmp_path):
    def base():
        return around(**KINDS[kind], **LATENTS["chain"])

    config = peft.LoraConfig(target_modules="dummy-target-modules", modules_to_save=["chain"])
    adapted = peft.get_peft_model(base(), config).eval()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    chain = dict(base().chain.named_parameters())
    assert {name.rpartition("modules_to_save.default.")[2] for name in trained} == chain.keys()
    randomise(adapted.base_model.model.chain.modules_to_save, seed=1)
    adapted.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == len(chain)
    ids = tokens(2, 6)
    bounds = [nelbo(part, ids).nelbo for part in (adapted, peft.PeftModel.from_pretrained(base(), tmp_path), base())]
    assert torch.equal(bounds[0], bounds[1]) and not torch.allclose(bounds[0], bounds[2])
    torch.testing.assert_close(nelbo(adapted.merge_and_unload(), ids).nelbo, bounds[0])


# --- training --------------------------------------------------------------------------------------------------------


def test_the_causal_loss_is_that_of_the_causal_model():
    model, plain = around("llama", causal_loss_weight=0.5).train(), around("llama").train()

    def next_token_losses(row, labels):
        """Their sum over the labels that the causal model can predict. It has no mask token."""
        logits = model.model.causal_lm(row[None]).logits[0, :-1, :VOCABULARY]
        return cross_entropy(logits, labels[1:], reduction="sum")

    rows, mask = padded([tokens(8, seed=1).tolist(), tokens(5, seed=2).tolist()], "left")
    labels = rows.masked_fill(mask == 0, -100)
    labels[0, 2:4] = -100
    inputs = {"input_ids": rows, "attention_mask": mask, "labels": labels, "noise_seeds": torch.arange(2)}
    loss, expected = model(**inputs), plain(**inputs)
    total = next_token_losses(rows[0], labels[0]) + next_token_losses(rows[1, 3:], labels[1, 3:])
    torch.testing.assert_close(loss.loss - expected.loss, 0.5 * total / 11, rtol=1e-4, atol=1e-4)
    assert torch.equal(loss.reconstruction_loss, expected.reconstruction_loss)
    assert torch.equal(model.eval()(**inputs).loss, plain.eval()(**inputs).loss)
    # Of packed documents, which do not predict one another.
    packed = torch.cat([rows[0], rows[1, 3:]])[None]
    positions = torch.cat([torch.arange(8), torch.arange(5)])[None]
    inputs = {"input_ids": packed, "labels": packed, "position_ids": positions, "noise_seeds": torch.tensor([0])}
    difference = model.train()(**inputs).loss - plain.train()(**inputs).loss
    total = next_token_losses(rows[0], rows[0]) + next_token_losses(rows[1, 3:], rows[1, 3:])
    torch.testing.assert_close(difference, 0.5 * total / 13, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("latent", ["chain", "gaussian"])
@pytest.mark.parametrize("kind", ["llama", "gpt2-unshifted", "bert"])
def test_checkpointed_layers_have_the_same_loss_and_gradients(kind, latent):
    settings = dict(LATENTS[latent])
    if kind == "llama":
        settings["causal_loss_weight"] = 0.3
    ids, results = tokens(2, 8), []
    for checkpointed in (False, True):
        model = around(**KINDS[kind], **settings)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.backbone_config.attention_probs_dropout_prob = 0.0
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(ids, labels=ids, noise_seeds=torch.arange(2)).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss, gradients))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@torch.no_grad()
def test_blocks_may_grow(kind, tmp_path):
    model = around(**KINDS[kind], **LATENTS["chain"], block_size=4)
    model.save_pretrained(tmp_path)
    larger = VMDForMaskedDiffusion.from_pretrained(tmp_path, block_size=8).eval()
    ids = tokens(2, 16)
    model.config.block_size = 8  # of the same weights
    torch.testing.assert_close(nelbo(larger, ids).nelbo, nelbo(model, ids).nelbo)
    assert larger.train()(ids, labels=ids).loss.isfinite()
    assert larger.generate(ids[:, :3], max_new_tokens=5).shape == (2, 8)


def test_a_recipe_makes_a_causal_model_one_of_blocks_that_grow(tmp_path):
    """By the command line, from the model's own folder; its tokenizer has neither mask nor pad token."""
    words = "to be or not to be that is the question whether it is nobler in the mind to suffer".split()
    (tmp_path / "texts").mkdir()
    for index in range(20):
        (tmp_path / "texts" / f"{index}.txt").write_text(" ".join((words * 8)[index : index + 60]))
    tokenizer = bpe_tokenizer([" ".join(words)] * 4, 280).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]")
    assert tokenizer.mask_token is None and tokenizer.pad_token is None
    tokenizer.save_pretrained(tmp_path / "original")
    size = len(tokenizer)
    causal_lm(vocab_size=size, max_position_embeddings=32, eos_token_id=None).save_pretrained(tmp_path / "original")
    recipe = str(Path(__file__).parents[1] / "training_scripts" / "recipes" / "causal.yaml")
    common = [recipe, f"--source={tmp_path / 'texts'}", "--sequence_length=24", "--max_steps=2", "--use_cpu=true"]
    common += ["--per_device_train_batch_size=2", "--latent_size=3", "--conditioning_size=8", "--eval_strategy=no"]
    common += ["--save_strategy=no", "--report_to=none"]
    for block_size, start in ((2, "original"), (8, "2")):
        output = tmp_path / str(block_size)
        folders = [f"--model_name_or_path={tmp_path / start}", f"--output_dir={output}"]
        model = train(*parse([*common, *folders, f"--block_size={block_size}"])).model
        assert (model.config.block_size, model.config.num_states) == (block_size, 3)
        assert model.config.token_shift and model.config.causal_loss_weight == 0.3
        assert model.model.causal_lm.config.model_type == "llama"
        check_tokenizer(load_tokenizer(output), VMDForMaskedDiffusion.from_pretrained(output).config)


def test_low_rank_adapters_find_their_targets_and_merge():
    for family in ("llama", "gpt2", "bert"):
        model = around(family, **LATENTS["chain"])
        adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, modules_to_save=["chain"]))
        names = [name for name, _ in adapted.named_parameters() if "lora_A" in name and "_lm" in name]
        assert len(names) >= 2
        ids = tokens(2, 6)
        bound = nelbo(adapted, ids).nelbo
        torch.testing.assert_close(nelbo(adapted.merge_and_unload(), ids).nelbo, bound, rtol=1e-4, atol=1e-4)


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*CAUSAL, *MASKED])
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(family, tmp_path):
    model = around(family, **LATENTS["gaussian" if family == "gpt2" else "chain"])
    export = family in ("llama", "bert")
    export_model(model, tmp_path) if export else model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, trust_remote_code=export).eval()
    assert type(loaded).__name__ == "VMDForMaskedDiffusion"
    assert type(loaded.model.language_model) is type(model.model.language_model)
    assert loaded.config.token_shift == (family in CAUSAL)
    ids = tokens(2, 8)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    tokens_of = [part.generate(ids, max_new_tokens=4, latent_scale=0) for part in (model, loaded)]
    assert torch.equal(*tokens_of)


class OwnConfig(LlamaConfig):
    model_type = "own-diffusion"


class OwnModel(LlamaForCausalLM):
    """As the code of a diffusion model on the Hub may be: that of a causal model, trained without its causality."""

    config_class = OwnConfig


def test_a_model_by_code_of_ones_own_is_saved_and_loaded(tmp_path):
    AutoConfig.register(OwnConfig.model_type, OwnConfig, exist_ok=True)
    AutoModelForMaskedLM.register(OwnConfig, OwnModel, exist_ok=True)
    settings = {"block_size": 2, "mask_token_id": 4, "token_shift": True, "latent_type": "chain", "latent_size": 3}
    model = randomise(VMDForMaskedDiffusion.from_masked_lm(OwnModel(OwnConfig(**GROUPED)), **settings)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(loaded.model.masked_lm) is OwnModel
    assert torch.equal(nelbo(loaded, tokens(2, 6)).nelbo, nelbo(model, tokens(2, 6)).nelbo)


@torch.no_grad()
def test_a_language_model_whose_weights_are_kept_elsewhere():
    settings = {"block_size": 2, "latent_size": 3, "mask_token_id": 4}
    causal = causal_lm()
    model = randomise(VMDForMaskedDiffusion.from_causal_lm(causal, **settings))
    expected = nelbo(model, tokens(2, 6)).nelbo
    state = model.chain.state_dict()
    offloaded = VMDForMaskedDiffusion.from_causal_lm(cpu_offload(causal, execution_device="cpu"), **settings)
    assert causal.lm_head.weight.device.type == "meta"
    offloaded.chain.load_state_dict(state)
    torch.testing.assert_close(nelbo(offloaded, tokens(2, 6)).nelbo, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_the_mask_token_is_one_more_and_the_mean_of_all_others(tied):
    causal = causal_lm(tie_word_embeddings=tied)
    tables = causal.get_input_embeddings().weight.clone(), causal.get_output_embeddings().weight.clone()
    model = VMDForMaskedDiffusion.from_causal_lm(causal, block_size=2, latent_size=0)
    assert model.config.mask_token_id == VOCABULARY
    assert model.config.vocab_size == model.config.backbone_config.vocab_size == VOCABULARY + 1
    for table, before in zip((causal.get_input_embeddings(), causal.get_output_embeddings()), tables, strict=True):
        assert torch.equal(table.weight[:VOCABULARY], before)
        torch.testing.assert_close(table.weight[VOCABULARY], before.mean(0))
    assert (causal.get_input_embeddings().weight is causal.get_output_embeddings().weight) == tied


def test_a_mask_token_that_the_model_has_is_left_as_it_is():
    causal = causal_lm()
    before = {name: value.clone() for name, value in causal.state_dict().items()}
    model = VMDForMaskedDiffusion.from_causal_lm(causal, block_size=2, latent_size=0, mask_token_id=7)
    assert (model.config.vocab_size, model.config.mask_token_id) == (VOCABULARY, 7)
    assert all(torch.equal(value, before[name]) for name, value in causal.state_dict().items())


@pytest.mark.parametrize(("rows", "expected"), [(11, 12), (16, 16)])
def test_a_model_by_its_name_gets_its_tokenizer_a_mask_token(rows, expected, tmp_path):
    """A row that no token has is taken; else there is one more."""
    tokenizer = synthetic_tokenizer()
    vocabulary = {token: index for token, index in tokenizer.get_vocab().items() if token != "[MASK]"}
    plain = type(tokenizer)(tokenizer_object=plain_tokenizer(vocabulary), pad_token="[PAD]")
    assert plain.mask_token is None and len(plain) == 11
    plain.save_pretrained(tmp_path / "original")
    causal_lm(vocab_size=rows).save_pretrained(tmp_path / "original")
    model = VMDForMaskedDiffusion.from_causal_lm(tmp_path / "original", block_size=2, latent_size=0)
    assert (model.config.vocab_size, model.config.mask_token_id) == (expected, 11)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original").get_input_embeddings().weight
    torch.testing.assert_close(model.get_input_embeddings().weight[11], original.mean(0))
    export_model(model, tmp_path / "vmd")
    check_tokenizer(load_tokenizer(tmp_path / "vmd"), VMDConfig.from_pretrained(tmp_path / "vmd"))
    synthetic_tokenizer().save_pretrained(tmp_path / "original")  # which has one: id 10
    causal_lm(vocab_size=16).save_pretrained(tmp_path / "original")
    model = VMDForMaskedDiffusion.from_causal_lm(tmp_path / "original", block_size=2, latent_size=0)
    assert (model.config.vocab_size, model.config.mask_token_id) == (16, tokenizer.mask_token_id)


def plain_tokenizer(vocabulary):
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = sorted(vocabulary, key=vocabulary.get)
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(names)}, unk_token=names[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return tokenizer


# --- errors ----------------------------------------------------------------------------------------------------------


def test_what_does_not_go_is_an_error():
    for model, message in (
        (
            AutoModelForCausalLM.from_config(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)),
            "no position_ids",
        ),
        (causal_lm().base_model, "causal language model with an encoder and a head, got LlamaModel"),
    ):
        with pytest.raises(ValueError, match=message):
            VMDForMaskedDiffusion.from_causal_lm(model, block_size=2)
    with pytest.raises(ValueError, match="block_size must be at least 1 with a causal language model, got None"):
        VMDForMaskedDiffusion.from_causal_lm(causal_lm(), block_size=None)
    linear = causal_lm("qwen3")
    linear.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"layers of attention only with block_size, got Qwen3.* linear_attention"):
        VMDForMaskedDiffusion.from_causal_lm(linear, block_size=2)
    assert linear.get_input_embeddings().num_embeddings == VOCABULARY  # nothing was done to it


def test_rows_end_where_a_sliding_window_begins_to_matter():
    model = around("gemma2")
    assert model.config.max_position_embeddings == 12
    model(tokens(1, 12))
    with pytest.raises(ValueError, match="at most max_position_embeddings = 12"):
        model(tokens(1, 13))
    with pytest.raises(ValueError, match="at most max_position_embeddings = 12"):
        model.generate(tokens(1, 6), max_new_tokens=7)


@pytest.mark.parametrize(
    "config",
    [
        ModernBertConfig(**SIZES | {"pad_token_id": 1}, cls_token_id=2, sep_token_id=3),
        DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=1, n_heads=4, hidden_dim=32),
    ],
)
def test_blocks_need_a_model_that_gives_its_keys_to_a_cache(config):
    masked_lm = AutoModelForMaskedLM.from_config(config)
    model = VMDForMaskedDiffusion.from_masked_lm(masked_lm, latent_size=0, mask_token_id=4, block_size=2)
    with pytest.raises(ValueError, match=r"block_size must be None with a backbone unless .* got block_size=2 and"):
        model(tokens(1, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone_type": "causal_lm", "block_size": 2}, "backbone_type='causal_lm' needs a backbone_config"),
        ({"backbone_config": LlamaConfig(**GROUPED), "backbone_type": "causal_lm"}, "needs .* block_size"),
        ({"backbone_config": BertConfig(**SIZES), "token_shift": True}, "token_shift needs .* BertConfig and None"),
        ({"block_size": 2, "token_shift": True}, "token_shift needs a backbone_config and block_size, got NoneType"),
        ({"causal_loss_weight": 0.5}, "causal_loss_weight needs backbone_type='causal_lm', got 0.5"),
        ({"causal_loss_weight": -0.5}, "causal_loss_weight must be finite and not negative"),
    ],
)
def test_settings_that_contradict_one_another_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        VMDConfig(**settings)
