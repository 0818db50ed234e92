"""The training objectives, formula and code (arXiv 2510.23606, equation of L_VMD, and its few-step relatives).

A block (or a whole sequence) of clean tokens x_0 is corrupted to x_t: the tokens of M_t are masked, and those of A_k,
a part of them, are revealed now. z is the block's latent, T_n the number of steps of a sampler that takes at most one
a token. Each block pays, in nats,

    vmd          1/t ( R(M_t) + beta KL( q(z | x_0, x_t) || p(z) ) )             t ~ U(0, 1], each token masked w.p. t
    per_sample   T_n R(A_k)   + beta KL( q(z | x_0, all masked) || p(z) )        k ~ U{1..T_n}, T drawn from a list
    per_step     T_n ( R(A_k) + beta KL( q(z | x_0, x_t, A_k) || p(z) ) )        the same

    R(A) = E_q [ - sum_{i in A} log p(x_0^i | x_t, z) ]

`vmd` is the paper's. `per_sample` is the likelihood bound of the few-step sampler that keeps one z, `per_step` that of
the sampler with a latent per step. Where z does not depend on A_k (or there is none), R(A_k) is replaced by its
expectation over A_k, a share of R(M_t) (see `scored_tokens`). The sum over the batch is divided by its number of
labelled tokens, or by `num_items_in_batch`.

With a chain (`chain_vmd.py`) or a causal head (`causal_vmd.py`) there is no KL, and R(A_k) = -log p(x_{A_k} | x_t),
the joint probability, is exact. For a chain its expectation over A_k is estimated by the mean over as many disjoint
sets of that size as M_t has room for.

The same pieces, corruption aside, make the likelihood bounds (`vmd_hf.nelbo`).
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .blocks_vmd import CleanContext, Layout
from .chain_vmd import chain_log_probs
from .checks_vmd import check_keywords, check_labels, check_noise, check_shape
from .latents_vmd import draw_latents, gaussian_kl, standardised
from .noise_vmd import (
    Corruption,
    corrupt_at_time,
    corrupt_before_step,
    hashed_noise,
    scored_tokens,
    seeded_noise,
    training_noise,
)

LARGEST_LOGITS = 2**25  # numbers, 128 MB; more are computed in parts, where torch can


@dataclass
class CleanBatch:
    """Clean rows on the model's grid of N blocks (1 for whole sequences), and what all their corruptions share.

    Attributes:
        layout: Of the grid.
        x_0: (batch, N, width) int64.
        maskable: (batch, N, width) bool, the labelled tokens.
        context: With blocks, the clean tokens that they see, read once.
        before: With blocks, (batch, N, hidden): the clean hidden state before each block.
        prior: Mean and log-variance of a learned prior, each (batch, N, latent_size); none: N(0, I).
        clean_states: In training with `causal_loss_weight`, (batch, N * width, hidden) of the clean tokens.
    """

    layout: Layout
    x_0: torch.Tensor
    maskable: torch.Tensor
    context: CleanContext | None = None
    before: torch.Tensor | None = None
    prior: tuple[torch.Tensor, ...] = ()
    clean_states: torch.Tensor | None = None

    def select(self, rows: torch.Tensor) -> "CleanBatch":
        """The batch that is made of these rows (int64, any number of times each)."""
        return CleanBatch(
            self.layout.select(rows),
            self.x_0[rows],
            self.maskable[rows],
            None if self.context is None else self.context.select(rows),
            None if self.before is None else self.before[rows],
            tuple(part[rows] for part in self.prior),
        )


@dataclass
class Loss:
    """What `VMDForMaskedDiffusion.forward` returns of a loss (see its output), the denoiser's own output, and the
    layout of its rows."""

    loss: torch.Tensor
    reconstruction_loss: torch.Tensor
    kl: torch.Tensor
    kl_per_latent: torch.Tensor | None
    posterior_shift: torch.Tensor | None
    outputs: object
    layout: Layout


def read_clean(model, input_ids, labels=None, attention_mask=None, position_ids=None) -> CleanBatch:
    """Lays out clean rows (batch, length) with their labels (default: all tokens but padding), and reads the context
    of their blocks.

    Raises:
        ValueError: for wrong shapes, or labels that differ from the inputs or have no probability.
    """
    layout = model.model.lay_out(input_ids, attention_mask, position_ids)
    if labels is None:
        labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)
    check_labels(input_ids, labels, attention_mask, model.config)
    clean = layout.scatter(input_ids, 0)
    batch = CleanBatch(layout, layout.blocks(clean), layout.blocks(layout.scatter(labels != -100, False)))
    if model.config.block_size is not None:
        hidden_states, batch.context = model.model.read(clean, layout)
        batch.before = last_before_blocks(hidden_states, layout)
        if model.training and model.config.causal_loss_weight:
            batch.clean_states = hidden_states
        if model.model.latent_prior is not None:
            batch.prior = model.model.latent_prior(batch.before)
    return batch


def last_before_blocks(hidden_states: torch.Tensor, layout: Layout) -> torch.Tensor:
    """For each block the clean hidden state of the token before it, 0 where it is the first of its document.

    (batch, N * width, hidden) to (batch, N, hidden).
    """
    last, document = layout.blocks(hidden_states)[:, :, -1], layout.blocks(layout.document)
    follows = (document[:, 1:, 0] == document[:, :-1, -1]) & (document[:, 1:, 0] >= 0)
    return F.pad(last[:, :-1] * follows[..., None], (0, 0, 1, 0))


def corrupt(
    model,
    batch: CleanBatch,
    times: torch.Tensor | None = None,
    position_noise: torch.Tensor | None = None,
    latent_noise: torch.Tensor | None = None,
    noise_seeds: torch.Tensor | None = None,
) -> tuple[Corruption, torch.Tensor]:
    """M_t, A_k and w of each block, (batch, N, ...), and the noise of its latent (batch, N, latent_size).

    Noise that is not given is drawn in training mode and hashed from the tokens in evaluation mode, or a function of
    `noise_seeds`; shapes as in `VMDForMaskedDiffusion.forward`, but `position_noise`, which is on the grid.
    """
    config, layout, (rows, num_blocks, _) = model.config, batch.layout, batch.x_0.shape
    per_block = (config.gaussian_size,)
    given_shape = (rows,) if config.block_size is None else (rows, num_blocks)
    check_noise(times, latent_noise, given_shape, per_block, config)
    if noise_seeds is not None:
        check_shape("noise_seeds", noise_seeds, (rows,))
        noise = seeded_noise(noise_seeds, batch.maskable, layout.blocks(layout.position_ids), per_block)
    elif model.training:
        noise = training_noise(batch.maskable, per_block, model.tp_size or 1)
    else:
        real = None if layout.real is None else layout.blocks(layout.real)
        noise = hashed_noise(batch.x_0, real, layout.blocks(layout.position_ids), per_block)
    if times is None and config.objective == "vmd":
        noise.times = config.time_epsilon + (1 - config.time_epsilon) * noise.times
    elif times is not None:
        noise.times = times.view(rows, num_blocks)
    if position_noise is not None:
        noise.positions = layout.blocks(position_noise)
    if latent_noise is not None:
        noise.latents = latent_noise.view(rows, num_blocks, *per_block)
    if config.objective == "vmd":
        corruption = corrupt_at_time(batch.maskable, noise.times, noise.positions)
    else:
        corruption = corrupt_before_step(
            batch.maskable, noise.times, noise.positions, config.objective_steps, config.left_to_right
        )
    return corruption, noise.latents


def posterior(model, batch: CleanBatch, masked: torch.Tensor, revealed: torch.Tensor):
    """Mean and log-variance of q(z | x_0, ...) of the model's objective, each (batch, N, latent_size) float32.

    Args:
        masked, revealed: (batch, N, width) bool, M_t and A_k. The objective says what of them q depends on.
    """
    layout = batch.layout
    if model.config.objective == "per_sample":
        masked = revealed = batch.maskable
    elif model.config.objective == "vmd":
        revealed = masked
    embeddings = model.model.embeddings(batch.x_0.flatten(1), layout.position_ids)
    position_ids = layout.blocks(layout.position_ids).flatten(0, 1)
    real = None
    if layout.real is not None:
        real = layout.blocks(layout.real).flatten(0, 1)
        real = real | ~real.any(-1, keepdim=True)  # a block of padding alone may attend to itself
    embeddings, masked, revealed = (
        part.flatten(0, 1) for part in (layout.blocks(embeddings), masked, revealed)
    )  # every block a row of its own
    statistics = model.latent_encoder(
        embeddings,
        masked,
        revealed,
        position_ids,
        model.model.attention_context(embeddings, real, position_ids),
        None if batch.before is None else batch.before.flatten(0, 1),
        tuple(part.flatten(0, 1) for part in batch.prior),
    )
    return tuple(part.unflatten(0, batch.x_0.shape[:2]) for part in statistics)


def denoise(model, batch: CleanBatch, masked: torch.Tensor, num_revealed: torch.Tensor, latents=None, **kwargs):
    """One pass over x_t: the denoiser's output, on the grid.

    Args:
        masked: (batch, N, width) bool, M_t.
        num_revealed: (batch, N), tokens revealed now: fewer than `latent_min_tokens` have the null latent.
        latents: (batch, N, latent_size), or `None` for a model without a latent.
    """
    conditioning = None
    if latents is not None:
        conditioning = model.model.for_steps(model.model.condition(latents), num_revealed)
    x_t = batch.x_0.masked_fill(masked, model.config.mask_token_id).flatten(1)
    return model.model(
        x_t, layout=batch.layout, conditioning=conditioning, context=batch.context, return_dict=True, **kwargs
    )


def given_earlier(model, hidden_states: torch.Tensor, batch: CleanBatch, revealed: torch.Tensor) -> torch.Tensor:
    """Hidden states (batch, N * width, hidden) of the denoiser; with a causal head those of revealed tokens (batch, N,
    width) given the ones to their left in the same step."""
    if model.causal_head is None:
        return hidden_states
    with torch.autocast(hidden_states.device.type, enabled=False):
        embeddings = model.get_input_embeddings()(batch.x_0.flatten(0, 1))
        blocks = batch.layout.blocks(hidden_states).flatten(0, 1)
        return model.causal_head(blocks, embeddings, revealed.flatten(0, 1)).view_as(hidden_states)


def block_cross_entropy(model, hidden_states: torch.Tensor, x_0: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(x_0^i | x_t, z) over the scored tokens of each block, (batch, N) float32, in nats.

    Args:
        hidden_states: (batch, N * width, hidden), of the denoiser.
        x_0, scored: (batch, N, width). Logits are computed for scored tokens only.
    """
    scored = scored.flatten()
    index = scored.nonzero().squeeze(-1)
    states, tokens = hidden_states.flatten(0, 1)[index], x_0.flatten()[index]
    if index.shape[0] * model.config.vocab_size > LARGEST_LOGITS and has_plain_head(model, states):
        losses = cross_entropy_in_parts(model, states, tokens)
    else:
        losses = F.cross_entropy(model.compute_logits(states).float(), tokens, reduction="none")
    blocks = losses.new_zeros(x_0.shape[0] * x_0.shape[1])
    return blocks.index_add(0, index // x_0.shape[2], losses).view(x_0.shape[:2])


def has_plain_head(model, states: torch.Tensor) -> bool:
    """Whether logits are nothing but a product of hidden states and a matrix that is at hand, in float32, and torch
    has (since 2.13) the cross-entropy of such logits that does not hold them all."""
    head = model.lm_head
    return (
        hasattr(nn, "LinearCrossEntropyOptions")
        and type(head) is nn.Linear
        and type(head.weight) is nn.Parameter  # not one that is quantised, or split over processes
        and head.weight.shape[0] == model.config.vocab_size
        and not (vars(head).keys() & {"forward"} or head._forward_pre_hooks or head._forward_hooks)
        and states.dtype == head.weight.dtype == torch.float32
        and not (torch.is_autocast_enabled(states.device.type) or torch.compiler.is_compiling())
    )


def cross_entropy_in_parts(model, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """-log p(tokens), (tokens,), of hidden states (tokens, hidden); the backward pass computes the logits again."""
    weight = model.lm_head.weight
    bias = weight.new_zeros(weight.shape[0])
    bias[model.config.forbidden_token_ids] = -torch.inf
    size = max(LARGEST_LOGITS // weight.shape[0], 1)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=size, chunking_method=None)
    return F.linear_cross_entropy(states, weight, tokens, linear_bias=bias, reduction="none", options=options)


def chain_cross_entropy(model, hidden_states: torch.Tensor, batch: CleanBatch, groups: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(x_A | x_t) over the sets A of tokens in each block, (batch, N) float32, in nats.

    Args:
        hidden_states: (batch, N * width, hidden), of the denoiser.
        groups: (batch, N, width) int64, the set that a token belongs to, -1 for none. Logits are computed for tokens
            of a set only. Documents that are packed into whole sequences have chains of their own.
    """
    layout, (rows, num_blocks, width) = batch.layout, groups.shape
    groups, columns = groups.flatten(0, 1), torch.arange(width, device=groups.device)
    if num_blocks == 1 and layout.document is not None:
        groups = torch.where(groups < 0, -1, groups * width + layout.document)
    # Set after set, from left to right in each, after the tokens of none; and how many of its set stand before each.
    order = (groups * width + columns).masked_fill(groups < 0, -1).argsort(dim=-1, stable=True)
    groups = groups.gather(-1, order)
    begins = F.pad(groups[:, 1:] != groups[:, :-1], (1, 0), value=True)
    place = columns - (columns * begins).cummax(-1).values
    kept = (groups >= 0).flatten().nonzero().squeeze(-1)
    block = torch.arange(len(order), device=order.device)[:, None]
    index, place = (order + block * width).flatten()[kept], place.flatten()[kept]
    tokens = batch.x_0.flatten()[index]
    found = chain_log_probs(
        model.chain,
        hidden_states.flatten(0, 1)[index],
        model.get_input_embeddings()(tokens),
        tokens,
        index % width,
        place,
        index // width,
        (rows * num_blocks, width),
        model.compute_logits,
    )
    return -found.view(rows, num_blocks)


def normaliser(batch: CleanBatch, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """The tokens over which every term of a loss is averaged: `num_items_in_batch`, by default the labelled ones."""
    num_items = batch.maskable.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return num_items.clamp(min=1)


def cross_entropy_of(
    model, hidden_states: torch.Tensor, batch: CleanBatch, masked: torch.Tensor, revealed: torch.Tensor
) -> torch.Tensor:
    """-log p(revealed tokens | x_t, z), (batch, N) float32, in nats: by a chain, by a causal head, or of independent
    tokens. Arguments as in [`chain_cross_entropy`]."""
    if model.chain is None:
        hidden_states = given_earlier(model, hidden_states, batch, revealed)
        return block_cross_entropy(model, hidden_states, batch.x_0, revealed)
    return chain_cross_entropy(model, hidden_states, batch, revealed.long() - 1)


def marginal_logits(model, hidden_states: torch.Tensor, batch: CleanBatch, masked: torch.Tensor) -> torch.Tensor:
    """Logits of p(x^i | x_t) of each masked token, (tokens, vocabulary) float32, in the order of `masked` (batch, N,
    width); `hidden_states` (batch, N * width, hidden) are those of the denoiser."""
    return model.compute_logits(batch.layout.blocks(hidden_states)[masked]).float()


def chain_loss(
    model, batch: CleanBatch, corruption: Corruption, num_items_in_batch: torch.Tensor | int | None = None, **kwargs
) -> Loss:
    """The objective of a model with a chain."""
    check_keywords(kwargs)
    masked, num_revealed = corruption.masked, corruption.revealed.sum(-1)  # (batch, N)
    outputs = denoise(model, batch, masked, num_revealed, **kwargs)
    # Sets as large as A_k all teach the same.
    num_sets = torch.div((corruption.groups >= 0).sum(-1), num_revealed.clamp(min=1), rounding_mode="floor")
    groups = corruption.groups.where(corruption.groups < num_sets[..., None], -1)
    losses = chain_cross_entropy(model, outputs.last_hidden_state, batch, groups)
    share = 1 / num_sets.clamp(min=1)
    num_items = normaliser(batch, num_items_in_batch)
    loss = (corruption.weight * share * losses).sum() / num_items
    return Loss(loss, loss.detach(), loss.new_zeros(()), None, None, outputs, batch.layout)


def next_token_loss(model, batch: CleanBatch, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Next-token cross-entropy of the labelled clean tokens that have one before them, over the number of labelled
    tokens, in nats: the loss of the causal language model that a backbone is. Its clean tokens see nothing on their
    right, or it would be no such loss."""
    document = batch.layout.document
    follows = F.pad(document[:, 1:] == document[:, :-1], (1, 0))
    scored = batch.maskable & batch.layout.blocks(follows)
    before = F.pad(batch.clean_states[:, :-1], (0, 0, 1, 0))
    return block_cross_entropy(model, before, batch.x_0, scored).sum() / normaliser(batch, num_items_in_batch)


def variational_loss(
    model,
    batch: CleanBatch,
    corruption: Corruption,
    latent_noise: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> Loss:
    """The objective of the module's docstring, for a corruption and the noise of z = mean + std * noise."""
    config = model.config
    check_keywords(kwargs)
    masked, revealed = corruption.masked, corruption.revealed
    num_revealed = revealed.sum(-1)  # (batch, N)
    has_latent = num_revealed >= config.latent_min_tokens
    latents, kl_elements, shift = None, None, None
    if config.gaussian_size:
        mean, log_variance = posterior(model, batch, masked, revealed)
        kl_elements = gaussian_kl(mean, log_variance, *batch.prior) * has_latent[..., None]
        shift = (standardised(mean, *batch.prior) * has_latent[..., None]).detach()
        latents = draw_latents(mean, log_variance, latent_noise)  # (batch, N, latent_size)
    sees_revealed = has_latent & (config.objective == "per_step" and config.gaussian_size > 0)
    if model.causal_head is not None:
        sees_revealed = num_revealed > 1  # a single token has none before it
    scored, share = scored_tokens(corruption.groups >= 0, revealed, sees_revealed)

    with_loops = config.loop_loss and model.training
    if with_loops:
        kwargs = kwargs | {"output_hidden_states": True}
    outputs = denoise(model, batch, masked, num_revealed, latents, **kwargs)
    num_items = normaliser(batch, num_items_in_batch)
    weight = corruption.weight * share / num_items

    def reconstruction_of(hidden_states):
        return (weight * block_cross_entropy(model, hidden_states, batch.x_0, scored)).sum()

    reconstruction_loss = reconstruction_of(given_earlier(model, outputs.last_hidden_state, batch, revealed))
    kl = reconstruction_loss.new_zeros(())
    if kl_elements is not None:
        kl_weight = 1 if config.objective == "per_sample" else corruption.weight
        kl = (kl_weight * kl_elements.sum(-1)).sum() / num_items
    loss = reconstruction_loss + model.kl_weight() * kl
    if with_loops:
        earlier = outputs.hidden_states[config.num_hidden_layers : -1 : config.num_hidden_layers]  # before the norm
        length = batch.layout.num_blocks * batch.layout.width  # after the clean tokens
        losses = [reconstruction_of(model.model.norm(state[:, -length:])) for state in earlier]
        loss = loss + sum(losses) / len(earlier)
    per_latent = num_revealed.shape if config.block_size is not None else num_revealed.shape[:1]
    return Loss(
        loss=loss,
        reconstruction_loss=reconstruction_loss.detach(),
        kl=kl.detach(),
        kl_per_latent=None if kl_elements is None else kl_elements.sum(-1).detach().view(-1, *per_latent[1:]),
        posterior_shift=None if shift is None else shift.view(-1, *per_latent[1:], config.latent_size),
        outputs=outputs,
        layout=batch.layout,
    )


__all__ = [
    "CleanBatch",
    "block_cross_entropy",
    "chain_cross_entropy",
    "chain_loss",
    "corrupt",
    "cross_entropy_of",
    "denoise",
    "last_before_blocks",
    "marginal_logits",
    "next_token_loss",
    "posterior",
    "read_clean",
    "variational_loss",
]
