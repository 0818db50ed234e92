"""Upper bounds on -log p(x_0) of the few-step samplers, and what they come to in bits a token on a corpus.

Both bounds hold for sampling at temperature 1, with positions revealed in uniformly random order in T steps: A_1..A_T
are the revealed sets, x^(k) is the state before step k, and T_n = min(T, n) where a row (or block) has n tokens.

- `per_sample`, for the sampler of arXiv 2510.23606 that keeps one z; the posterior sees everything masked:
  `-log p(x_0) <= E_A { E_q[ sum_k sum_{i in A_k} -log p(x_0^i | x^(k), z) ] + KL(q(z | x_0, all masked) || p(z)) }`
- `per_step`, for the sampler that draws a fresh z for each step (`resample_latents=True`):
  `-log p(x_0) <= E_A sum_k { E_q[ sum_{i in A_k} -log p(x_0^i | x^(k), z) ] + KL(q(z | x_0, x^(k), A_k) || p(z)) }`

What is drawn is an order and z. All steps of the order are run, which has less variance than one of them times T; the
KL is in closed form.

Without a latent the two are one, and at T = n it is the usual bound of masked diffusion (MDLM, arXiv 2406.07524). With
blocks (BD3-LM, arXiv 2503.09573) a row's bound is the sum over its blocks given the clean earlier ones.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn
from tqdm.auto import tqdm

from .generation_vmd import execution_device
from .latents_vmd import draw_latents, gaussian_kl, log_density_ratio
from .modeling_vmd import VMDForMaskedDiffusion
from .noise_vmd import reveal_rank
from .objective_vmd import (
    CleanBatch,
    cross_entropy_of,
    denoise,
    marginal_logits,
    posterior,
    read_clean,
)
from .sampling_vmd import Generators, check_generators, confidence_of, draw, select_positions
from .schedule_vmd import most_revealed, num_revealed, step_schedule

Bound = Literal["per_sample", "per_step"]
Order = Literal["random", "left_to_right", "top_prob", "top_prob_margin", "entropy"]


@dataclass
class NELBOOutput:
    """Output of [`nelbo`], one value for each row, in nats summed over the row's scored tokens.

    Attributes:
        nelbo: (batch,) float32, unbiased for the bound, whose value lies above -log p(x_0).
        standard_error: (batch,) float32, of `nelbo`, over the draws: 0 where nothing is random, NaN where a single
            draw cannot tell.
        reconstruction: (batch,) float32, the cross-entropies of `nelbo`; `None` with several samples in the logarithm.
        kl: (batch,) float32, the rest of it; `None` with several samples in the logarithm.
        num_tokens: (batch,) int64, scored tokens.
    """

    nelbo: torch.Tensor
    standard_error: torch.Tensor
    reconstruction: torch.Tensor | None
    kl: torch.Tensor | None
    num_tokens: torch.Tensor


@dataclass
class CorpusBound:
    """Output of [`corpus_bound`].

    Attributes:
        bits_per_token: The rows' `nelbo` over their scored tokens, in bits.
        standard_error: Of `bits_per_token`, over rows: of the choice of rows and of all that was drawn. NaN for one.
        kl_bits_per_token: The part of `bits_per_token` that is KL(q || p); `None` with several draws in the logarithm.
        num_rows, num_tokens: Rows with scored tokens, and these tokens.
        row_bits, row_tokens: (num_rows,) float64, what each row adds to both sums.
    """

    bits_per_token: float
    standard_error: float
    kl_bits_per_token: float | None
    num_rows: int
    num_tokens: int
    row_bits: torch.Tensor = field(repr=False, compare=False)
    row_tokens: torch.Tensor = field(repr=False, compare=False)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `bits_per_token`, normal approximation."""
        return confidence_interval(self.bits_per_token, self.standard_error)

    def difference(self, other: "CorpusBound") -> tuple[float, float]:
        """This bound less another of the same rows, in bits a token, and its standard error over rows, paired: rows
        that are hard for one model usually are for the other, and then it is much smaller than the errors of the two.

        Raises:
            ValueError: if the rows differ in number or in scored tokens. (That they are the same is for the caller to
                see to.)
        """
        if not torch.equal(self.row_tokens, other.row_tokens):
            raise ValueError(
                "other must be a bound of the same rows in the same order, got "
                f"{other.num_rows} of {other.num_tokens} tokens, not {self.num_rows} of {self.num_tokens}"
            )
        return ratio_of_sums(self.row_bits - other.row_bits, self.row_tokens)


