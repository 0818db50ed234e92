import itertools
import math

import pytest
import torch
from datasets import Dataset
from helpers import (
    MASK,
    OBJECTIVES,
    PAD,
    digits,
    normal,
    of_the_same_weights,
    pad_row,
    randomise,
    scored_by_hand,
    seeded,
    tiny_config,
    tiny_model,
    uniform,
)
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, default_data_collator

from vmd_hf import VMDForMaskedDiffusion, blocks_vmd, nelbo
from vmd_hf.blocks_vmd import (
    EMPTY,
    PADDING,
    TokenIndex,
    block_attention_mask,
    join_token_indices,
    lay_out_blocks,
    may_attend,
)
from vmd_hf.training import VMDMetricsCallback

POSITIONS = {
    "both": {"position_embedding_type": "both"},
    "rotary": {"position_embedding_type": "rotary"},
    "learned": {"position_embedding_type": "learned"},
    "groups": {
        "position_embedding_type": "none",
        "position_groups": [[i // 4 for i in range(16)], [i % 4 for i in range(16)]],
    },
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SCALARS = ("loss", "reconstruction_loss", "kl")


def some_masked(input_ids, seed=7):
    return input_ids.masked_fill(uniform(*input_ids.shape, seed=seed) < 0.5, MASK)


def block_noise(batch_size, length, num_blocks, seed=0, latent_size=4):
    return {
        "times": uniform(batch_size, num_blocks, seed=seed + 11).clamp(min=0.05),
        "position_noise": uniform(batch_size, length, seed=seed + 12),
        "latent_noise": normal(batch_size, num_blocks, latent_size, seed=seed + 13),
    }


def assert_gradients_close(actual, expected):
    for name, gradient in expected.items():
        tolerance = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, gradient.abs().max().item())}
        torch.testing.assert_close(actual[name], gradient, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def spy_on_noisy_inputs(model):
    """The list to which every x_t on its grid is appended that the denoiser is called with."""
    seen = []

    def record(module, args, kwargs):
        if not kwargs.get("clean"):
            seen.append((args[0] if args else kwargs["input_ids"]).clone())

    model.model.register_forward_pre_hook(record, with_kwargs=True)
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# Which token may attend to which
# ---------------------------------------------------------------------------------------------------------------------


def sees(query, key):
    """One (block, document, clean) triple and another, in words."""
    (query_block, query_document, query_clean), (key_block, key_document, key_clean) = query, key
    if query_document != key_document:
        return False
    if query_clean:  # clean tokens never look at noise, nor ahead
        return key_clean and key_block <= query_block
    if key_clean:  # the answer to a block is not shown to it
        return key_block < query_block
    return key_block == query_block


def triples(places, row):
    return list(zip(*(getattr(places, name)[row].tolist() for name in ("block", "document", "clean")), strict=True))


def places_of(rows, num_columns):
    """`TokenIndex` of lists of (block, document, clean)."""
    values = torch.tensor(rows).view(len(rows), num_columns, 3).unbind(-1)
    return TokenIndex(block=values[0], document=values[1], clean=values[2].bool())


def allowed_by(query, key):
    return may_attend(query.map(lambda v: v[:, :, None]), key.map(lambda v: v[:, None, :]))


def test_two_blocks_of_two_attend_as_in_the_picture():
    """Rows are queries, columns keys, both [clean, noisy]; block diffusion (arXiv 2503.09573), figure 3."""
    picture = """
        # # . . . . . .
        # # . . . . . .
        # # # # . . . .
        # # # # . . . .
        . . . . # # . .
        . . . . # # . .
        # # . . . . # #
        # # . . . . # #
    """
    expected = [[cell == "#" for cell in line.split()] for line in picture.strip().splitlines()]
    layout = lay_out_blocks(torch.zeros(1, 4), None, None, 2)
    both = join_token_indices([layout.token_index(clean=True), layout.token_index(clean=False)])
    assert allowed_by(both, both)[0].tolist() == expected


def random_places(batch_size, length, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(0, n, (batch_size, length), generator=generator) for n in (4, 5, 2)]
    document = torch.tensor([0, 1, 2, PADDING, EMPTY])[draw[1]]
    return TokenIndex(block=draw[0], document=document, clean=draw[2].bool())


@pytest.mark.parametrize("seed", range(3))
def test_the_dense_masks_are_the_loop_over_queries_and_keys(seed):
    query, key = random_places(2, 7, seed), random_places(2, 9, seed + 100)
    expected = torch.tensor(
        [[[sees(q, k) for k in triples(key, row)] for q in triples(query, row)] for row in range(2)]
    )
    assert expected.any() and not expected.all()
    assert torch.equal(allowed_by(query, key), expected)

    config = tiny_config(block_size=2)
    config._attn_implementation = "sdpa"
    sdpa = block_attention_mask(config, query, key, torch.float32)
    assert sdpa.dtype == torch.bool
    assert torch.equal(sdpa, expected[:, None])  # one for all heads
    config._attn_implementation = "eager"
    for dtype in (torch.float32, torch.bfloat16):
        eager = block_attention_mask(config, query, key, dtype)
        assert eager.dtype == dtype
        assert eager.shape == (2, 1, 7, 9)
        assert torch.equal(eager == 0, expected[:, None])
        assert (eager[~expected[:, None]] == torch.finfo(dtype).min).all()


@pytest.mark.parametrize("documents", [1, 3])
def test_the_mask_of_flex_attention_knows_all_rows_of_a_batch(documents, monkeypatch):
    """Of three, which may share one index: then it is asked for rows that this one has not."""
    monkeypatch.setattr(blocks_vmd, "create_block_mask", lambda mask_mod, *args, **kwargs: mask_mod)
    config = tiny_config(block_size=2)
    config._attn_implementation = "flex_attention"
    query, key = random_places(documents, 7, 0), random_places(documents, 9, 100)
    mask_mod = block_attention_mask(config, query, key, torch.float32)
    rows, queries, keys = (torch.arange(size) for size in (3, 7, 9))
    found = mask_mod(rows[:, None, None], 0, queries[None, :, None], keys)
    assert torch.equal(found.expand(3, -1, -1), allowed_by(query, key).expand(3, -1, -1))


def test_places_that_all_rows_share_are_joined_with_those_of_each_row():
    shared, own = random_places(1, 3, 0), random_places(2, 4, 1)
    joined = join_token_indices([shared, own])
    for row in range(2):
        assert triples(joined, row) == triples(shared, 0) + triples(own, row)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_with_blocks_is_an_error(implementation, with_labels):
    model, input_ids = tiny_model(block_size=2), digits(1, 4)
    model.config._attn_implementation = implementation
    with pytest.raises(ValueError, match=f"attn_implementation must be 'eager'.*block_size.*{implementation}"):
        model(input_ids, labels=input_ids if with_labels else None)


# ---------------------------------------------------------------------------------------------------------------------
# Rows on the grid
# ---------------------------------------------------------------------------------------------------------------------

LETTERS = torch.arange(1, 100)  # distinct values to be laid out; 0 is what the grid has of its own


def grid_of(layout, values):
    return layout.scatter(values, 0).tolist()


def document_of(layout, batch_size=1):
    return layout.document.expand(batch_size, -1).tolist()


def test_whole_blocks_without_padding_are_their_own_grid():
    values = LETTERS[:12].view(2, 6)
    layout = lay_out_blocks(values, None, None, 3)
    assert (layout.num_blocks, layout.width) == (2, 3)
    assert layout.real is None and layout.columns is None
    assert torch.equal(layout.scatter(values, 0), values)
    assert torch.equal(layout.gather(values), values)
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert document_of(layout) == [[0] * 6]
    assert layout.token_index(clean=True).block.tolist() == [[0, 0, 0, 3, 3, 3]]
    assert layout.token_index(clean=True).clean.all() and not layout.token_index(clean=False).clean.any()
    assert layout.blocks(values).tolist() == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]]


