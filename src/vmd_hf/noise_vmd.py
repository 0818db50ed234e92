"""The forward process: which tokens are masked at a time or before a sampling step, and where the randomness is from.

All of it is a function of two uniform numbers: one for each row, which becomes a time or a sampling step, and one for
each position, which decides what is masked. They are drawn in training, hashed from the row's tokens in evaluation or
from a seed for each row, and may be given, so that a loss can be reproduced.
"""

from dataclasses import dataclass

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 64-bit constants, written as signed integers
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_SQRT_2 = 0x6A09E667F3BCC908  # the fraction of the square root of 2 in 64 bits, as _GOLDEN is the golden ratio's


@dataclass
class Corruption:
    """What noise did to a batch of sequences.

    Attributes:
        masked: (batch, length) bool, positions that hold the mask token in `x_t` (M_t).
        revealed: (batch, length) bool, the masked positions that are revealed now (A_k); all of `masked` under the
            `vmd` objective.
        weight: (batch,) float, factor of the reconstruction term, beside the share of [`scored_tokens`]: `1 / t`,
            or the number of steps.
    """

    masked: torch.Tensor
    revealed: torch.Tensor
    weight: torch.Tensor


def step_schedule(num_maskable: torch.Tensor, num_steps: int | torch.Tensor) -> torch.Tensor:
    """T_n = min(T, n): the steps that a row with n maskable tokens takes of T. Any integer shape."""
    return torch.minimum(num_maskable, torch.as_tensor(num_steps, device=num_maskable.device))


def num_revealed(step: int | torch.Tensor, num_maskable: torch.Tensor, row_steps: torch.Tensor) -> torch.Tensor:
    """floor(k n / T_n): how many of a row's n maskable tokens are revealed after step k of its T_n steps.

    The one schedule of samplers, objectives and bounds. A row with n = 0 has nothing to reveal.
    """
    return torch.div(step * num_maskable, row_steps.clamp(min=1), rounding_mode="floor").minimum(num_maskable)


def most_revealed(num_maskable: torch.Tensor, row_steps: torch.Tensor) -> torch.Tensor:
    """ceil(n / T_n): how many tokens a step of the schedule reveals at most; 0 for a row with n = 0."""
    return torch.div(num_maskable - 1, row_steps.clamp(min=1), rounding_mode="floor") + 1


def corrupt_at_time(maskable: torch.Tensor, times: torch.Tensor, position_noise: torch.Tensor) -> Corruption:
    """State of the `vmd` objective: each maskable token is masked where its noise is below t; w(t) = 1 / t.

    Args:
        maskable: (batch, length) bool.
        times: (batch,) in (0, 1].
        position_noise: (batch, length), uniform in [0, 1).
    """
    masked = maskable & (position_noise < times[:, None])
    return Corruption(masked=masked, revealed=masked, weight=1 / times)


def corrupt_before_step(
    maskable: torch.Tensor, times: torch.Tensor, position_noise: torch.Tensor, objective_steps: list[int]
) -> Corruption:
    """State of the few-step objectives: before a uniformly random step k of a random number of steps T.

    `times` picks T from `objective_steps` and then k in 1..T_n, each uniformly; the order in which tokens are
    revealed is that of `position_noise`. The weight is T_n, which is unbiased for the sum over steps.
    Arguments as in [`corrupt_at_time`], with `times` in [0, 1).
    """
    num_maskable = maskable.sum(-1)
    choice = times.clamp(max=1 - 2**-24) * len(objective_steps)
    row_steps = step_schedule(num_maskable, torch.tensor(objective_steps, device=times.device)[choice.long()])
    step = (choice.frac() * row_steps).long() + 1

    order = position_noise.masked_fill(~maskable, torch.inf).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    before = num_revealed(step - 1, num_maskable, row_steps)[:, None]
    after = num_revealed(step, num_maskable, row_steps)[:, None]
    masked = maskable & (rank >= before)
    return Corruption(masked=masked, revealed=masked & (rank < after), weight=row_steps.to(times.dtype))


def scored_tokens(
    masked: torch.Tensor, revealed: torch.Tensor, is_told: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a step whose cross-entropies are added up, and the share of their sum that counts.

    Where nothing that predicts them depends on A_k, the tokens revealed may be any of those masked, all alike, and
    the expectation of their cross-entropy over A_k is that of M_t times |A_k| / |M_t|: less noise from the same pass
    of the denoiser, for more logits.

    Args:
        masked, revealed: (..., length) bool, M_t and A_k, as in [`Corruption`].
        is_told: (...) bool, whether a latent depends on A_k. Where A_k is all of M_t it does not matter.

    Returns:
        (..., length) bool, and (...) float, 1 where A_k is told.
    """
    share = revealed.sum(-1) / masked.sum(-1).clamp(min=1)
    return torch.where(is_told[..., None], revealed, masked), share.masked_fill(is_told, 1)


def stratified_uniform(batch_size: int, device: torch.device) -> torch.Tensor:
    """(batch,) numbers, each uniform in [0, 1), one in every interval [i/n, (i+1)/n), in random order."""
    offsets = torch.randperm(batch_size, device=device)
    return (offsets + torch.rand(batch_size, device=device)) / batch_size


def hashed_noise(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, latent_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise that is a hash of the row's own tokens, so that it depends neither on the batch nor on the padding.

    Args:
        input_ids, attention_mask, position_ids: (batch, length), the clean tokens.
        latent_size: Dimensions of the latent.

    Returns:
        (batch,) uniform for times, (batch, length) uniform for positions, (batch, latent_size) standard normal.
    """
    positions = position_ids + 1
    tokens = _mix(_mix(input_ids.long() + 1) + positions * _GOLDEN)
    if attention_mask is not None:
        tokens = tokens.masked_fill(attention_mask == 0, 0)
    seed = _mix(tokens.sum(-1))
    return _uniform(seed), *_noise_of(seed, positions, latent_size)


def seeded_noise(
    seeds: torch.Tensor, num_blocks: int, position_ids: torch.Tensor, latent_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise that is a function of a row's seed, so that it depends neither on the batch nor on the padding.

    Times are the multiples of the golden ratio without their whole part, so that those of consecutive seeds are spread
    evenly, and so are those of any part of them: however a batch is split, all of it and each part is stratified.

    Args:
        seeds: (batch,) int64.
        num_blocks: N, blocks of each row; 1 for whole sequences. Each has noise of its own.
        position_ids: (batch * N, length), positions of each block's tokens.
        latent_size: Dimensions of the latent.

    Returns:
        (batch * N,) uniform for times, (batch * N, length) uniform for positions, (batch * N, latent_size) standard
        normal.
    """
    blocks = torch.arange(num_blocks, device=seeds.device)
    multiples = (seeds[:, None] * _GOLDEN + blocks * _SQRT_2).flatten()
    return _fraction(multiples), *_noise_of(_mix(multiples), position_ids + 1, latent_size)


def _noise_of(seed: torch.Tensor, positions: torch.Tensor, latent_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    dimensions = torch.arange(1, latent_size + 1, device=seed.device)
    # Streams: 0 for the time, positive for positions, negative for latent dimensions.
    latent_uniform = (_uniform(seed[:, None] - dimensions * _GOLDEN) + 2**-25).clamp(max=1 - 2**-24)
    return _uniform(seed[:, None] + positions * _GOLDEN), torch.special.ndtri(latent_uniform)


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
    "corrupt_at_time",
    "corrupt_before_step",
    "hashed_noise",
    "most_revealed",
    "num_revealed",
    "scored_tokens",
    "seeded_noise",
    "step_schedule",
    "stratified_uniform",
]
