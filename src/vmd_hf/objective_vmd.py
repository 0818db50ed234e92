"""The terms of the training objectives, as pure functions in float32 (arXiv 2510.23606, equation of L_VMD)."""

import torch
from torch.nn import functional as F


def standardised(
    values: torch.Tensor, prior_mean: torch.Tensor | None = None, prior_log_variance: torch.Tensor | None = None
) -> torch.Tensor:
    """How far values lie from the prior's mean, in its standard deviations. Default prior: N(0, 1)."""
    return values if prior_mean is None else (values - prior_mean) * (-0.5 * prior_log_variance).exp()


def gaussian_kl(
    mean: torch.Tensor,
    log_variance: torch.Tensor,
    prior_mean: torch.Tensor | None = None,
    prior_log_variance: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL(N(mean, exp(log_variance)) || prior) for each element, in nats. Any shape. Default prior: N(0, 1)."""
    mean, log_variance = mean.float(), log_variance.float()
    if prior_mean is not None:
        prior_mean, prior_log_variance = prior_mean.float(), prior_log_variance.float()
        mean = standardised(mean, prior_mean, prior_log_variance)
        log_variance = log_variance - prior_log_variance
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def draw_latents(
    mean: torch.Tensor,
    log_variance: torch.Tensor,
    epsilon: torch.Tensor,
    prior_mean: torch.Tensor | None = None,
    prior_log_variance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z = mean + std * epsilon, and log p(z) - log q(z) for each element, in nats. Shapes broadcast to `epsilon`'s."""
    latents = mean + (0.5 * log_variance).exp() * epsilon
    if prior_log_variance is not None:
        log_variance = log_variance - prior_log_variance
    distance = standardised(latents, prior_mean, prior_log_variance)
    return latents, 0.5 * (epsilon.square() - distance.square() + log_variance)


def row_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Sum of -log p(target) over the tokens of each row, in nats.

    Args:
        logits: (tokens, vocabulary), of the scored positions only.
        targets: (tokens,), their clean token ids.
        rows: (tokens,), the row of the batch that each belongs to.
        num_rows: Rows in the batch; a row without scored tokens gets 0.

    Returns:
        (num_rows,) float32.
    """
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return losses.new_zeros(num_rows).index_add(0, rows, losses)


__all__ = ["draw_latents", "gaussian_kl", "row_cross_entropy", "standardised"]