def test_the_last_block_is_filled_up():
    values = LETTERS[:10].view(2, 5)
    layout = lay_out_blocks(values, None, None, 3)
    assert (layout.num_blocks, layout.width) == (2, 3)
    assert grid_of(layout, values) == [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 10, 0]]
    assert layout.real.tolist() == [[True] * 5 + [False]] * 2
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 0]] * 2
    assert document_of(layout, 2) == [[0] * 5 + [PADDING]] * 2
    assert torch.equal(layout.gather(layout.scatter(values, 0)), values)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_gives_one_grid(side):
    rows = [LETTERS[:5], LETTERS[10:14], LETTERS[20:27]]
    values = torch.cat([pad_row(row, 7, side, 99) for row in rows])
    mask = torch.cat([pad_row(torch.ones_like(row), 7, side, 0) for row in rows])
    layout = lay_out_blocks(values, mask, None, 3)
    assert (layout.num_blocks, layout.width) == (3, 3)
    assert grid_of(layout, values) == [
        [1, 2, 3, 4, 5, 0, 0, 0, 0],
        [11, 12, 13, 14, 0, 0, 0, 0, 0],
        [21, 22, 23, 24, 25, 26, 27, 0, 0],
    ]
    for row, length in enumerate((5, 4, 7)):
        missing = 9 - length
        assert layout.real[row].tolist() == [True] * length + [False] * missing
        assert layout.position_ids[row].tolist() == list(range(length)) + [0] * missing
        assert layout.document[row].tolist() == [0] * length + [PADDING] * missing
    assert torch.equal(layout.gather(layout.scatter(values, 0))[mask.bool()], values[mask.bool()])


def test_every_document_of_a_packed_row_starts_a_block():
    values = LETTERS[:7][None]
    layout = lay_out_blocks(values, None, torch.tensor([[0, 1, 2, 3, 0, 1, 2]]), 3)
    assert (layout.num_blocks, layout.width) == (3, 3)
    assert grid_of(layout, values) == [[1, 2, 3, 4, 0, 0, 5, 6, 7]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 0, 1, 2]]
    assert document_of(layout) == [[0, 0, 0, 0, PADDING, PADDING, 1, 1, 1]]
    assert layout.real.tolist() == [[True] * 4 + [False] * 2 + [True] * 3]


def test_documents_of_one_token_are_documents():
    values = LETTERS[:4][None]
    layout = lay_out_blocks(values, None, torch.tensor([[0, 0, 0, 1]]), 2)
    assert grid_of(layout, values) == [[1, 0, 2, 0, 3, 4]]
    assert document_of(layout) == [[0, PADDING, 1, PADDING, 2, 2]]


def test_padding_around_and_between_documents_is_left_out():
    values = LETTERS[:9][None]
    mask = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 0]])
    for filler in (0, 1, 7):  # what stands at padding does not matter
        positions = torch.tensor([[0, 0, 1, 2, 0, 0, 0, 1, 0]]).masked_fill(mask == 0, filler)
        layout = lay_out_blocks(values, mask, positions, 2)
        assert grid_of(layout, values) == [[2, 3, 4, 0, 7, 8]]
        assert document_of(layout) == [[0, 0, 0, PADDING, 1, 1]]
        assert layout.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]


def test_a_document_that_goes_on_after_padding_is_one_document():
    values, mask = LETTERS[:6][None], torch.tensor([[1, 1, 0, 0, 1, 1]])
    layout = lay_out_blocks(values, mask, torch.tensor([[0, 1, 0, 0, 2, 3]]), 2)
    assert grid_of(layout, values) == [[1, 2, 5, 6]]
    assert document_of(layout) == [[0, 0, 0, 0]]


def test_a_text_that_starts_later_keeps_its_place_in_its_block():
    values = LETTERS[:4][None]
    layout = lay_out_blocks(values, None, torch.tensor([[4, 5, 6, 7]]), 3)
    assert grid_of(layout, values) == [[0, 1, 2, 3, 4, 0]]
    assert layout.position_ids.tolist() == [[0, 4, 5, 6, 7, 0]]


def grid_by_hand(values, positions, real, block_size):
    """Blocks of one row as lists of (value, position, document), `None` where they hold nothing."""
    blocks, document, before = [], 0, None
    for value, position, is_real in zip(values, positions, real, strict=True):
        if not is_real:
            continue
        if before is None or position <= before or position // block_size != before // block_size:
            blocks.append([None] * block_size)
        if before is not None and position <= before:
            document += 1
        blocks[-1][position % block_size] = (value, position, document)
        before = position
    return blocks


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_the_grid_is_the_loop_over_tokens(block_size):
    length, generator = 12, torch.Generator().manual_seed(block_size)
    values = LETTERS[: 6 * length].view(6, length)
    real = torch.rand(6, length, generator=generator) < 0.7
    positions = torch.zeros(6, length, dtype=torch.long)
    for row, column in itertools.product(range(6), range(1, length)):
        restart = torch.rand((), generator=generator) < 0.25
        positions[row, column] = 0 if restart else positions[row, column - 1] + 1
    layout = lay_out_blocks(values, real.long(), positions, block_size)
    by_hand = [
        grid_by_hand(*(part[row].tolist() for part in (values, positions, real)), block_size) for row in range(6)
    ]
    assert layout.num_blocks == max(map(len, by_hand))
    for row, blocks in enumerate(by_hand):
        cells = [cell for block in blocks for cell in block]
        cells += [None] * (layout.num_blocks * block_size - len(cells))
        assert grid_of(layout, values)[row] == [cell[0] if cell else 0 for cell in cells]
        assert layout.position_ids[row].tolist() == [cell[1] if cell else 0 for cell in cells]
        assert layout.document[row].tolist() == [cell[2] if cell else PADDING for cell in cells]
        assert layout.real[row].tolist() == [cell is not None for cell in cells]
    assert torch.equal(layout.gather(layout.scatter(values, 0))[real], values[real])
    vectors = torch.stack([values, -values], dim=-1).float()  # a further dimension is carried along
    grid = torch.stack([layout.scatter(part, 0.0) for part in vectors.unbind(-1)], dim=-1)
    assert torch.equal(layout.gather(grid)[real], vectors[real])


# ---------------------------------------------------------------------------------------------------------------------
# A dense reference: both streams in one sequence of twice the length, with an explicit mask
# ---------------------------------------------------------------------------------------------------------------------


def layer_norm(hidden_states, norm, eps):
    centred = hidden_states - hidden_states.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight


