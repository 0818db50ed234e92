"""Samples of a model against a joint distribution that is known."""

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from ..data.synthetic import SyntheticName, joint_metrics, target_distribution
from .sampling import draw_samples, samplers_of
from .tables import Row


def evaluate_synthetic(
    model: PreTrainedModel,
    setting: SyntheticName,
    correlation: float | None = None,
    num_steps: Sequence[int] = (1, 2, 4),
    num_samples: int = 100_000,
    batch_size: int = 10_000,
    resample_latents: bool | None = None,
    seed: int = 0,
) -> Iterator[tuple[Row, torch.Tensor]]:
    """One result (see `joint_metrics`) and its samples (num_samples, tokens) for each number of steps and each sampler
    that differs from the others (see `samplers_of`)."""
    target = target_distribution(setting, correlation)
    model.eval()
    for steps in num_steps:
        for sampler, settings in samplers_of(model, resample_latents).items():
            if settings["resample_latents"] and steps == 1 and resample_latents is None:
                continue  # nothing to resample: the sampler is that of the shared latent
            samples = draw_samples(model, target.dim(), num_samples, seed, batch_size, num_steps=steps, **settings)
            yield {"num_steps": steps, "sampler": sampler, **joint_metrics(samples, target)}, samples


__all__ = ["evaluate_synthetic"]
