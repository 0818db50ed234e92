"""The denoiser, the posterior and the loss by hand: both streams of a row in one sequence of twice the length, with an
explicit mask; the loss row by row, block by block and token by token. Of a whole sequence there is one block."""

import math

import torch
from helpers import MASK, of_the_same_weights
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F


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


def width_of(config, length):
    return config.block_size or length


def dense_two_streams(model, clean, x_t, latents):
    """Hidden states (length, hidden_size) of the clean and of the noisy stream, for one row of one document.

    clean, x_t: (length,). latents: (blocks, latent_size); they modulate the noisy stream only.
    """
    config, length = model.config, len(clean)
    width, positions = width_of(config, length), torch.arange(length).repeat(2)
    token = [(position // width, 0, index < length) for index, position in enumerate(positions.tolist())]
    mask = torch.tensor([[0.0 if sees(query, key) else -math.inf for key in token] for query in token])
    h = embed(model, torch.cat([clean, x_t]), positions)
    if config.latent_size and config.latent_input != "position_slices":
        vectors = condition(model, latents)  # (blocks, conditioning_size + 1)
    for position in range(length if config.latent_input != "layers" else 0):
        block, place = divmod(position, width)
        weight = model.model.position_inputs.weight
        if config.latent_input == "position_slices":
            h[length + position] += weight @ condition(model, slices_of(config, latents[block])[place])
        else:
            h[length + position] += weight.view(-1, config.hidden_size, weight.shape[1])[place] @ vectors[block]
    for layer in [*model.model.layers] * config.num_loops:
        changes = None
        if layer.modulation is not None:
            of_tokens = (vectors @ layer.modulation.weight.T)[positions[length:] // width]
            changes = torch.cat([torch.zeros_like(of_tokens), of_tokens])
        h = dense_layer(layer, config, h, positions, mask, changes)
    h = layer_norm(h, model.model.norm, config.norm_eps)
    return h[:length], h[length:]


def slices_of(config, values):
    """(..., latent_size) to (..., positions, size of a slice)."""
    return values.view(*values.shape[:-1], config.block_size or config.max_position_embeddings, -1)


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


def scored_by_hand(config, masked, revealed):
    """The tokens whose cross-entropies a step adds up, and the share of their sum that counts: its expectation over
    the tokens that it reveals, unless a latent was told of them."""
    if config.objective == "per_step" and config.latent_size and len(revealed) >= config.latent_min_tokens:
        return revealed, 1.0
    return masked, len(revealed) / len(masked)


def before_block(model, start, clean_hidden_states):
    return clean_hidden_states[start - 1] if start else torch.zeros(model.config.hidden_size)


def posterior_of_block(model, row, start, end, masked, revealed, clean_hidden_states):
    """Mean and log-variance, each (latent_size,), of q for the block from `start` to `end`."""
    encoder, config, positions = model.latent_encoder, model.config, torch.arange(start, end)
    flags = [1 if i in revealed else 2 if i in masked else 0 for i in range(start, end)]
    h = embed(model, row[start:end], positions) + encoder.embed_flags.weight[flags]
    if config.block_size is not None:
        h = h + encoder.before_proj.weight @ before_block(model, start, clean_hidden_states)
    for layer in encoder.layers:
        h = dense_layer(layer, config, h, positions)
    h = layer_norm(h, encoder.norm, config.norm_eps)
    if config.latent_input == "position_slices":  # the prior, but for the slices of what is revealed
        slices = list(slices_of(config, prior_of_block(model, start, clean_hidden_states)).unbind(1))
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
    config, width = model.config, width_of(model.config, len(row))
    reconstruction, kl, kl_of_blocks, shifts = torch.zeros(()), torch.zeros(()), [], []
    if not len(row):
        return reconstruction, kl, kl_of_blocks, shifts
    no_latents = torch.zeros(-(-len(row) // width), config.latent_size)
    clean_hidden_states, _ = dense_two_streams(model, row, row, no_latents)
    for block, start in enumerate(range(0, len(row), width)):
        end = min(start + width, len(row))
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
            latents = latents if config.block_size else latents[:, 0]
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


def slow_loss(model, input_ids, attention_mask, labels, times, position_noise, latent_noise=None):
    """Reconstruction and KL over the number of labels; KL and shifts (..., latent_size) of the shape of `times`."""
    totals, kl_per_latent = torch.zeros(2), torch.zeros(len(times), times[0].numel())
    shifts = torch.zeros(*kl_per_latent.shape, model.config.latent_size)
    latent_noise = shifts if latent_noise is None else latent_noise.view(shifts.shape)
    for index in range(len(input_ids)):
        keep = attention_mask[index].nonzero().flatten()
        noise = times.view(kl_per_latent.shape)[index], position_noise[index, keep], latent_noise[index]
        *terms, kl, shift = slow_row(model, input_ids[index, keep], labels[index, keep], *noise)
        totals = totals + torch.stack(terms)
        for block, (of_block, shift_of_block) in enumerate(zip(kl, shift, strict=True)):
            kl_per_latent[index, block], shifts[index, block] = of_block, shift_of_block
    return (
        *(totals / (labels != -100).sum()),
        kl_per_latent.view_as(times),
        shifts.view(*times.shape, model.config.latent_size),
    )
