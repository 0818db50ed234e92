"""Joint distributions over two or four digits whose target is known exactly: dataset, tokenizer and metric.

The distributions are those of Zhang, Schwing, Zhao, "Variational Masked Diffusion Models", arXiv 2510.23606. Each is
a table of probabilities, so what a model has learned is measured against the target itself and not against a test set.

| name | sequence | drawn | points in the support |
| --- | --- | --- | --- |
| `two_token_deterministic` | (k, k+1) | k uniform | 10 |
| `two_token_nonuniform` | (k, k+1) | P(k) = (k+1) / 55 | 10 |
| `two_token_correlated` | (k, k+1) with probability `correlation`, else (k, l) | k and l uniform | 100 or 10 |
| `d1` | (k, k+1, k+2, k+3) | k uniform | 10 |
| `d2` | (k, k+1, l, l+1) | k and l uniform | 100 |

All sums are modulo 10. What "correlation" means in `two_token_correlated` is our reading of the paper.
"""

from typing import Literal, get_args

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from .characters import character_tokenizer
from .text import token_dataset

SyntheticName = Literal["two_token_deterministic", "two_token_nonuniform", "two_token_correlated", "d1", "d2"]

NUM_DIGITS = 10


def target_distribution(name: SyntheticName, correlation: float | None = None) -> torch.Tensor:
    """The exact joint probabilities of a synthetic task.

    Args:
        name: the task, see the table at the head of this file.
        correlation: probability in [0, 1] that the second token is the successor of the first one. Required for
            `two_token_correlated`, an error for the others.

    Returns:
        float64 tensor of shape (10,) * n, n = 2 or 4 tokens, that sums to one; entry [a, b, ...] is P(a, b, ...).

    Raises:
        ValueError: unknown `name`; `correlation` missing, out of range, or given where it has no meaning.
    """
    if name not in get_args(SyntheticName):
        raise ValueError(f"`name` must be one of {get_args(SyntheticName)}, got {name!r}")
    if name != "two_token_correlated" and correlation is not None:
        raise ValueError(f"`correlation` must be None unless `name` is 'two_token_correlated', got {correlation}")
    if name == "two_token_correlated" and (correlation is None or not 0 <= correlation <= 1):
        raise ValueError(f"`correlation` must be a number in [0, 1] for 'two_token_correlated', got {correlation}")

    successor = torch.eye(NUM_DIGITS, dtype=torch.float64).roll(1, dims=1)  # successor[k, k + 1 mod 10] = 1
    if name == "two_token_deterministic":
        return successor / 10
    if name == "two_token_nonuniform":
        return torch.arange(1, NUM_DIGITS + 1, dtype=torch.float64)[:, None] / 55 * successor
    if name == "two_token_correlated":
        return (correlation * successor + (1 - correlation) / 10) / 10
    if name == "d1":
        return torch.einsum("ab,bc,cd->abcd", successor, successor, successor) / 10
    return torch.einsum("ab,cd->abcd", successor, successor) / 100


def synthetic_tokenizer() -> PreTrainedTokenizerFast:
    """Digits "0".."9" are the ids 0..9, "[MASK]" is 10 and "[PAD]" is 11; "0123" <-> [0, 1, 2, 3].

    It adds no special tokens and returns `input_ids` and `attention_mask`.
    """
    return character_tokenizer("0123456789", eos_token=None)


def synthetic_dataset(name: SyntheticName, num_rows: int, seed: int, correlation: float | None = None) -> Dataset:
    """Rows drawn independently from `target_distribution(name, correlation)`.

    Args:
        name: the task, see the table at the head of this file.
        num_rows: number of rows, at least 1.
        seed: seed of the `torch.Generator` that draws them; the same seed gives the same rows.
        correlation: see `target_distribution`.

    Returns:
        Dataset in torch format with one column `input_ids`, int64, 2 or 4 tokens a row.

    Raises:
        ValueError: `num_rows` below 1, or as in `target_distribution`.
    """
    if num_rows < 1:
        raise ValueError(f"`num_rows` must be at least 1, got {num_rows}")
    target = target_distribution(name, correlation)
    return token_dataset(_draw(target, num_rows, torch.Generator().manual_seed(seed)).numpy())


