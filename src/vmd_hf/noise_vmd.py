"""The forward process: which tokens are masked at a time or before a sampling step, and where randomness comes from.

All of it is a function of two uniform numbers: one for each block (or row), which becomes a time or a sampling step,
and one for each token, which decides what is masked. They are drawn in training, hashed from the row's tokens in
evaluation or from a seed for each row, and may be given, so that a loss can be reproduced.
"""

import math
from dataclasses import dataclass

import torch

from .schedule_vmd import num_revealed, step_schedule

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 64-bit constants, written as signed integers
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_SQRT_2 = 0x6A09E667F3BCC908  # the fraction of the square root of 2 in 64 bits, as _GOLDEN is the golden ratio's


@dataclass
class Corruption:
    """What noise did to a batch of blocks (or whole sequences).

    Attributes:
        masked: (..., length) bool, positions that hold the mask token in `x_t` (M_t).
        revealed: (..., length) bool, the masked positions that are revealed now (A_k); all of `masked` under the
            `vmd` objective.
        weight: (...) float, factor of the reconstruction term, beside the share of [`scored_tokens`]: `1 / t`, or
            the number of steps.
        groups: (..., length) int64, 0 for A_k, 1, 2, ... for further parts of M_t that could have been revealed in its
            place, as likely and as large (the last one may be smaller), -1 elsewhere.
    """

    masked: torch.Tensor
    revealed: torch.Tensor
    weight: torch.Tensor
    groups: torch.Tensor


@dataclass
class Noise:
    """The random numbers of a loss, for N blocks a row (1 for whole sequences).

    Attributes:
        times: (batch, N) uniform in [0, 1).
        positions: (batch, N, width) uniform in [0, 1).
        latents: (batch, N, *latent_shape) standard normal.
    """

    times: torch.Tensor
    positions: torch.Tensor
    latents: torch.Tensor


def corrupt_at_time(maskable: torch.Tensor, times: torch.Tensor, position_noise: torch.Tensor) -> Corruption:
    """State of the `vmd` objective: each maskable token is masked where its noise is below t; w(t) = 1 / t.

    Args:
        maskable: (..., length) bool.
        times: (...) in (0, 1].
        position_noise: (..., length), uniform in [0, 1).
    """
    masked = maskable & (position_noise < times[..., None])
    return Corruption(masked=masked, revealed=masked, weight=1 / times, groups=masked.long() - 1)


def corrupt_before_step(
    maskable: torch.Tensor,
    times: torch.Tensor,
    position_noise: torch.Tensor,
    objective_steps: list[int],
    left_to_right: float = 0.0,
) -> Corruption:
    """State of the few-step objectives: before a uniformly random step k of a random number of steps T.

    `times` picks T from `objective_steps` and then k in 1..T_n, each uniformly; the order in which tokens are
    revealed is that of `position_noise`, or, for a share `left_to_right` of the blocks, which `times` picks too, from
    left to right. The weight is T_n, which is unbiased for the sum over steps.
    Arguments as in [`corrupt_at_time`], with `times` in [0, 1).
    """
    num_maskable = maskable.sum(-1)
    choice = times.clamp(max=1 - 2**-24) * len(objective_steps)
    row_steps = step_schedule(num_maskable, torch.tensor(objective_steps, device=times.device)[choice.long()])
    step = choice.frac() * row_steps
    rank = reveal_rank(position_noise, maskable)
    is_ordered = (step.frac() < left_to_right)[..., None]
    if left_to_right:
        rank = torch.where(is_ordered, maskable.cumsum(-1) - 1, rank)
    step = step.long() + 1
    before = num_revealed(step - 1, num_maskable, row_steps)[..., None]
    after = num_revealed(step, num_maskable, row_steps)[..., None]
    masked = maskable & (rank >= before)
    revealed = masked & (rank < after)
    groups = torch.div(rank - before, (after - before).clamp(min=1), rounding_mode="floor")
    groups = groups.where(torch.where(is_ordered, revealed, masked), -1)
    return Corruption(masked, revealed, weight=row_steps.to(times.dtype), groups=groups)


def reveal_rank(position_noise: torch.Tensor, maskable: torch.Tensor) -> torch.Tensor:
    """(..., length) int64: when each maskable token is revealed among its block's, in the order of the noise."""
    order = position_noise.masked_fill(~maskable, torch.inf).argsort(dim=-1, stable=True)
    ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)


