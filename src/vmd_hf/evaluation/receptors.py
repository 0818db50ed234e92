"""Receptor sequences: bits above the truth, and what the truth thinks of samples."""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ..data.receptors import ROW_LENGTH, log2_probabilities, receptor_dataset, sequences_of
from ..likelihood import Order, confidence_interval, corpus_bound
from .sampling import draw_samples
from .tables import Row
from .text import largest_step

BATCH = 250  # sequences at once
Truth = Callable[[Sequence[str | None]], np.ndarray]  # to log2 p of each sequence, as `log2_probabilities`


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of independent values, and its standard error; NaN for one."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def above_truth(bits: np.ndarray, truth: np.ndarray) -> Row:
    """Means of a model's bits and of the true ones, -log2 p of the same sequences, and of their difference, with its
    95 % interval: paired, so that how hard the sequences are is no part of its error. Its expectation is
    KL(truth || model), and a bound on it where the model's bits are one."""
    difference, error = mean_and_error(bits - truth)
    low, high = confidence_interval(difference, error)
    return {"bits": float(bits.mean()), "truth": float(truth.mean()), "above": difference, "low": low, "high": high}


def evaluate_receptor_bounds(
    model: PreTrainedModel,
    sequences: Sequence[str],
    num_steps: Sequence[int],
    num_orders: int = 2,
    num_draws: int = 16,
    seed: int = 0,
    truth: Truth = log2_probabilities,
    dataset: Callable[[Sequence[str]], Dataset] = receptor_dataset,
    orders: Sequence[Order] = ("random", "left_to_right"),
) -> list[Row]:
    """A row for each number of steps and each order: the expectation over random ones (of `num_orders` draws), and
    from left to right. With a Gaussian latent it is a bound, of one draw of z and of `num_draws` in the logarithm, and
    of random orders only. `dataset` makes rows of sequences, as [`receptor_dataset`], `labels` included if not all of
    a row is to be predicted."""
    true_bits, results, rows = -truth(sequences), [], dataset(sequences)
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    width = max(int((batch.get("labels", batch["input_ids"]) != -100).sum(-1).max()) for batch in batches)
    for steps in num_steps:
        has_order, has_latent = steps > 1, model.config.gaussian_size > 0
        draws_latent = has_latent and largest_step(width, steps) >= model.config.latent_min_tokens
        for order in orders if has_order and not has_latent else ["random"]:
            for draws in [1, num_draws] if draws_latent else [1]:
                start = time.perf_counter()
                bound = corpus_bound(
                    model,
                    batches,
                    bound="per_step",
                    num_steps=steps,
                    num_samples=draws,
                    num_orders=num_orders if has_order else 1,
                    order=order,
                    generator=torch.Generator().manual_seed(seed),
                )
                settings = {"num_steps": steps, "order": order if has_order else None, "num_draws": draws}
                seconds = time.perf_counter() - start
                results.append(settings | above_truth(bound.row_bits.numpy(), true_bits) | {"seconds": seconds})
    return results


def sample_statistics(samples: Sequence[str | None], real: Sequence[str], truth: Truth = log2_probabilities) -> Row:
    """Of samples beside real sequences: the share that is possible (of probability above 0), how many different ones
    among these, and the mean and three quantiles of their -log2 p.

    Samples of the truth itself have the real numbers. A higher mean: too many rare ones.
    """
    bits = -truth(samples)
    is_possible = np.isfinite(bits)
    distinct = len({sample for sample, possible in zip(samples, is_possible, strict=True) if possible})
    row: Row = {"possible": float(is_possible.mean()), "distinct": distinct / max(int(is_possible.sum()), 1)}
    for name, values in (("sampled", bits[is_possible]), ("real", -truth(real))):
        values = values if len(values) else np.array([math.nan])
        row[f"{name} bits"], row[f"{name} error"] = mean_and_error(values)
        for share in (10, 50, 90):
            row[f"{name} {share} %"] = float(np.percentile(values, share))
    return row


def evaluate_receptor_samples(
    model: PreTrainedModel,
    real: Sequence[str],
    num_steps: Sequence[int],
    num_samples: int = 1000,
    seed: int = 0,
    truth: Truth = log2_probabilities,
) -> list[Row]:
    """`sample_statistics` at temperature 1 for each number of steps, in random order, and the seconds of sampling."""
    results = []
    for steps in num_steps:
        start = time.perf_counter()
        rows = draw_samples(model, ROW_LENGTH, num_samples, seed, batch_size=BATCH, do_sample=True, num_steps=steps)
        seconds = time.perf_counter() - start
        results.append({"num_steps": steps, **sample_statistics(sequences_of(rows), real, truth), "seconds": seconds})
    return results


__all__ = [
    "above_truth",
    "evaluate_receptor_bounds",
    "evaluate_receptor_samples",
    "mean_and_error",
    "sample_statistics",
]
