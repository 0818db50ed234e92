"""Floating point operations: how many a machine makes a second, and how many an update takes; seconds of sampling."""

import time
from collections.abc import Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from .sampling import draw_samples


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has done what it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def matmul_peak(
    device: torch.device, size: int = 2048, repeats: int = 10, dtype: torch.dtype = torch.float32
) -> float:
    """FLOP/s of a square matrix product, the best of several."""
    a, b = torch.randn(2, size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def sampling_seconds(model: PreTrainedModel, length: int, num_steps: int, num_texts: int = 16) -> float:
    """Seconds a token of sampling `num_texts` sequences at once, the better of two times."""
    seconds = []
    for seed in range(2):
        synchronize(model.device)
        start = time.perf_counter()
        draw_samples(model, length, num_texts, seed, do_sample=True, num_steps=num_steps)
        seconds.append(time.perf_counter() - start)
    return min(seconds) / (num_texts * length)


def flops_of_update(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> int:
    """Of the matrix products of a forward and a backward pass."""
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


__all__ = ["flops_of_update", "matmul_peak", "sampling_seconds", "synchronize"]
