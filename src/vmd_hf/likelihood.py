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
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import nn
from tqdm.auto import tqdm

from .masking_vmd import CleanContext, Layout
from .modeling_vmd import VMDForMaskedDiffusion, check_labels, last_before_blocks
from .noise_vmd import Corruption, most_revealed, num_revealed, step_schedule
from .objective_vmd import draw_latents, gaussian_kl, row_cross_entropy
from .sampling_vmd import Generators, check_generators, draw

Bound = Literal["per_sample", "per_step"]


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
    batch_size: int | None = None,
    generator: Generators = None,
    show_progress: bool = False,
) -> NELBOOutput:
    """A bound on -log p(x_0) under a sampler of `num_steps` steps, for each row.

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
        batch_size: Sequences in one forward pass (rows, steps, orders and samples are folded into it); default: as
            many as there are rows. The result does not depend on it.
        generator: One for the batch, or a list of one for each row: then a row's value does not depend on the rest of
            the batch. Neither does padding matter. Default: torch's own.
        show_progress: Whether to show a bar.

    Returns:
        [`NELBOOutput`].

    Raises:
        ValueError: for wrong shapes or settings, for labels that differ from the inputs or are the mask or pad token,
            for a model without a mask token.
    """
    _check_settings(bound, num_steps, num_samples, num_orders, batch_size, generator, input_ids)
    model = _base_model(model)
    with _evaluation_mode(model):
        problem = _pose(model, input_ids, labels, attention_mask, position_ids, num_steps)
        num_samples = num_samples if problem.has_latent.any() else 1
        noise = _draw_noise(problem, bound, num_samples, num_orders, generator)
        batch_size = batch_size or max(len(input_ids), 1)
        cross_entropy, kl, log_weight = _run(problem, bound, noise, batch_size, show_progress)

    if num_samples == 1:
        of_groups = cross_entropy.squeeze(2) + kl
    else:
        of_groups = math.log(num_samples) - (log_weight - cross_entropy).logsumexp(2)
    draws = of_groups.sum((1, -1))  # (num_orders, batch)
    single = num_samples == 1
    return NELBOOutput(
        nelbo=draws.mean(0),
        standard_error=_standard_error(draws, problem.is_random()),
        reconstruction=cross_entropy.sum((1, 2, -1)).mean(0) if single else None,
        kl=kl.sum((1, -1)).mean(0) if single else None,
        num_tokens=problem.num_maskable.sum(-1),
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
            `position_ids`; other entries are ignored. They are moved to the model's device.
        show_progress: Whether to show a bar.
        settings: `bound`, `num_steps` and so on, of [`nelbo`].

    Returns:
        [`CorpusBound`]. Tokens are weighted equally, so it is a ratio of sums over rows, and so is its error.

    Raises:
        ValueError: as [`nelbo`] does, and if no token is scored.
    """
    device = _base_model(model).device
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    nats, kl, tokens = [], [], []
    for batch in tqdm(batches, disable=not show_progress):
        inputs = {name: batch[name].to(device) for name in names if batch.get(name) is not None}
        output = nelbo(model, **inputs, **settings)
        scored = output.num_tokens > 0
        nats.append(output.nelbo[scored].double().cpu())
        tokens.append(output.num_tokens[scored].double().cpu())
        if output.kl is not None:
            kl.append(output.kl[scored].double().cpu())
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
class _Problem:
    """A batch on the model's grid, and what all draws share. A unit is a block, or a whole sequence (N = 1).

    Attributes:
        x_0: (batch, N, width) int64.
        maskable: (batch, N, width) bool, the scored tokens.
        num_maskable: (batch, N), n of each unit.
        row_steps: (batch, N), T_n of each unit.
        context: With blocks, the clean tokens that they see, read once.
        before: With blocks, (batch, N, hidden): the last clean hidden state before each.
        prior: Mean and log-variance of a learned prior, each (batch, N, latent_size); none: N(0, I).
    """

    model: VMDForMaskedDiffusion
    layout: Layout
    x_0: torch.Tensor
    maskable: torch.Tensor
    num_maskable: torch.Tensor
    row_steps: torch.Tensor
    context: CleanContext | None
    before: torch.Tensor | None
    prior: tuple[torch.Tensor, ...]

    @property
    def max_steps(self) -> int:
        return int(self.row_steps.max()) if self.row_steps.numel() else 0

    @cached_property
    def has_latent(self) -> torch.Tensor:
        """(batch, N) bool: whether some step reveals enough tokens for a latent."""
        config = self.model.config
        enough = most_revealed(self.num_maskable, self.row_steps) >= config.latent_min_tokens
        return enough & (config.latent_size > 0)

    def is_random(self) -> torch.Tensor:
        """(batch,) bool: whether a row's value depends on what is drawn."""
        return ((self.row_steps > 1) | self.has_latent).any(-1)


@dataclass
class _Noise:
    """What was drawn.

    Attributes:
        rank: (num_orders, batch, N, width) int64, when each maskable token is revealed among its unit's.
        latent: (batch, N, groups, num_orders, num_samples, latent_size) standard normal: one group for each step, or
            one for all of them. `None` without a latent.
    """

    rank: torch.Tensor
    latent: torch.Tensor | None


def _pose(model, input_ids, labels, attention_mask, position_ids, num_steps) -> _Problem:
    layout = model.model.lay_out(input_ids, attention_mask, position_ids)  # checks shapes
    if labels is None:
        labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)
    check_labels(input_ids, labels, attention_mask, model.config)
    clean = layout.scatter(input_ids, 0)
    grid = (layout.num_blocks, layout.width)
    maskable = layout.scatter(labels != -100, False).unflatten(1, grid)
    num_maskable = maskable.sum(-1)
    context, before, prior = None, None, ()
    if model.config.block_size is not None:
        hidden_states, context = model.model.read(clean, layout)
        before = last_before_blocks(hidden_states, layout)
        prior = () if model.model.latent_prior is None else model.model.latent_prior(before)
    row_steps = step_schedule(num_maskable, num_steps)
    return _Problem(model, layout, clean.unflatten(1, grid), maskable, num_maskable, row_steps, context, before, prior)