def scored_tokens(
    masked: torch.Tensor, revealed: torch.Tensor, sees_revealed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a step whose cross-entropies are added up, and the share of their sum that counts.

    Where nothing that predicts them depends on A_k, the tokens revealed may be any of those masked, all alike, and
    the expectation of their cross-entropy over A_k is that of M_t times |A_k| / |M_t|: less noise from the same pass
    of the denoiser, for more logits.

    Args:
        masked, revealed: (..., length) bool, M_t (or what of it is as likely to be revealed) and A_k, as in
            [`Corruption`].
        sees_revealed: (...) bool, whether a latent depends on A_k. Where A_k is all of M_t it does not matter.

    Returns:
        (..., length) bool, and (...) float, 1 where a latent depends on A_k.
    """
    share = revealed.sum(-1) / masked.sum(-1).clamp(min=1)
    return torch.where(sees_revealed[..., None], revealed, masked), share.masked_fill(sees_revealed, 1)


def training_noise(maskable: torch.Tensor, latent_shape: tuple[int, ...], processes_per_row: int = 1) -> Noise:
    """Noise from torch's default generator, with times that are stratified over the batch.

    In data parallel the Trainer seeds the default generator alike in every process; so there it gives one number, from
    which each process takes rows of its own.

    Args:
        maskable: (batch, N, width), for its shape.
        latent_shape: Of the latent noise of a block.
        processes_per_row: Consecutive processes that have the same rows, since they share a model (tensor parallel).
    """
    batch, num_blocks, width = maskable.shape
    device = maskable.device
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > processes_per_row
    ):
        first = torch.distributed.get_rank() // processes_per_row * batch
        seeds = torch.randint(2**62, (1,), device=device) + first + torch.arange(batch, device=device)
        return seeded_noise(seeds, maskable, torch.arange(width, device=device).expand_as(maskable), latent_shape)
    return Noise(
        stratified_uniform(batch * num_blocks, device).view(batch, num_blocks),
        torch.rand(maskable.shape, device=device),
        torch.randn(batch, num_blocks, *latent_shape, device=device),
    )


def stratified_uniform(batch_size: int, device: torch.device) -> torch.Tensor:
    """(batch,) numbers, each uniform in [0, 1), one in every interval [i/n, (i+1)/n), in random order."""
    offsets = torch.randperm(batch_size, device=device)
    return (offsets + torch.rand(batch_size, device=device)) / batch_size


def hashed_noise(
    input_ids: torch.Tensor, real: torch.Tensor | None, position_ids: torch.Tensor, latent_shape: tuple[int, ...]
) -> Noise:
    """Noise that is a hash of each block's own tokens, so that it depends neither on the batch nor on the padding.

    Args:
        input_ids, real, position_ids: (batch, N, width): the clean tokens, what is not padding, and where they stand.
        latent_shape: Of the latent noise of a block.
    """
    tokens = _mix(_mix(input_ids.long() + 1) + (position_ids + 1) * _GOLDEN)
    if real is not None:
        tokens = tokens.masked_fill(~real, 0)
    seed = _mix(tokens.sum(-1))
    return Noise(_uniform(seed), *_noise_of(seed, position_ids, latent_shape))


def seeded_noise(
    seeds: torch.Tensor, maskable: torch.Tensor, position_ids: torch.Tensor, latent_shape: tuple[int, ...]
) -> Noise:
    """Noise that is a function of a row's seed, so that it depends neither on the batch nor on the padding.

    Times are the multiples of the golden ratio without their whole part, so that those of consecutive seeds are spread
    evenly, and so are those of any part of them: however a batch is split, all of it and each part is stratified.

    Args:
        seeds: (batch,) int64.
        maskable: (batch, N, width), for its shape. Each block has noise of its own.
        position_ids: (batch, N, width), where the tokens stand.
        latent_shape: Of the latent noise of a block.
    """
    blocks = torch.arange(maskable.shape[1], device=seeds.device)
    multiples = seeds[:, None] * _GOLDEN + blocks * _SQRT_2
    return Noise(_fraction(multiples), *_noise_of(_mix(multiples), position_ids, latent_shape))


def _noise_of(
    seed: torch.Tensor, position_ids: torch.Tensor, latent_shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    dimensions = torch.arange(1, math.prod(latent_shape) + 1, device=seed.device)
    # Streams: 0 for the time, positive for positions, negative for latent dimensions.
    latent_uniform = (_uniform(seed[..., None] - dimensions * _GOLDEN) + 2**-25).clamp(max=1 - 2**-24)
    latents = torch.special.ndtri(latent_uniform).view(*seed.shape, *latent_shape)
    return _uniform(seed[..., None] + (position_ids + 1) * _GOLDEN), latents


def _mix(state: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195) on int64."""
    state = (state ^ _shift(state, 30)) * _MIX_1
    state = (state ^ _shift(state, 27)) * _MIX_2
    return state ^ _shift(state, 31)


def _shift(state: torch.Tensor, bits: int) -> torch.Tensor:
    return (state >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts are arithmetic: clear the copied sign


def _fraction(state: torch.Tensor) -> torch.Tensor:
    return _shift(state, 40).float() * 2**-24


def _uniform(state: torch.Tensor) -> torch.Tensor:
    return _fraction(_mix(state))


__all__ = [
    "Corruption",
    "Noise",
    "corrupt_at_time",
    "corrupt_before_step",
    "hashed_noise",
    "reveal_rank",
    "scored_tokens",
    "seeded_noise",
    "stratified_uniform",
    "training_noise",
]