def independent_marginals_kl(name: SyntheticName, correlation: float | None = None) -> float:
    """KL(target || product of its one-token marginals), in nats: the total correlation of the tokens.

    It is the least KL that one sampling step of a model can reach if it predicts each token independently of the
    others: log 10 for `two_token_deterministic`, log 1000 for `d1`, log 100 for `d2`.
    """
    target = target_distribution(name, correlation)
    support = target > 0
    return (target[support] * (target[support] / _marginal_product(target)[support]).log()).sum().item()


def independent_accuracy(name: SyntheticName, correlation: float | None = None) -> float:
    """Mass in [0, 1] that the product of the target's one-token marginals puts on the target's support."""
    target = target_distribution(name, correlation)
    return _marginal_product(target)[target > 0].sum().item()


def joint_counts(samples: torch.Tensor) -> torch.Tensor:
    """How often each sequence of digits was sampled.

    Args:
        samples: integer tensor of shape (N, n). Rows with an id outside 0..9 (mask or pad left over) are not counted.

    Returns:
        int64 tensor of shape (10,) * n on the CPU; it sums to the number of rows that consist of digits.

    Raises:
        ValueError: `samples` is not a two-dimensional integer tensor.
    """
    if samples.dim() != 2 or samples.is_floating_point():
        raise ValueError(
            f"`samples` must be an integer tensor of shape (N, n), got {samples.dtype} of shape {tuple(samples.shape)}"
        )
    samples = samples.long().cpu()
    digits = samples[((samples >= 0) & (samples < NUM_DIGITS)).all(dim=1)]  # (number of digit rows, n)
    place_values = NUM_DIGITS ** torch.arange(samples.shape[1] - 1, -1, -1)  # (n,): 10^(n-1), ..., 10, 1
    counts = torch.bincount((digits * place_values).sum(dim=1), minlength=NUM_DIGITS ** samples.shape[1])
    return counts.view((NUM_DIGITS,) * samples.shape[1])


def joint_metrics(samples: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Accuracy and KL divergence of samples against the known joint distribution.

    Args:
        samples: integer tensor of shape (N, n), N at least 1. A row with an id outside 0..9 is outside the support.
        target: the probabilities of `target_distribution`, shape (10,) * n.

    Returns:
        dict of
        `accuracy`: share of the N samples that lie in the support of `target`;
        `accuracy_standard_error`: its binomial standard error, sqrt(accuracy (1 - accuracy) / N);
        `kl`: KL(target || samples) in nats over the support, the samples' probabilities being counts / N. A point of
        the support that was never sampled counts as half a sample, 0.5 / N, which keeps the value finite (and lets
        it fall slightly below zero when N is small);
        `kl_floor`: (points in the support - 1) / (2 N), about what N perfect samples are expected to give when
        every point expects several of them;
        `num_samples`: N.

    Raises:
        ValueError: `samples` is empty, is no (N, n) integer tensor, or its n differs from that of `target`.
    """
    counts = joint_counts(samples)
    num_samples = len(samples)
    if counts.shape != target.shape or num_samples == 0:
        raise ValueError(
            f"`samples` must have shape (N, {target.dim()}) with N at least 1 to match `target` of shape "
            f"{tuple(target.shape)}, got shape {tuple(samples.shape)}"
        )
    support = target > 0
    counts, probabilities = counts[support].double(), target[support].double()  # (points in the support,) each
    accuracy = counts.sum().item() / num_samples
    sampled = counts.clamp(min=0.5) / num_samples
    return {
        "accuracy": accuracy,
        "accuracy_standard_error": (accuracy * (1 - accuracy) / num_samples) ** 0.5,
        "kl": (probabilities * (probabilities / sampled).log()).sum().item(),
        "kl_floor": (len(counts) - 1) / (2 * num_samples),
        "num_samples": num_samples,
    }


def _draw(target: torch.Tensor, num_rows: int, generator: torch.Generator) -> torch.Tensor:
    support = target.nonzero()  # (points in the support, n)
    probabilities = target[target > 0]  # the same order
    return support[torch.multinomial(probabilities, num_rows, replacement=True, generator=generator)]


def _marginal_product(target: torch.Tensor) -> torch.Tensor:
    product = torch.ones((), dtype=target.dtype)
    for position in range(target.dim()):
        marginal = target.sum(dim=[other for other in range(target.dim()) if other != position])  # (10,)
        product = product[..., None] * marginal
    return product