@torch.no_grad()
def nelbo(
    model: nn.Module,
    input_ids: torch.LongTensor,
    labels: torch.LongTensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    bound: Bound = "per_sample",
    num_steps: int = 1,
    num_samples: int = 1,
    num_orders: int = 1,
    order: Order = "random",
    batch_size: int | None = None,
    generator: Generators = None,
    show_progress: bool = False,
    token_type_ids: Any = None,
) -> NELBOOutput:
    """A bound on -log p(x_0) under a sampler of `num_steps` steps, for each row.

    Without a Gaussian latent it is exact for one step, and for any number of steps in another than random order.

    Args:
        model: A [`VMDForMaskedDiffusion`], or PEFT's wrapper of one. It is run in evaluation mode.
        input_ids: (batch, length) int64, the clean x_0.
        labels: (batch, length) int64, equal to `input_ids`, or -100 for context that is given and not scored; default:
            all tokens but padding.
        attention_mask: (batch, length), 1 for tokens and 0 for padding, on either side.
        position_ids: (batch, length); default: counted in each row without its padding.
        bound: `"per_sample"` for the sampler that keeps one z, `"per_step"` for a fresh z in each step. Any posterior
            gives a bound; it is tight with the one that the model was trained with, so the objective `per_sample` goes
            with `per_sample`, `per_step` and `vmd` with `per_step`.
        num_steps: T, steps of the sampler, with blocks in each of them.
        num_samples: K, draws of z under the logarithm: `-log 1/K sum_k p(x_0 | z_k) p(z_k) / q(z_k)` in place of the
            ELBO, which is the case of K = 1 (IWAE, arXiv 1509.00519). The expectation falls with K and stays a bound.
            `per_sample` runs each z through all steps of one order, `per_step` weights the draws within each step.
            Without a latent there is nothing to draw, and it has no effect.
        num_orders: Draws of the order and all latents, over which the result is averaged.
        order: `"random"`: the expectation over orders. Otherwise the exact -log p(x_0) of the sampler that reveals
            tokens from left to right, or the most confident ones by a rule of `generate` (DUEL, arXiv 2603.01367):
            their order is a function of what was revealed before, and not of what is drawn (under `"top_prob"`, of
            the largest probability and not that of the token that was drawn). Not with a Gaussian latent.
        batch_size: Sequences in one forward pass (rows, steps, orders and samples are folded into it); default: as
            many as there are rows. The result does not depend on it.
        generator: One for the batch, or a list of one for each row: then a row's value does not depend on the rest of
            the batch. Neither does padding matter. Default: torch's own.
        show_progress: Whether to show a bar.
        token_type_ids: Ignored, so that `nelbo(model, **tokenizer(...))` works with tokenizers that return them.

    Returns:
        [`NELBOOutput`].

    Raises:
        ValueError: for wrong shapes or settings, for labels that differ from the inputs or are the mask or pad token,
            for a model without a mask token.
    """
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)}, got {order!r}")
    _check_settings(bound, num_steps, num_samples, num_orders, batch_size, generator, input_ids)
    model = _base_model(model)
    with _evaluation_mode(model):
        device = execution_device(model, input_ids)
        input_ids, labels, attention_mask, position_ids = (
            None if part is None else part.to(device) for part in (input_ids, labels, attention_mask, position_ids)
        )
        batch = read_clean(model, input_ids, labels, attention_mask, position_ids)
        num_maskable = batch.maskable.sum(-1)  # (batch, N)
        row_steps = step_schedule(num_maskable, num_steps)
        if order != "random":
            if model.config.gaussian_size:
                raise ValueError(
                    f"order must be 'random' with a Gaussian latent, whose z it would depend on, got {order!r}"
                )
            chunks = torch.arange(len(input_ids), device=row_steps.device).split(batch_size or len(input_ids))
            found = torch.cat([_follow(model, batch.select(rows), row_steps[rows], order) for rows in chunks])
            return NELBOOutput(found, torch.zeros_like(found), found, torch.zeros_like(found), num_maskable.sum(-1))
        has_latent = most_revealed(num_maskable, row_steps) >= model.config.latent_min_tokens
        has_latent = has_latent & (model.config.gaussian_size > 0)  # (batch, N): whether some step has one
        num_samples = num_samples if has_latent.any() else 1
        noise = _draw_noise(model, batch, row_steps, has_latent, bound, num_samples, num_orders, generator)
        batch_size = batch_size or len(input_ids)
        cross_entropy, kl, log_weight = _run(
            model, batch, row_steps, has_latent, bound, noise, batch_size, show_progress
        )

    if num_samples == 1:
        of_groups = cross_entropy.squeeze(2) + kl
    else:
        of_groups = math.log(num_samples) - (log_weight - cross_entropy).logsumexp(2)
    draws = of_groups.sum((1, -1))  # (num_orders, batch)
    single = num_samples == 1
    return NELBOOutput(
        nelbo=draws.mean(0),
        standard_error=_standard_error(draws, ((row_steps > 1) | has_latent).any(-1)),
        reconstruction=cross_entropy.sum((1, 2, -1)).mean(0) if single else None,
        kl=kl.sum((1, -1)).mean(0) if single else None,
        num_tokens=num_maskable.sum(-1),
    )