def rotate(vectors, positions):
    """Rotary embedding of (tokens, head_dim): dimension i and i + head_dim / 2 are a point in the plane."""
    half = vectors.shape[-1] // 2
    angles = positions[:, None] * 10_000 ** (-torch.arange(half) / half)
    first, second = vectors[:, :half], vectors[:, half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def embed(model, tokens, positions):
    embeddings, config = model.model.embeddings, model.config
    hidden_states = embeddings.embed_tokens.weight[tokens]
    if embeddings.embed_positions is not None:
        hidden_states = hidden_states + embeddings.embed_positions.weight[positions]
    for table, groups in zip(embeddings.embed_groups, config.position_groups or (), strict=True):
        hidden_states = hidden_states + table.weight[torch.tensor(groups)[positions]]
    return hidden_states


def dense_layer(layer, config, h, positions, mask=0.0, changes=None):
    """One transformer layer for the tokens of one row: h (tokens, hidden_size), mask (tokens, tokens) to be added.

    changes: (tokens, 6 * hidden_size), what the latent does to each token; 0 and `None` for nothing.
    """
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = [0.0] * 6 if changes is None else changes.chunk(6, dim=-1)
    a = layer_norm(h, layer.attention_norm, config.norm_eps) * (1 + scale_1) + shift_1
    heads = []
    for part in (a @ layer.attention.qkv_proj.weight.T).view(len(h), 3, config.num_attention_heads, -1).unbind(2):
        query, key, value = part.unbind(1)
        if config.position_embedding_type in ("rotary", "both"):
            query, key = rotate(query, positions), rotate(key, positions)
        heads.append((query @ key.T / query.shape[-1] ** 0.5 + mask).softmax(-1) @ value)
    h = h + (1 + gate_1) * (torch.cat(heads, dim=-1) @ layer.attention.o_proj.weight.T)
    a = layer_norm(h, layer.mlp_norm, config.norm_eps) * (1 + scale_2) + shift_2
    return h + (1 + gate_2) * (F.gelu(a @ layer.mlp.up_proj.weight.T) @ layer.mlp.down_proj.weight.T)


def condition(model, z):
    """What layers and inputs read of latents (..., size): (..., conditioning_size + 1), the last of them 1."""
    conditioner = model.model.conditioner
    for layer in (conditioner.in_proj, conditioner.out_proj):
        z = F.silu(z @ layer.weight.T + layer.bias)
    return torch.cat([z, torch.ones(*z.shape[:-1], 1)], dim=-1)


def dense_two_streams(model, clean, x_t, latents):
    """Hidden states (length, hidden_size) of the clean and of the noisy stream, for one row of one document.

    clean, x_t: (length,). latents: (blocks, latent_size); they modulate the noisy stream only.
    """
    config, length = model.config, len(clean)
    positions = torch.arange(length).repeat(2)
    token = [(position // config.block_size, 0, index < length) for index, position in enumerate(positions.tolist())]
    mask = torch.tensor([[0.0 if sees(query, key) else -math.inf for key in token] for query in token])
    h = embed(model, torch.cat([clean, x_t]), positions)
    if config.latent_size and config.latent_input != "position_slices":
        vectors = condition(model, latents)  # (blocks, conditioning_size + 1)
    for position in range(length if config.latent_input != "layers" else 0):
        block, place = divmod(position, config.block_size)
        weight = model.model.position_inputs.weight
        if config.latent_input == "position_slices":
            h[length + position] += weight @ condition(model, latents[block].view(config.block_size, -1)[place])
        else:
            h[length + position] += weight.view(config.block_size, config.hidden_size, -1)[place] @ vectors[block]
    for layer in [*model.model.layers] * config.num_loops:
        changes = None
        if layer.modulation is not None:
            of_tokens = (vectors @ layer.modulation.weight.T)[positions[length:] // config.block_size]
            changes = torch.cat([torch.zeros_like(of_tokens), of_tokens])
        h = dense_layer(layer, config, h, positions, mask, changes)
    h = layer_norm(h, model.model.norm, config.norm_eps)
    return h[:length], h[length:]


def state_by_hand(config, maskable, time, noise):
    """(masked, revealed, weight) of one block: lists of positions, and the factor of its reconstruction term."""
    if config.objective == "vmd":
        masked = [position for position in maskable if noise[position] < time]
        return masked, masked, 1 / time
    choice = time * len(config.objective_steps)
    row_steps = min(config.objective_steps[int(choice)], len(maskable))
    step = int((choice - int(choice)) * row_steps) + 1
    order = sorted(maskable, key=lambda position: noise[position])
    start, end = (step - 1) * len(order) // row_steps, step * len(order) // row_steps
    return order[start:], order[start:end], row_steps


def before_block(model, start, clean_hidden_states):
    return clean_hidden_states[start - 1] if start else torch.zeros(model.config.hidden_size)


def posterior_of_block(model, row, start, end, masked, revealed, clean_hidden_states):
    """Mean and log-variance, each (latent_size,), of q for the block from `start` to `end`."""
    encoder, positions = model.latent_encoder, torch.arange(start, end)
    flags = [1 if i in revealed else 2 if i in masked else 0 for i in range(start, end)]
    h = embed(model, row[start:end], positions) + encoder.embed_flags.weight[flags]
    h = h + encoder.before_proj.weight @ before_block(model, start, clean_hidden_states)
    for layer in encoder.layers:
        h = dense_layer(layer, model.config, h, positions)
    h = layer_norm(h, encoder.norm, model.config.norm_eps)
    if model.config.latent_input == "position_slices":  # the prior, but for the slices of what is revealed
        prior = prior_of_block(model, start, clean_hidden_states)
        slices = list(prior.view(2, model.config.block_size, -1).unbind(1))
        for i in revealed:
            slices[i - start] = (encoder.out_proj.weight @ h[i - start] + encoder.out_proj.bias).view(2, -1)
        return torch.cat(slices, dim=1)
    pooled = sum(h[i - start] for i in revealed) / len(revealed)
    return (encoder.out_proj.weight @ pooled + encoder.out_proj.bias).view(2, -1)


def prior_of_block(model, start, clean_hidden_states):
    """Mean and log-variance, each (latent_size,), of p(z | clean earlier blocks)."""
    prior = model.model.latent_prior
    if prior is None:
        return torch.zeros(2, model.config.latent_size)
    hidden = F.silu(prior.in_proj.weight @ before_block(model, start, clean_hidden_states) + prior.in_proj.bias)
    return (prior.out_proj.weight @ hidden + prior.out_proj.bias).view(2, -1)


def slow_row(model, row, labels, times, position_noise, latent_noise):
    """The terms of one row without padding, block by block.

    Each block is denoised by the plain forward pass over the clean earlier blocks and its own x_t, with nothing after.

    Returns:
        Summed reconstruction and KL terms, and lists of the KL and of the posterior's shift of each block.
    """
    config = model.config
    reconstruction, kl, kl_of_blocks, shifts = torch.zeros(()), torch.zeros(()), [], []
    no_latents = torch.zeros(-(-len(row) // config.block_size), config.latent_size)
    clean_hidden_states, _ = dense_two_streams(model, row, row, no_latents)
    for block, start in enumerate(range(0, len(row), config.block_size)):
        end = min(start + config.block_size, len(row))
        maskable = [position for position in range(start, end) if labels[position] != -100]
        kl_of_blocks.append(torch.zeros(()))
        shifts.append(torch.zeros(config.latent_size))
        if not maskable:
            continue
        masked, revealed, weight = state_by_hand(config, maskable, times[block].item(), position_noise.tolist())
        if not revealed:
            continue
        latents, denoiser = None, model
        if config.latent_size and len(revealed) < config.latent_min_tokens:
            denoiser = of_the_same_weights(model, latent_size=0)
        elif config.latent_size:
            # The posterior of `per_sample` has to serve all steps: everything is masked.
            flags = (maskable, maskable) if config.objective == "per_sample" else (masked, revealed)
            mean, log_variance = posterior_of_block(model, row, start, end, *flags, clean_hidden_states)
            latents = 3 * torch.ones(1, block + 1, config.latent_size)  # those of earlier blocks play no part
            latents[0, block] = mean + log_variance.exp().sqrt() * latent_noise[block]
            prior_mean, prior_log_variance = prior_of_block(model, start, clean_hidden_states)
            posterior = Normal(mean, log_variance.exp().sqrt())
            prior = Normal(prior_mean, prior_log_variance.exp().sqrt())
            shifts[-1] = (posterior.mean - prior.mean) / prior.stddev
            kl_of_blocks[-1] = kl_divergence(posterior, prior).sum()
            kl = kl + kl_of_blocks[-1] * (1 if config.objective == "per_sample" else weight)
        x_t = row[:end].clone()
        x_t[masked] = MASK
        log_probability = denoiser(x_t[None], latents=latents).logits[0].log_softmax(-1)
        scored, share = scored_by_hand(config, masked, revealed)
        reconstruction = reconstruction - weight * share * sum(log_probability[i, row[i]] for i in scored)
    return reconstruction, kl, kl_of_blocks, shifts


def slow_loss(model, input_ids, attention_mask, labels, times, position_noise, latent_noise):
    """Reconstruction and KL over the number of labels, KL (batch, blocks), shifts (batch, blocks, latent_size)."""
    totals = torch.zeros(2)
    kl_per_latent = torch.zeros(times.shape)
    shifts = torch.zeros(*times.shape, model.config.latent_size)
    for index in range(len(input_ids)):
        keep = attention_mask[index].nonzero().flatten()
        noise = times[index], position_noise[index, keep], latent_noise[index]
        *terms, kl, shift = slow_row(model, input_ids[index, keep], labels[index, keep], *noise)
        totals = totals + torch.stack(terms)
        kl_per_latent[index, : len(kl)] = torch.stack(kl)
        shifts[index, : len(kl)] = torch.stack(shift)
    return *(totals / (labels != -100).sum()), kl_per_latent, shifts


def loss_batch(batch_size=5, length=7):
    """Rows with padding on both sides and context in places; in one of them nothing but context."""
    input_ids, attention_mask = digits(batch_size, length), torch.ones(batch_size, length, dtype=torch.long)
    attention_mask[1, :2] = 0
    attention_mask[2, 4:] = 0
    input_ids[attention_mask == 0] = PAD
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, :4] = labels[1, 3] = labels[3, 0] = labels[3, 5] = -100
    labels[4:] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


# ---------------------------------------------------------------------------------------------------------------------
# Denoising: forward without labels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("position", list(POSITIONS))
def test_the_logits_are_those_of_the_dense_reference_over_the_blocks_as_they_stand(
    position, block_size, implementation
):
    model = tiny_model(block_size=block_size, **POSITIONS[position])
    model.set_attn_implementation(implementation)
    x_t, z = some_masked(digits(2, 8)), normal(2, -(-8 // block_size), 4)
    logits = model(x_t, latents=z).logits
    assert logits.shape == (2, 8, 12)
    assert logits[..., [MASK, PAD]].eq(-math.inf).all()
    for row in range(2):
        _, hidden_states = dense_two_streams(model, x_t[row], x_t[row], z[row])
        expected = hidden_states @ model.lm_head.weight.T
        torch.testing.assert_close(logits[row, :, :MASK], expected[:, :MASK], rtol=1e-4, atol=1e-4)


def test_without_a_latent_the_logits_are_those_of_the_dense_reference():
    model, x_t = tiny_model(block_size=3, latent_size=0), some_masked(digits(1, 8))
    _, hidden_states = dense_two_streams(model, x_t[0], x_t[0], None)
    expected = hidden_states @ model.lm_head.weight.T
    torch.testing.assert_close(model(x_t).logits[0, :, :MASK], expected[:, :MASK], rtol=1e-4, atol=1e-4)


def test_layers_that_are_run_through_twice_keep_keys_and_values_of_both_times():
    model, batch, noise = tiny_model(block_size=3, num_loops=2), loss_batch(), block_noise(5, 7, 3)
    x_t, z = some_masked(digits(1, 8)), normal(1, 3, 4)
    _, hidden_states = dense_two_streams(model, x_t[0], x_t[0], z[0])
    expected = hidden_states @ model.lm_head.weight.T
    torch.testing.assert_close(model(x_t, latents=z).logits[0, :, :MASK], expected[:, :MASK], rtol=1e-4, atol=1e-4)
    assert_loss_is_the_loop(model, batch, noise)


def test_the_logits_of_a_block_depend_on_the_blocks_up_to_it():
    model, x_t, z = tiny_model(block_size=2), some_masked(digits(1, 8)), normal(1, 4, 4)
    logits = model(x_t, latents=z).logits[0, :, :MASK]
    for column in range(8):
        other = x_t.clone()
        other[0, column] = (x_t[0, column] + 3) % 10
        difference = (model(other, latents=z).logits[0, :, :MASK] - logits).abs().amax(-1)
        first = column // 2 * 2
        assert difference[:first].eq(0).all()
        assert (difference[first:] > 1e-4).all()


def test_the_latent_of_a_block_changes_the_logits_of_that_block_only():
    """Clean tokens are read under the null latent: what follows a block depends on its tokens, not on its z."""
    model, x_t, z = tiny_model(block_size=2), some_masked(digits(2, 6)), normal(2, 3, 4)
    logits = model(x_t, latents=z).logits[..., :MASK]
    for row, block in itertools.product(range(2), range(3)):
        other = z.clone()
        other[row, block] += 1
        changed = (model(x_t, latents=other).logits[..., :MASK] - logits).abs().amax(-1) > 1e-4
        expected = torch.zeros(2, 6, dtype=torch.bool)
        expected[row, 2 * block : 2 * block + 2] = True
        assert torch.equal(changed, expected)


def test_the_default_latent_is_the_mean_of_a_learned_prior():
    model, x_t = tiny_model(block_size=2, prior="learned"), some_masked(digits(1, 5))
    hidden_states, _ = dense_two_streams(model, x_t[0], x_t[0], torch.zeros(3, 4))
    z = torch.stack([prior_of_block(model, start, hidden_states)[0] for start in (0, 2, 4)])[None]
    assert (z[0, 1] - z[0, 2]).abs().max() > 0.1
    torch.testing.assert_close(model(x_t).logits, model(x_t, latents=z).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_labels", [False, True])
def test_attention_weights_are_zero_where_a_token_may_not_look(with_labels):
    model, input_ids = tiny_model(block_size=2), digits(1, 4)
    model.set_attn_implementation("eager")
    attentions = model(input_ids, labels=input_ids if with_labels else None, output_attentions=True).attentions
    clean, noisy = [(0, 0, True)] * 2 + [(1, 0, True)] * 2, [(0, 0, False)] * 2 + [(1, 0, False)] * 2
    queries, keys = noisy if with_labels else clean + noisy, clean + noisy
    expected = torch.tensor([[sees(query, key) for key in keys] for query in queries])
    assert len(attentions) == 2
    for weights in attentions:
        assert weights.shape == (1, 4, len(queries), len(keys))
        assert torch.equal(weights[0] > 0, expected.expand(4, -1, -1))
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, len(queries)))


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("padding", ["none", "last block", "left", "right", "packed"])
def test_hidden_states_come_back_in_the_columns_of_the_row(padding, with_labels):
    model, row = tiny_model(block_size=3), digits(1, 6)
    if padding == "last block":
        row = digits(1, 5)
    arguments = {"input_ids": row}
    if padding in ("left", "right"):
        arguments = {
            "input_ids": pad_row(row[0], 8, padding, PAD),
            "attention_mask": pad_row(torch.ones_like(row[0]), 8, padding, 0),
        }
    if padding == "packed":
        arguments["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1]])
    real = arguments.get("attention_mask", torch.ones_like(row)).bool()
    if with_labels:
        noise = {
            "position_noise": torch.ones(real.shape),
            "times": torch.full((1, 3 if padding in ("left", "right", "packed") else 2), 0.5),
        }
        arguments |= noise | {"labels": arguments["input_ids"].masked_fill(~real, -100)}  # nothing is masked
    hidden_states = model(**arguments, output_hidden_states=True).hidden_states
    assert len(hidden_states) == 3
    shape = (*real.shape, 32)
    assert [state.shape for state in hidden_states] == [shape] * 3
    embeddings = model.model.embeddings(
        row, arguments.get("position_ids", torch.arange(row.shape[1])[None])[:, : row.shape[1]]
    )
    torch.testing.assert_close(hidden_states[0][real], embeddings[0])
    if not with_labels:
        logits = model.lm_head(hidden_states[-1])[real]
        torch.testing.assert_close(logits[:, :MASK], model(**arguments).logits[real][:, :MASK])
        assert torch.equal(model.model(**arguments).last_hidden_state[real], hidden_states[-1][real])
        # They are those of the tokens that are denoised, which the latent modulates.
        latents = torch.ones(1, 2 if padding in ("none", "last block") else 3, 4)
        others = model(**arguments, latents=latents, output_hidden_states=True).hidden_states
        for state, other in zip(hidden_states[1:], others[1:], strict=True):
            assert ((state - other)[real].abs().amax(-1) > 1e-3).all()


def test_hidden_states_may_be_selected_by_their_index():
    """As transformers has it: the others are None. The same with and without blocks."""
    x_t = some_masked(digits(2, 5))
    for block_size in (None, 3):
        model = tiny_model(block_size=block_size)
        every = model(x_t, output_hidden_states=True).hidden_states
        selected = model(x_t, output_hidden_states=[0, -1]).hidden_states
        assert [state is None for state in selected] == [False, True, False]
        assert torch.equal(selected[0], every[0]) and torch.equal(selected[-1], every[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Models that one with blocks contains
# ---------------------------------------------------------------------------------------------------------------------


def without_blocks(model):
    """The full-sequence model of the same weights."""
    other = of_the_same_weights(model, block_size=None)
    unexpected = model.state_dict().keys() - other.state_dict().keys()
    assert unexpected == ({"latent_encoder.before_proj.weight"} if model.config.latent_size else set())
    return other


@pytest.mark.parametrize("block_size", [7, 10])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_block_is_the_whole_sequence(objective, block_size):
    """Also if the row does not fill it."""
    blocks = tiny_model(block_size=block_size, objective=objective, kl_weight=0.7)
    whole = without_blocks(blocks)
    batch, noise = loss_batch(), block_noise(5, 7, 1)
    noise_of_rows = {name: value[:, 0] if name != "position_noise" else value for name, value in noise.items()}
    for given, given_of_rows in ((noise, noise_of_rows), ({}, {})):  # evaluation's own noise, too
        first, second = blocks(**batch, **given), whole(**batch, **given_of_rows)
        assert second.reconstruction_loss > 0 and second.kl > 0
        for name in SCALARS:
            torch.testing.assert_close(first[name], second[name])
        torch.testing.assert_close(first.kl_per_latent, second.kl_per_latent[:, None])
        torch.testing.assert_close(first.posterior_shift, second.posterior_shift[:, None])

    real, x_t, z = batch["attention_mask"].bool(), some_masked(batch["input_ids"]), normal(5, 4)
    for mask in (batch["attention_mask"], None):
        first = blocks(x_t, attention_mask=mask, latents=z[:, None]).logits
        second = whole(x_t, attention_mask=mask, latents=z).logits
        torch.testing.assert_close(*((first[real], second[real]) if mask is not None else (first, second)), **CLOSE)


def autoregressive(**overrides):
    settings = {"block_size": 1, "latent_size": 0, "objective": "per_sample", "objective_steps": [1]}
    return tiny_model(**settings, **overrides)


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_blocks_of_one_token_are_an_autoregressive_model(position):
    model, row = autoregressive(**POSITIONS[position]), digits(1, 7)[0]
    log_likelihood = []
    for index in range(7):
        prefix = torch.cat([row[:index], torch.tensor([MASK])])[None]
        log_likelihood.append(model(prefix).logits[0, index].log_softmax(-1)[row[index]])
    expected = -torch.stack(log_likelihood)
    assert expected.std() > 0.1

    output = model(input_ids=row[None], labels=row[None])
    torch.testing.assert_close(output.loss * 7, expected.sum())
    for seed in range(3):  # whatever the noise: there is one step, which reveals the token
        noise = block_noise(1, 7, 7, seed)
        del noise["latent_noise"]
        torch.testing.assert_close(model.train()(input_ids=row[None], labels=row[None], **noise).loss, output.loss)
    # Prompts are context, and so is what lies between.
    labels = row.clone()
    labels[[0, 1, 4]] = -100
    output = model.eval()(input_ids=row[None], labels=labels[None])
    torch.testing.assert_close(output.loss * 4, expected[[2, 3, 5, 6]].sum())


def test_the_probabilities_of_all_texts_of_an_autoregressive_model_sum_to_one():
    """Three tokens over a vocabulary of three: 27 texts."""
    model = randomise(
        VMDForMaskedDiffusion(
            tiny_config(
                vocab_size=4,
                mask_token_id=3,
                pad_token_id=None,
                block_size=1,
                latent_size=0,
                objective="per_sample",
                objective_steps=[1],
            )
        )
    ).eval()
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    probabilities = [math.exp(-3 * model(input_ids=text[None], labels=text[None]).loss.item()) for text in texts]
    assert max(probabilities) > 2 / 27
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def assert_loss_is_the_loop(model, batch, noise, **tolerance):
    with torch.no_grad():
        output = model(**batch, **noise)
        reconstruction, kl, kl_per_latent, shifts = slow_loss(model, **batch, **noise)
    tolerance = tolerance or CLOSE
    assert reconstruction > 0 and kl > 0
    torch.testing.assert_close(output.reconstruction_loss, reconstruction, **tolerance)
    torch.testing.assert_close(output.kl, kl, **tolerance)
    torch.testing.assert_close(output.loss, reconstruction + model.config.kl_weight * kl, **tolerance)
    torch.testing.assert_close(output.kl_per_latent, kl_per_latent, **tolerance)
    torch.testing.assert_close(output.posterior_shift, shifts, **tolerance)
    assert output.logits is None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("block_size", [2, 3, 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_loop_over_rows_and_blocks_and_tokens(objective, block_size, training):
    model = tiny_model(block_size=block_size, objective=objective, objective_steps=[2, 1, 4], kl_weight=0.7)
    model.train(training)
    for seed in (0, 100):
        assert_loss_is_the_loop(model, loss_batch(), block_noise(5, 7, -(-7 // block_size), seed))


def test_the_loss_with_null_latents_beside_others_is_the_loop():
    """Some blocks of a batch reveal enough tokens for a latent, some do not."""
    model = tiny_model(block_size=3, objective="per_step", objective_steps=[1, 2, 3], latent_min_tokens=2)
    assert_loss_is_the_loop(model, loss_batch(), block_noise(5, 7, 3))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("position", list(POSITIONS))
def test_the_loss_is_the_loop_for_all_positions_and_attention_implementations(position, implementation):
    model = tiny_model(block_size=3, num_latent_encoder_layers=2, **POSITIONS[position])
    model.set_attn_implementation(implementation)
    assert_loss_is_the_loop(model, loss_batch(), block_noise(5, 7, 3))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_with_a_learned_prior_is_the_loop(objective):
    model = tiny_model(block_size=3, prior="learned", objective=objective)
    assert_loss_is_the_loop(model, loss_batch(), block_noise(5, 7, 3))


@pytest.mark.parametrize("prior", ["standard", "learned"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_with_a_slice_of_the_latent_for_each_position_is_the_loop(objective, prior):
    model = tiny_model(block_size=3, latent_input="position_slices", latent_size=6, prior=prior, objective=objective)
    assert_loss_is_the_loop(model, loss_batch(), block_noise(5, 7, 3, latent_size=6))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_with_latents_in_the_inputs_of_positions_is_the_loop(objective):
    model = tiny_model(block_size=3, latent_input="layers_and_positions", objective=objective)
    assert_loss_is_the_loop(model, loss_batch(), block_noise(5, 7, 3))


def test_the_loss_of_whole_rows_without_a_mask_is_the_loop():
    model, input_ids = tiny_model(block_size=2), digits(3, 6)
    noise, ones = block_noise(3, 6, 3), torch.ones_like(input_ids)
    batch = {"input_ids": input_ids, "attention_mask": ones, "labels": input_ids}
    assert_loss_is_the_loop(model, batch, noise)
    without = model(input_ids=input_ids, labels=input_ids, **noise)
    torch.testing.assert_close(without.loss, model(**batch, **noise).loss)


@pytest.mark.parametrize("prior", ["standard", "learned"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_is_that_of_the_loop(objective, prior):
    """Also through the clean stream, both where it is attended to and where posterior and prior read it."""
    model = tiny_model(block_size=3, objective=objective, prior=prior).train()
    batch, noise = loss_batch(), block_noise(5, 7, 3)
    reconstruction, kl, *_ = slow_loss(model, **batch, **noise)
    expected = gradients_of(model, reconstruction + kl)
    actual = gradients_of(model, model(**batch, **noise).loss)
    assert_gradients_close(actual, expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_a_latent_the_loss_is_the_reconstruction(objective):
    model = tiny_model(block_size=3, latent_size=0, objective=objective, objective_steps=[2, 1, 3])
    batch = loss_batch()
    noise = block_noise(5, 7, 3, latent_size=0)
    with torch.no_grad():
        expected, *_ = slow_loss(model, **batch, **noise)
    del noise["latent_noise"]
    output = model(**batch, **noise)
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(output.loss, output.reconstruction_loss)
    assert output.kl == 0 and output.kl_per_latent is None and output.posterior_shift is None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_of_a_row_is_the_sum_over_its_blocks(objective):
    """With everything but one block as context, that block costs the same."""
    model, input_ids, noise = tiny_model(block_size=3, objective=objective), digits(2, 8), block_noise(2, 8, 3)
    noise["times"] = 0.6 + 0.3 * noise["times"]
    noise["position_noise"][:, ::3] = 0.0  # something is masked in every block
    together = model(input_ids=input_ids, labels=input_ids, **noise)
    parts = {name: 0.0 for name in SCALARS}
    for block in range(3):
        labels = torch.full_like(input_ids, -100)
        labels[:, 3 * block : 3 * block + 3] = input_ids[:, 3 * block : 3 * block + 3]
        output = model(input_ids=input_ids, labels=labels, **noise, num_items_in_batch=16)
        parts = {name: parts[name] + output[name] for name in SCALARS}
        torch.testing.assert_close(output.kl_per_latent[:, block], together.kl_per_latent[:, block])
        assert output.kl_per_latent.ne(0).sum() == 2  # that of the other blocks is 0
    for name in SCALARS:
        torch.testing.assert_close(parts[name], together[name])


def test_a_block_is_trained_without_sight_of_what_follows_and_with_sight_of_what_precedes():
    model, input_ids, noise = tiny_model(block_size=2), digits(1, 6), block_noise(1, 6, 3)
    noise["position_noise"][0, 2] = 0.0  # something is masked in the block in the middle
    labels = torch.full_like(input_ids, -100)
    labels[:, 2:4] = input_ids[:, 2:4]
    loss, posterior = (
        model(input_ids=input_ids, labels=labels, **noise)[name] for name in ("loss", "posterior_shift")
    )
    for column, seen in ((0, True), (1, True), (4, False), (5, False)):
        other = input_ids.clone()
        other[0, column] = (other[0, column] + 3) % 10
        output = model(input_ids=other, labels=labels, **noise)
        assert ((output.loss - loss).abs() > 1e-4) == seen
        assert ((output.posterior_shift[0, 1] - posterior[0, 1]).abs().max() > 1e-4) == seen


# ---------------------------------------------------------------------------------------------------------------------
# Padding, batches and packed rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", list(POSITIONS))
@pytest.mark.parametrize("length", [5, 6])
def test_padding_on_either_side_leaves_the_logits_of_a_row_alone(length, position, side):
    model = tiny_model(block_size=2, **POSITIONS[position])
    x_t, z = some_masked(digits(1, length)), normal(1, 5, 4)
    alone = model(x_t, latents=z[:, :3]).logits[0]
    mask = pad_row(torch.ones(length, dtype=torch.long), 9, side, 0)
    for pad_token in (PAD, 3):  # what padding holds does not matter, and is not how it is recognised
        padded = model(pad_row(x_t[0], 9, side, pad_token), attention_mask=mask, latents=z).logits[0]
        torch.testing.assert_close(padded[mask[0].bool()], alone, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", list(POSITIONS))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_on_either_side_leaves_the_loss_of_a_row_alone(objective, position, side):
    model, row = tiny_model(block_size=2, objective=objective, **POSITIONS[position]), digits(1, 5, seed=1)
    labels = row.clone()
    labels[0, 1] = -100
    padded_batch = {
        "input_ids": pad_row(row[0], 9, side, PAD),
        "attention_mask": pad_row(torch.ones_like(row[0]), 9, side, 0),
        "labels": pad_row(labels[0], 9, side, -100),
    }
    noise = block_noise(1, 5, 5)
    noise_alone = noise | {name: noise[name][:, :3] for name in ("times", "latent_noise")}
    noise_padded = noise | {"position_noise": pad_row(noise["position_noise"][0], 9, side, 0.0)}
    for given_alone, given_padded in ((noise_alone, noise_padded), ({}, {})):  # evaluation's own noise, too
        alone = model(input_ids=row, labels=labels, **given_alone)
        padded = model(**padded_batch, **given_padded)
        assert alone.loss > 0
        for name in SCALARS:
            torch.testing.assert_close(padded[name], alone[name], **CLOSE)
        for name in ("kl_per_latent", "posterior_shift"):
            torch.testing.assert_close(padded[name][:, :3], alone[name], **CLOSE)
            assert padded[name][:, 3:].eq(0).all()


PACKED = {
    "side by side": "AAAAABBBBBB",
    "padding between": "AAAAA..BBBBBB",
    "padding around": "..AAAAABBBBBB.",
    "padding everywhere": ".AA.AAA..BBB.BBB.",
    "a full block first": "AAAABBB",
    "three documents": "AAABCCCCC",
}


def packed_row(pattern, x_of, starts=None):
    """input_ids, attention_mask and position_ids (1, length) of documents by their letters, and those of each alone.

    `starts`: the first position of each document by its letter, 0 where it has none.
    """
    starts, counts, columns, mask, positions = starts or {}, {}, [], [], []
    for letter in pattern:
        count = counts.get(letter, 0)
        columns.append(PAD if letter == "." else x_of(letter)[count].item())
        positions.append(0 if letter == "." else starts.get(letter, 0) + count)
        mask.append(int(letter != "."))
        counts[letter] = count + 1
    counts.pop(".", None)
    packed = [torch.tensor([value]) for value in (columns, mask, positions)]
    alone = {
        letter: (x_of(letter)[:count][None], torch.arange(count)[None] + starts.get(letter, 0))
        for letter, count in counts.items()
    }
    return packed, alone


def text_of(letter):
    return digits(1, 10, seed=ord(letter))[0]


def columns_of(pattern, letter):
    return [index for index, other in enumerate(pattern) if other == letter]


@pytest.mark.parametrize("position", list(POSITIONS))
@pytest.mark.parametrize("case", list(PACKED))
def test_documents_of_a_packed_row_have_the_logits_of_rows_of_their_own(case, position):
    pattern, model = PACKED[case], tiny_model(block_size=4, **POSITIONS[position])
    (x_t, mask, position_ids), alone = packed_row(pattern, lambda letter: some_masked(text_of(letter)[None])[0])
    z = {letter: normal(1, -(-ids.shape[1] // 4), 4, seed=ord(letter)) for letter, (ids, _) in alone.items()}
    latents = torch.cat(list(z.values()), dim=1)
    packed = model(x_t, attention_mask=mask, position_ids=position_ids, latents=latents).logits[0]
    for letter, (ids, _) in alone.items():
        expected = model(ids, latents=z[letter]).logits[0]
        torch.testing.assert_close(packed[columns_of(pattern, letter)], expected, **CLOSE)
    if "." not in pattern:
        without_mask = model(x_t, position_ids=position_ids, latents=latents).logits[0]
        torch.testing.assert_close(without_mask, packed)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", list(PACKED))
def test_documents_of_a_packed_row_have_the_loss_of_rows_of_their_own(case, objective):
    pattern, model = PACKED[case], tiny_model(block_size=4, objective=objective)
    (input_ids, mask, position_ids), alone = packed_row(pattern, text_of)
    labels = input_ids.masked_fill(mask == 0, -100)
    num_blocks = {letter: -(-ids.shape[1] // 4) for letter, (ids, _) in alone.items()}
    noise = block_noise(1, len(pattern), sum(num_blocks.values()))
    for given in (noise, {}):  # evaluation's own noise, too
        packed = model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, labels=labels, **given)
        sums, kl_per_latent, block = dict.fromkeys(SCALARS, 0.0), [], 0
        for letter, (ids, _) in alone.items():
            own = slice(block, block + num_blocks[letter])
            block = own.stop
            given_alone = {}
            if given:
                given_alone = {name: noise[name][:, own] for name in ("times", "latent_noise")}
                given_alone["position_noise"] = noise["position_noise"][:, columns_of(pattern, letter)]
            output = model(input_ids=ids, labels=ids, **given_alone)
            sums = {name: sums[name] + output[name] * ids.shape[1] for name in SCALARS}
            kl_per_latent.append(output.kl_per_latent)
        for name in SCALARS:
            torch.testing.assert_close(packed[name] * int(mask.sum()), sums[name], **CLOSE)
        torch.testing.assert_close(packed.kl_per_latent, torch.cat(kl_per_latent, dim=1), **CLOSE)


@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_packed_document_that_starts_later_has_the_posterior_of_a_row_of_its_own(start):
    """Its first block has nothing before it, although the last block of the other document is not full."""
    model, pattern = tiny_model(block_size=4), "AAAAABBBB"
    (input_ids, _, position_ids), alone = packed_row(pattern, text_of, starts={"B": start})
    (ids, own_positions), num_blocks = alone["B"], 1 + (start + 3) // 4
    noise = block_noise(1, 9, 2 + num_blocks) | {"times": torch.ones(1, 2 + num_blocks)}  # everything is masked
    packed = model(input_ids=input_ids, position_ids=position_ids, labels=input_ids, **noise)
    noise = {name: value[:, 5:] if name == "position_noise" else value[:, 2:] for name, value in noise.items()}
    expected = model(input_ids=ids, position_ids=own_positions, labels=ids, **noise)
    assert expected.posterior_shift.ne(0).any(-1).all()
    torch.testing.assert_close(packed.posterior_shift[:, 2:], expected.posterior_shift, **CLOSE)


def test_documents_of_a_packed_row_see_nothing_of_one_another():
    model, input_ids = tiny_model(block_size=2), digits(1, 7)
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    logits = model(input_ids, position_ids=position_ids).logits[0, :, :MASK]
    for column, others in ((2, slice(3, 7)), (3, slice(0, 3))):
        other = input_ids.clone()
        other[0, column] = (other[0, column] + 3) % 10
        difference = (model(other, position_ids=position_ids).logits[0, :, :MASK] - logits).abs().amax(-1)
        assert difference[others].eq(0).all()
        assert difference[column] > 1e-4


def test_evaluation_gives_equal_blocks_of_a_row_noise_of_their_own():
    model = tiny_model(block_size=64, max_position_embeddings=256, latent_size=0)
    seen, input_ids = spy_on_noisy_inputs(model), digits(1, 64).repeat(1, 4)
    for given in ({}, {"times": torch.full((1, 4), 0.5)}):
        with torch.no_grad():
            model(input_ids=input_ids, labels=input_ids, **given)
        masks = (seen[-1] == MASK).view(4, 64)
        assert len({tuple(mask) for mask in masks.tolist()}) == 4
        shares = masks.float().mean(-1)
        # At t = 1/2 the standard error of a share is 1/16; four times of their own are further apart than that.
        assert ((shares - 0.5).abs().max() < 4 / 16) == bool(given)


# ---------------------------------------------------------------------------------------------------------------------
# Noise and context
# ---------------------------------------------------------------------------------------------------------------------


def test_training_draws_a_time_for_every_block_stratified_over_the_batch():
    """The shares of masked tokens of the 2 x 4 blocks are spread as eight strata of (0, 1]."""
    model = tiny_model(block_size=400, max_position_embeddings=1600, latent_size=0, num_hidden_layers=1).train()
    seen, input_ids = spy_on_noisy_inputs(model), digits(2, 1600)
    shares = []
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=input_ids, labels=input_ids)
            shares.append((seen[-1] == MASK).view(8, 400).float().mean(-1))
    # Standard error of one share: at most 1/sqrt(4 * 400) = 0.025 from the masks.
    middle = (torch.arange(8) + 0.5) / 8
    for share in shares:
        assert (share.sort().values - middle).abs().max() < 1 / 16 + 4 * 0.025
    assert not torch.equal(shares[0].argsort(), shares[1].argsort())  # which block gets which is drawn


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_context_is_never_masked_and_everything_else_is(objective, training):
    model, ever_masked = tiny_model(block_size=2, objective=objective).train(training), 0
    seen = spy_on_noisy_inputs(model)
    context = torch.tensor([[True, False, False, False, False, False], [False, False, True, True, False, True]])
    for seed in range(30):
        input_ids = digits(2, 6, seed=seed)
        with torch.no_grad():
            model(input_ids=input_ids, labels=input_ids.masked_fill(context, -100))
        masked = seen[-1] == MASK
        assert torch.equal(seen[-1][~masked], input_ids[~masked])
        ever_masked = ever_masked + masked.int()
    assert torch.equal(ever_masked > 0, ~context)


def test_the_noise_decides_what_is_masked_in_which_block():
    model, input_ids = tiny_model(block_size=2), digits(2, 6)
    seen = spy_on_noisy_inputs(model)
    times = torch.tensor([[0.1, 0.5, 1.0], [1.0, 0.5, 0.1]])
    model(
        input_ids=input_ids, labels=input_ids, times=times, position_noise=torch.tensor([0.05, 0.3] * 3).expand(2, 6)
    )
    expected = [[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    assert (seen[0] == MASK).int().tolist() == expected


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_block_of_context_costs_nothing(objective, training):
    model, input_ids = tiny_model(block_size=2, objective=objective).train(training), digits(2, 6)
    labels = input_ids.clone()
    labels[:, 2:4] = -100
    noise = block_noise(2, 6, 3)
    noise["position_noise"] *= noise["times"].min()  # everything else is masked
    output = model(input_ids=input_ids, labels=labels, **noise)
    assert output.kl_per_latent.ne(0).tolist() == [[True, False, True]] * 2
    assert output.posterior_shift.ne(0).any(-1).tolist() == [[True, False, True]] * 2
    gradients = gradients_of(model, output.loss)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for name, value in noise.items():  # its noise plays no part
        other = value.clone()
        other[:, 2 : 4 if name == "position_noise" else 1] *= 0.5
        if name != "position_noise":
            other[:, 1] *= 0.5
        assert torch.equal(model(input_ids=input_ids, labels=labels, **(noise | {name: other})).loss, output.loss)


@pytest.mark.parametrize("training", [False, True])
def test_a_block_with_nothing_masked_costs_nothing(training):
    """Chance may leave a block unmasked under `vmd`; the other objectives always reveal something."""
    model, input_ids = tiny_model(block_size=2).train(training), digits(1, 6)
    noise = block_noise(1, 6, 3) | {"position_noise": torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0, 0.0]])}
    output = model(input_ids=input_ids, labels=input_ids, **noise)
    assert output.kl_per_latent.ne(0).tolist() == [[True, False, True]]
    labels = input_ids.clone()
    labels[:, 2:4] = -100
    without = model(input_ids=input_ids, labels=labels, **noise, num_items_in_batch=6)
    for name in SCALARS:
        torch.testing.assert_close(output[name], without[name])
    gradients = gradients_of(model, output.loss)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_of_context_and_a_row_of_padding_cost_nothing(objective, implementation):
    model = tiny_model(block_size=3, objective=objective).train()
    model.set_attn_implementation(implementation)
    input_ids, mask = digits(2, 5), torch.tensor([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    output = model(input_ids=input_ids, attention_mask=mask, labels=torch.full_like(input_ids, -100))
    for name in SCALARS:
        assert output[name] == 0
    assert output.kl_per_latent.tolist() == [[0, 0], [0, 0]]
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    logits = model(input_ids, attention_mask=mask).logits
    assert logits[0, :4, :MASK].isfinite().all()
    assert not logits.isnan().any()


# ---------------------------------------------------------------------------------------------------------------------
# Gradients, precision, and what transformers expects
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_reconstruction_reaches_every_parameter(objective):
    """The latent encoder, what it reads of the context and the conditioner, through z: the KL term is switched off."""
    model = tiny_model(block_size=3, objective=objective, kl_weight=0).train()
    gradients = gradients_of(model, model(**loss_batch(), **block_noise(5, 7, 3)).loss)
    assert {"latent_encoder.before_proj.weight", "model.conditioner.in_proj.weight"} < gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("settings", [{}, {"use_reentrant": False}])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(settings):
    batch, noise, losses, gradients, num_calls = loss_batch(), block_noise(5, 7, 3), [], [], []
    for checkpointing in (False, True):
        model, calls = tiny_model(block_size=3).train(), []
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings or None)
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        losses.append(model(**batch, **noise).loss)
        gradients.append(gradients_of(model, losses[-1]))
        num_calls.append(len(calls))
    assert num_calls == [2, 4]  # clean and noisy, and both again
    torch.testing.assert_close(losses[1], losses[0])
    assert_gradients_close(gradients[1], gradients[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_give_the_gradient_of_the_whole_batch(objective):
    model, batch, noise = tiny_model(block_size=3, objective=objective).train(), loss_batch(4), block_noise(4, 7, 3)
    batch["labels"][3] = torch.where(torch.arange(7) == 6, batch["input_ids"][3], -100)  # unequal numbers of labels
    num_items = (batch["labels"] != -100).sum()
    whole = gradients_of(model, model(**batch, **noise).loss)
    model.zero_grad()
    for start in (0, 2):
        part = {name: value[start : start + 2] for name, value in (batch | noise).items()}
        model(**part, num_items_in_batch=num_items).loss.backward()
    assert_gradients_close({name: parameter.grad for name, parameter in model.named_parameters()}, whole)


@pytest.mark.parametrize("length, num_blocks", [(8, 2), (9, 3), (1, 1)])
def test_what_belongs_to_a_latent_has_one_entry_for_each_block(length, num_blocks):
    input_ids = digits(3, length)
    output = tiny_model(block_size=4)(input_ids=input_ids, labels=input_ids)
    assert output.kl_per_latent.shape == (3, num_blocks)
    assert output.posterior_shift.shape == (3, num_blocks, 4)
    assert output.loss.shape == output.reconstruction_loss.shape == output.kl.shape == ()
    for name in (*SCALARS[1:], "kl_per_latent", "posterior_shift"):
        assert not output[name].requires_grad


def train_on_counting(folder, **settings):
    """A few steps on rows that count up from a random digit."""
    torch.manual_seed(0)
    model = VMDForMaskedDiffusion(tiny_config(block_size=2, initializer_range=0.1, **settings))
    ids = (torch.randint(0, 10, (128, 1)) + torch.arange(6)) % 10
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}).with_format("torch")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=16,
            max_steps=24,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=8,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows.select(range(20)),
        data_collator=default_data_collator,
        callbacks=[VMDMetricsCallback()],
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_plain_trainer_trains_and_logs(objective, tmp_path):
    trainer = train_on_counting(tmp_path, objective=objective)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [8, 16, 24]
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["reconstruction_loss"] + entry["kl"], abs=2e-3)
        assert entry["active_units"] in range(5)
        assert entry["kl_per_latent"] >= 0
    # Guessing costs log 10 nats a token under each objective; all tokens but those of the first block can be known.
    assert logs[-1]["reconstruction_loss"] < min(logs[0]["reconstruction_loss"], 0.8 * math.log(10))

    metrics = trainer.evaluate()
    ids = trainer.eval_dataset["input_ids"][:]
    with torch.no_grad():
        direct = trainer.model.eval()(input_ids=ids, labels=ids)
    for name in SCALARS:
        assert metrics[f"eval_{name}"] == pytest.approx(direct[name].item(), rel=1e-4, abs=1e-6)
    shift = direct.posterior_shift.flatten(0, 1)
    variance = shift[(shift != 0).any(-1)].var(0, correction=0)
    assert metrics["eval_active_units"] == int((variance > 0.01).sum())
    assert metrics["eval_kl_per_latent"] == pytest.approx(direct.kl_per_latent.mean().item(), rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "latents, got",
    [
        (torch.zeros(2, 4), r"\(2, 4\)"),
        (torch.zeros(2, 2, 4), r"\(2, 2, 4\)"),
        (torch.zeros(1, 3, 4), r"\(1, 3, 4\)"),
        (torch.zeros(2, 3, 5), r"\(2, 3, 5\)"),
        (torch.zeros(6, 4), r"\(6, 4\)"),
    ],
)
def test_latents_of_a_wrong_shape_are_an_error(latents, got):
    model, x_t = tiny_model(block_size=2), digits(2, 5)
    for module in (model, model.model):
        with pytest.raises(ValueError, match=r"latents must have shape.*\(2, 3, 4\), got " + got):
            module(x_t, latents=latents)


@pytest.mark.parametrize(
    "noise, message",
    [
        ({"times": torch.ones(2)}, r"times must have shape \(2, 3\), got \(2,\)"),
        ({"times": torch.ones(2, 2)}, r"times must have shape \(2, 3\), got \(2, 2\)"),
        ({"times": torch.ones(6)}, r"times must have shape \(2, 3\), got \(6,\)"),
        ({"latent_noise": torch.ones(2, 4)}, r"latent_noise must have shape \(2, 3, 4\), got \(2, 4\)"),
        ({"latent_noise": torch.ones(6, 4)}, r"latent_noise must have shape \(2, 3, 4\), got \(6, 4\)"),
        ({"latent_noise": torch.ones(2, 3, 3)}, r"latent_noise must have shape \(2, 3, 4\), got \(2, 3, 3\)"),
        ({"position_noise": torch.ones(2, 6)}, r"position_noise must have shape \(2, 5\), got \(2, 6\)"),
        ({"position_noise": torch.ones(2, 3, 2)}, r"position_noise must have shape \(2, 5\), got \(2, 3, 2\)"),
        ({"latents": torch.zeros(2, 3, 4)}, "latents must be None when labels are given"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_noise_of_a_wrong_shape_is_an_error(noise, message, training):
    model, input_ids = tiny_model(block_size=2).train(training), digits(2, 5)
    model(input_ids=input_ids, labels=input_ids)
    with pytest.raises(ValueError, match=message):
        model(input_ids=input_ids, labels=input_ids, **noise)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("time", [-0.1, 0.0, 1.0, 1.5])
def test_times_out_of_range_are_an_error(time, objective):
    """One number among good ones is enough. `vmd` has times in (0, 1], the few-step objectives numbers in [0, 1)."""
    model, input_ids, times = tiny_model(block_size=2, objective=objective), digits(2, 4), torch.full((2, 2), 0.5)
    times[1, 0] = time
    if time == (1.0 if objective == "vmd" else 0.0):
        assert model(input_ids=input_ids, labels=input_ids, times=times).loss.isfinite()
        return
    with pytest.raises(ValueError, match=r"times must lie in \(0, 1\]" if objective == "vmd" else r"\[0, 1\)"):
        model(input_ids=input_ids, labels=input_ids, times=times)


@pytest.mark.parametrize("position", ["learned", "groups"])
def test_more_tokens_than_a_position_table_has_are_an_error(position):
    """Only tokens count, not what fills up the last block, nor padding."""
    model = tiny_model(block_size=5, **POSITIONS[position])
    ids = digits(1, 16)
    assert model(ids).logits.shape == (1, 16, 12)
    padded, mask = pad_row(ids[0], 20, "left", PAD), pad_row(torch.ones_like(ids[0]), 20, "left", 0)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 4:], model(ids).logits, **CLOSE)
    packed = torch.arange(16).repeat(2)[None]
    assert model(digits(1, 32), position_ids=packed).logits[..., :MASK].isfinite().all()
    for arguments in (
        {"input_ids": digits(1, 17)},
        {"input_ids": digits(1, 17), "labels": digits(1, 17)},
        {"input_ids": ids, "position_ids": torch.arange(1, 17)[None]},
    ):
        with pytest.raises(ValueError, match="at most max_position_embeddings = 16"):
            model(**arguments)


FEWEST = {"block_size": 4, "objective": "per_step", "objective_steps": [1, 2, 4]}


@pytest.mark.parametrize(
    "settings",
    [{}, {"prior": "learned"}, {"latent_input": "layers_and_positions"}, {"latent_input": "position_slices"}],
)
def test_steps_that_reveal_few_tokens_are_those_of_a_model_without_a_latent(settings):
    every = tiny_model(**FEWEST, **settings)
    large = of_the_same_weights(every, latent_min_tokens=3)
    several = of_the_same_weights(large, objective_draws=3)
    plain = {"prior": "standard", "latent_input": "layers"}
    mdm = of_the_same_weights(every, latent_size=0, **plain)
    ids, masks = digits(6, 8), torch.full((6, 8), MASK)
    for steps in (1, 2, 4):  # of four tokens, two, and one
        losses = []
        for model in (every, large, mdm):
            model.config.objective_steps = [steps]
            losses.append(model(input_ids=ids, labels=ids, noise_seeds=torch.arange(6)))
        bounds = [
            nelbo(model, ids, None, num_steps=steps, bound="per_step", generator=seeded(0)) for model in (large, mdm)
        ]
        bounds.append(nelbo(every, ids, num_steps=steps, bound="per_step", generator=seeded(0)))
        texts = []
        for model in (large, every):
            generators = [seeded(row) for row in range(6)]
            texts.append(model.generate(masks, num_steps=steps, do_sample=True, generator=generators))
        if steps == 1:
            assert losses[1].loss == losses[0].loss and torch.equal(losses[1].kl_per_latent, losses[0].kl_per_latent)
            assert torch.equal(bounds[0].nelbo, bounds[2].nelbo) and (bounds[0].kl > 0.01).all()
            assert torch.equal(*texts)
        else:
            torch.testing.assert_close(losses[1].loss, losses[2].loss)
            several.config.objective_steps = [steps]
            of_draws = several(input_ids=ids, labels=ids, noise_seeds=torch.arange(6)).loss
            torch.testing.assert_close(of_draws, losses[2].loss)
            assert losses[1].kl == 0 and (losses[1].kl_per_latent == 0).all()
            torch.testing.assert_close(bounds[0].nelbo, bounds[1].nelbo)
            assert (bounds[0].kl == 0).all() and (bounds[2].kl > 0.01).all()
            assert not torch.equal(*texts)


@pytest.mark.parametrize("settings, passes", [({"num_steps": 1}, 3), ({"num_steps": 2}, 4), ({"num_steps": 4}, 8)])
def test_a_learned_prior_is_read_only_where_a_step_reveals_enough_tokens(settings, passes):
    """Two blocks of 4; the second one's prior costs a pass, left out where all steps have the null latent."""
    model = tiny_model(**FEWEST, prior="learned", latent_min_tokens=3)
    output = model.generate(torch.full((1, 8), MASK), return_dict_in_generate=True, **settings)
    assert output.num_forward_passes.tolist() == [passes]


def test_with_a_confidence_threshold_all_that_is_masked_may_be_revealed():
    model = tiny_model(**FEWEST, latent_min_tokens=3)
    seen, for_steps = [], model.model.for_steps
    model.model.for_steps = lambda vectors, number: seen.append(number.tolist()) or for_steps(vectors, number)
    model.generate(torch.full((1, 4), MASK), confidence_threshold=0.999)  # one at a time
    assert seen == [[[4]], [[3]], [[2]], [[1]]]


def test_latent_min_tokens_is_for_single_steps():
    with pytest.raises(ValueError, match='latent_min_tokens must be at least 1, and 1 unless objective is "per_step"'):
        tiny_config(latent_min_tokens=2)
