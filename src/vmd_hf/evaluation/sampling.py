"""The samplers that evaluations compare, and samples from fully masked sequences."""

from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

SAMPLERS = {
    "shared latent, argmax": {"resample_latents": False},
    "per-step latent, argmax": {"resample_latents": True},
    "shared latent, sampled": {"resample_latents": False, "do_sample": True},
    "per-step latent, sampled": {"resample_latents": True, "do_sample": True},
}


def samplers_of(model: PreTrainedModel, resample_latents: bool | None = None) -> dict[str, dict[str, bool]]:
    """Those of `SAMPLERS` that redraw the latent in every step, or do not (`None`: both); of a model without a
    Gaussian latent those that differ, which are called "no latent" or "chain"."""
    if model.config.gaussian_size == 0:
        kind = "chain" if model.config.num_states else "no latent"
        return {
            name.replace("shared latent", kind): settings
            for name, settings in SAMPLERS.items()
            if not settings["resample_latents"]
        }
    return {
        name: settings
        for name, settings in SAMPLERS.items()
        if resample_latents is None or settings["resample_latents"] == resample_latents
    }


def draw_samples(
    model: PreTrainedModel, length: int, num_samples: int, seed: int, batch_size: int = 10_000, **settings: Any
) -> torch.Tensor:
    """(num_samples, length) int64 sequences, on the CPU, from fully masked ones; positions are revealed in random
    order. `settings` are those of `generate`."""
    masks = torch.full((num_samples, length), model.config.mask_token_id, device=model.device)
    return fill_masks(model, {"input_ids": masks}, seed, batch_size, **settings)


@torch.no_grad()
def fill_masks(
    model: PreTrainedModel, rows: dict[str, torch.Tensor], seed: int, batch_size: int, **settings: Any
) -> torch.Tensor:
    """The same of rows that are given in part: `input_ids` with masks (rows, length), and what else `generate` takes
    of them."""
    generator = torch.Generator().manual_seed(seed)
    batches = zip(*(part.split(batch_size) for part in rows.values()), strict=True)
    total = -(-len(rows["input_ids"]) // batch_size)
    progress = tqdm(batches, desc=str(settings.get("num_steps", "")), total=total, leave=False, disable=None)
    return torch.cat(
        [
            model.generate(
                **dict(zip(rows, batch, strict=True)), generator=generator, remasking="random", **settings
            ).cpu()
            for batch in progress
        ]
    )


__all__ = ["SAMPLERS", "draw_samples", "fill_masks", "samplers_of"]