def corpus_bound(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    show_progress: bool = False,
    **settings,
) -> CorpusBound:
    """[`nelbo`] over many rows, in bits a scored token.

    Args:
        model: As in [`nelbo`].
        batches: Batches (a `DataLoader`, a list) with `input_ids` and, where needed, `labels`, `attention_mask` and
            `position_ids`; other entries are ignored. They may be on any device.
        show_progress: Whether to show a bar.
        settings: `bound`, `num_steps` and so on, of [`nelbo`].

    Returns:
        [`CorpusBound`]. Tokens are weighted equally, so it is a ratio of sums over rows, and so is its error.

    Raises:
        ValueError: as [`nelbo`] does, and if no token is scored.
    """
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    nats, kl, tokens = [], [], []
    for batch in tqdm(batches, disable=not show_progress):
        inputs = {name: batch[name] for name in names if batch.get(name) is not None}
        output = nelbo(model, **inputs, **settings)
        scored = output.num_tokens > 0
        nats.append(output.nelbo[scored].cpu().double())
        tokens.append(output.num_tokens[scored].cpu().double())
        if output.kl is not None:
            kl.append(output.kl[scored].cpu().double())
    num_tokens = int(sum(part.sum() for part in tokens))
    if num_tokens == 0:
        raise ValueError("batches must hold at least one scored token, got none")
    bits, row_tokens = torch.cat(nats) / math.log(2), torch.cat(tokens)
    kl_bits = float(torch.cat(kl).sum()) / math.log(2) / num_tokens if kl else None
    return CorpusBound(*ratio_of_sums(bits, row_tokens), kl_bits, len(bits), num_tokens, bits, row_tokens)


def confidence_interval(estimate: float, standard_error: float) -> tuple[float, float]:
    """95 %, normal approximation."""
    margin = 1.96 * standard_error
    return estimate - margin, estimate + margin


def ratio_of_sums(numerators: torch.Tensor, denominators: torch.Tensor) -> tuple[float, float]:
    """sum(numerators) / sum(denominators), each (rows,), and its standard error over rows; NaN for one row."""
    ratio, num_rows = numerators.sum() / denominators.sum(), len(numerators)
    residuals = numerators - ratio * denominators  # of mean 0: linearises the ratio
    error = residuals.std() * num_rows**0.5 / denominators.sum() if num_rows > 1 else math.nan
    return float(ratio), float(error)