def _draw_noise(problem: _Problem, bound, num_samples, num_orders, generator) -> _Noise:
    """Numbers are drawn for scored tokens, and for steps and units that have one, only: so padding does not count."""
    device = problem.x_0.device
    uniform = torch.full((*problem.maskable.shape, num_orders), torch.inf, device=device)
    counts = problem.num_maskable.sum(-1).tolist()
    uniform[problem.maskable] = draw(torch.rand, counts, (num_orders,), generator, device)
    rank = uniform.permute(3, 0, 1, 2).argsort(dim=-1, stable=True).argsort(dim=-1)
    size = problem.model.config.latent_size
    if not problem.has_latent.any():
        return _Noise(rank, None)
    groups = torch.arange(problem.max_steps if bound == "per_step" else 1, device=device)
    has_latent = groups < problem.row_steps[..., None]  # (batch, N, groups)
    latent = torch.zeros(*has_latent.shape, num_orders, num_samples, size, device=device)
    counts = has_latent.sum((-2, -1)).tolist()
    latent[has_latent] = draw(torch.randn, counts, (num_orders, num_samples, size), generator, device)
    return _Noise(rank, latent)


def _run(problem: _Problem, bound, noise: _Noise, batch_size, show_progress):
    """All forward passes. A state is a step of a draw of a row, in all its blocks; it runs once for each sample.

    Returns:
        Cross-entropies of the tokens revealed and log p(z) - log q(z), each (num_orders, groups, num_samples, batch,
        N), and KL(q || p) (num_orders, groups, batch, N); a group is a step, or all steps if they share the latent.
    """
    device, (num_orders, batch, num_blocks, _) = problem.x_0.device, noise.rank.shape
    num_samples = 1 if noise.latent is None else noise.latent.shape[4]
    num_steps, kept = problem.max_steps, bound == "per_sample"  # kept: one z for all steps
    cross_entropy = torch.zeros(num_orders, num_steps, num_samples, batch, num_blocks, device=device)
    log_weight = torch.zeros(num_orders, 1 if kept else num_steps, num_samples, batch, num_blocks, device=device)
    kl = torch.zeros_like(log_weight[:, :, 0])

    posterior = None
    if kept and noise.latent is not None:
        chunks = torch.arange(batch, device=device).split(batch_size)
        parts = [_encode(problem, rows, problem.maskable[rows], problem.maskable[rows]) for rows in chunks]
        posterior = [torch.cat(part) for part in zip(*parts, strict=True)]
    has_step = torch.arange(num_steps, device=device)[:, None] < problem.row_steps.amax(-1)
    states = has_step.expand(num_orders, -1, -1).nonzero()  # (states, 3): draw, step from 0, row
    chunks = states.split(max(batch_size // num_samples, 1)) if len(states) else ()
    for chunk in tqdm(chunks, disable=not show_progress):
        draws, step, rows = chunk.unbind(-1)
        masked, revealed = _state(problem, rows, step, noise.rank[draws, rows])
        latents = None
        if noise.latent is not None:
            group = torch.zeros_like(step) if kept else step
            paid = problem.has_latent[rows] if kept else revealed.sum(-1) >= problem.model.config.latent_min_tokens
            statistics = [part[rows] for part in posterior] if kept else _encode(problem, rows, masked, revealed)
            epsilon = noise.latent[rows, :, group, draws].transpose(1, 2)  # (states, num_samples, N, latent_size)
            latents, kl_now, log_weight_now = _sample(problem, rows, *statistics, epsilon)
            kl[draws, group, rows] = kl_now * paid
            log_weight[draws, group, :, rows] = log_weight_now * paid[:, None]
        cross_entropy[draws, step, :, rows] = _cross_entropy(
            problem, rows, masked, revealed, latents, num_samples, batch_size
        )
    return cross_entropy.sum(1, keepdim=True) if kept else cross_entropy, kl, log_weight


def _state(problem: _Problem, rows, step, rank) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked before a step (from 0) and revealed by it, both (states, N, width) bool."""
    num_maskable, row_steps = problem.num_maskable[rows], problem.row_steps[rows]
    before = num_revealed(step[:, None], num_maskable, row_steps)[..., None]
    after = num_revealed(step[:, None] + 1, num_maskable, row_steps)[..., None]
    masked = problem.maskable[rows] & (rank >= before)
    return masked, masked & (rank < after)


def _encode(problem: _Problem, rows, masked, revealed) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the model's posterior before a step, each (states, N, latent_size).

    Any posterior gives a bound; this is the one that the model's objective has trained. Where that was not told of
    single steps (`vmd`, `per_sample`), it is not now: the flag of a token that stays masked has never been learned.
    """
    model, layout = problem.model, problem.layout.select(rows)
    if model.config.objective == "vmd":
        revealed = masked
    clean, maskable, masked, revealed = (
        part.flatten(0, 1) for part in (problem.x_0[rows], problem.maskable[rows], masked, revealed)
    )
    corruption = Corruption(masked, revealed, weight=torch.ones(len(masked), device=masked.device))
    before = None if problem.before is None else problem.before[rows].flatten(0, 1)
    prior = tuple(part[rows].flatten(0, 1) for part in problem.prior)
    statistics = model.encode(clean.view(len(rows), -1), layout, maskable, corruption, before, prior)
    return tuple(part.unflatten(0, (len(rows), -1)) for part in statistics)


def _sample(problem: _Problem, rows, mean, log_variance, epsilon):
    """Latents z = mean + std * epsilon, (states, num_samples, N, latent_size); KL(q || p), (states, N); and
    log p(z) - log q(z), (states, num_samples, N)."""
    prior = tuple(part[rows] for part in problem.prior)
    kl = gaussian_kl(mean, log_variance, *prior).sum(-1)
    latents, log_ratio = draw_latents(
        mean[:, None], log_variance[:, None], epsilon, *(part[:, None] for part in prior)
    )
    return latents, kl, log_ratio.sum(-1)


def _cross_entropy(problem: _Problem, rows, masked, revealed, latents, num_samples, batch_size) -> torch.Tensor:
    """-log p(revealed tokens | x^(k), z) in nats, (states, num_samples, N), in passes of `batch_size` at most."""
    model, num_blocks = problem.model, problem.layout.num_blocks
    x_t = problem.x_0[rows].masked_fill(masked, model.config.mask_token_id).flatten(1)
    if latents is not None:
        latents = latents.flatten(0, 1) if model.config.block_size else latents.flatten(0, 2)
    parts = []
    for chunk in torch.arange(len(rows) * num_samples, device=rows.device).split(batch_size):
        state = chunk // num_samples
        layout = problem.layout.select(rows[state])
        modulation = model.model.modulation_by(None if latents is None else latents[chunk], layout, len(chunk))
        modulation = model.model.for_steps(modulation, revealed[state].sum(-1))
        outputs = model.model(
            x_t[state],
            modulation=modulation,
            layout=layout,
            context=None if problem.context is None else problem.context.select(rows[state]),
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state.unflatten(1, masked.shape[1:])
        sequence, block, column = revealed[state].nonzero(as_tuple=True)
        logits = model.compute_logits(hidden_states[sequence, block, column])
        targets = problem.x_0[rows[state[sequence]], block, column]
        unit = sequence * num_blocks + block
        parts.append(row_cross_entropy(logits, targets, unit, len(chunk) * num_blocks))
    return torch.cat(parts).view(len(rows), num_samples, num_blocks)


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