@dataclass
class _Noise:
    """What was drawn.

    Attributes:
        rank: (num_orders, batch, N, width) int64, when each maskable token is revealed among its block's.
        latent: (batch, N, groups, num_orders, num_samples, latent_size) standard normal: one group for each step, or
            one for all of them. `None` without a latent.
    """

    rank: torch.Tensor
    latent: torch.Tensor | None


def _draw_noise(model, batch: CleanBatch, row_steps, has_latent, bound, num_samples, num_orders, generator) -> _Noise:
    """Numbers are drawn for scored tokens, and for steps of blocks that have one, only: so padding does not count."""
    device = batch.x_0.device
    uniform = torch.full((*batch.maskable.shape, num_orders), torch.inf, device=device)
    counts = batch.maskable.sum((-2, -1)).tolist()
    uniform[batch.maskable] = draw(torch.rand, counts, (num_orders,), generator, device)
    rank = reveal_rank(uniform.permute(3, 0, 1, 2), batch.maskable)
    if not has_latent.any():
        return _Noise(rank, None)
    groups = torch.arange(int(row_steps.max()) if bound == "per_step" else 1, device=device)
    of_step = groups < row_steps[..., None]  # (batch, N, groups)
    latent = torch.zeros(*of_step.shape, num_orders, num_samples, model.config.gaussian_size, device=device)
    counts = of_step.sum((-2, -1)).tolist()
    latent[of_step] = draw(
        torch.randn, counts, (num_orders, num_samples, model.config.gaussian_size), generator, device
    )
    return _Noise(rank, latent)


def _run(model, batch: CleanBatch, row_steps, has_latent, bound, noise: _Noise, batch_size, show_progress):
    """All forward passes. A state is a step of a draw of a row, in all its blocks; it runs once for each sample.

    Returns:
        Cross-entropies of the tokens revealed and log p(z) - log q(z), each (num_orders, groups, num_samples, batch,
        N), and KL(q || p) (num_orders, groups, batch, N); a group is a step, or all steps if they share the latent.
    """
    device, (num_orders, num_rows, num_blocks, _) = batch.x_0.device, noise.rank.shape
    num_samples = 1 if noise.latent is None else noise.latent.shape[4]
    num_steps, shared = int(row_steps.max()), bound == "per_sample"  # shared: one latent for all steps
    cross_entropy = torch.zeros(num_orders, num_steps, num_samples, num_rows, num_blocks, device=device)
    log_weight = torch.zeros(num_orders, 1 if shared else num_steps, num_samples, num_rows, num_blocks, device=device)
    kl = torch.zeros_like(log_weight[:, :, 0])

    statistics = None
    if shared and noise.latent is not None:
        chunks = (batch.select(rows) for rows in torch.arange(num_rows, device=device).split(batch_size))
        parts = [posterior(model, chunk, chunk.maskable, chunk.maskable) for chunk in chunks]
        statistics = [torch.cat(part) for part in zip(*parts, strict=True)]
    has_step = torch.arange(num_steps, device=device)[:, None] < row_steps.amax(-1)
    states = has_step.expand(num_orders, -1, -1).nonzero()  # (states, 3): draw, step from 0, row
    chunks = states.split(max(batch_size // num_samples, 1)) if len(states) else ()  # () if no token is scored
    for chunk in tqdm(chunks, disable=not show_progress):
        order, step, row = chunk.unbind(-1)
        rows = batch.select(row)
        masked, revealed = _state(rows.maskable, row_steps[row], step, noise.rank[order, row])
        latents = None
        if noise.latent is not None:
            group = torch.zeros_like(step) if shared else step
            charged = has_latent[row] if shared else revealed.sum(-1) >= model.config.latent_min_tokens
            mean, log_variance = (
                posterior(model, rows, masked, revealed) if statistics is None else (part[row] for part in statistics)
            )
            epsilon = noise.latent[row, :, group, order].transpose(1, 2)  # (states, num_samples, N, latent_size)
            prior = (part[:, None] for part in rows.prior)
            latents = draw_latents(mean[:, None], log_variance[:, None], epsilon)
            log_ratio = log_density_ratio(latents, log_variance[:, None], epsilon, *prior)
            kl[order, group, row] = gaussian_kl(mean, log_variance, *rows.prior).sum(-1) * charged
            log_weight[order, group, :, row] = log_ratio.sum(-1) * charged[:, None]
        cross_entropy[order, step, :, row] = _cross_entropy(
            model, rows, masked, revealed, latents, num_samples, batch_size
        )
    return cross_entropy.sum(1, keepdim=True) if shared else cross_entropy, kl, log_weight


def _state(maskable, row_steps, step, rank) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked before a step (from 0) and revealed by it, both (states, N, width) bool."""
    num_maskable = maskable.sum(-1)
    before = num_revealed(step[:, None], num_maskable, row_steps)[..., None]
    after = num_revealed(step[:, None] + 1, num_maskable, row_steps)[..., None]
    masked = maskable & (rank >= before)
    return masked, masked & (rank < after)


def _cross_entropy(model, rows: CleanBatch, masked, revealed, latents, num_samples, batch_size) -> torch.Tensor:
    """-log p(revealed tokens | x^(k), z) in nats, (states, num_samples, N), in passes of `batch_size` at most."""
    parts = []
    latents = None if latents is None else latents.flatten(0, 1)  # (states * num_samples, N, latent_size)
    for index in torch.arange(len(masked) * num_samples, device=masked.device).split(batch_size):
        state = index // num_samples
        chunk = rows if num_samples == 1 and len(index) == len(masked) else rows.select(state)
        outputs = denoise(
            model, chunk, masked[state], revealed[state].sum(-1), None if latents is None else latents[index]
        )
        parts.append(cross_entropy_of(model, outputs.last_hidden_state, chunk, masked[state], revealed[state]))
    return torch.cat(parts).unflatten(0, (len(masked), num_samples))


def _follow(model, batch: CleanBatch, row_steps, order: Order) -> torch.Tensor:
    """-log p(x_0) in nats, (batch,), of the sampler that reveals tokens in an order of its own."""
    masked, num_maskable = batch.maskable, batch.maskable.sum(-1)
    total = torch.zeros(len(masked), device=masked.device)
    for step in range(1, int(row_steps.max()) + 1):
        count = masked.sum(-1) - (num_maskable - num_revealed(step, num_maskable, row_steps))
        hidden_states = denoise(model, batch, masked, count).last_hidden_state
        if order == "left_to_right":
            revealed = masked & (masked.cumsum(-1) <= count[..., None])
        else:
            confidence = masked.new_zeros(masked.shape, dtype=torch.float)
            logits = marginal_logits(model, hidden_states, batch, masked)
            confidence[masked] = confidence_of(logits, logits.argmax(-1), order)
            revealed = select_positions(confidence.flatten(0, 1), masked.flatten(0, 1), count.flatten()).view_as(
                masked
            )
        losses = cross_entropy_of(model, hidden_states, batch, masked, revealed)
        total += losses.sum(-1)
        masked = masked & ~revealed
    return total


def _standard_error(draws: torch.Tensor, is_random: torch.Tensor) -> torch.Tensor:
    """Of the mean over the independent draws (num_orders, batch). (batch,)."""
    error = torch.full_like(draws[0], torch.nan) if len(draws) == 1 else draws.std(0) / len(draws) ** 0.5
    return error.where(is_random, 0)


def _base_model(model: nn.Module) -> VMDForMaskedDiffusion:
    unwrap = getattr(model, "get_base_model", None)  # PEFT's wrapper
    return model if unwrap is None else unwrap()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_settings(bound, num_steps, num_samples, num_orders, batch_size, generator, input_ids) -> None:
    if bound not in get_args(Bound):
        raise ValueError(f"bound must be one of {get_args(Bound)}, got {bound!r}")
    counts = {"num_steps": num_steps, "num_samples": num_samples, "num_orders": num_orders, "batch_size": batch_size}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_generators(generator, len(input_ids))


__all__ = ["CorpusBound", "NELBOOutput", "corpus_bound", "nelbo"]
