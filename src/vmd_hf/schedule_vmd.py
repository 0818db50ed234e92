"""The step schedule that samplers, objectives and bounds share: how many tokens a step reveals."""

import torch


def step_schedule(num_maskable: torch.Tensor, num_steps: int | torch.Tensor) -> torch.Tensor:
    """T_n = min(T, n): the steps that a row with n maskable tokens takes of T. Any integer shape."""
    if isinstance(num_steps, int):
        return num_maskable.clamp(max=num_steps)
    return torch.minimum(num_maskable, num_steps)


def num_revealed(step: int | torch.Tensor, num_maskable: torch.Tensor, row_steps: torch.Tensor) -> torch.Tensor:
    """floor(k n / T_n): how many of a row's n maskable tokens are revealed after step k of its T_n steps.

    A row with n = 0 has nothing to reveal.
    """
    return torch.div(step * num_maskable, row_steps.clamp(min=1), rounding_mode="floor").minimum(num_maskable)


def most_revealed(num_maskable: torch.Tensor, row_steps: torch.Tensor) -> torch.Tensor:
    """ceil(n / T_n): how many tokens a step of the schedule reveals at most; 0 for a row with n = 0."""
    return torch.div(num_maskable - 1, row_steps.clamp(min=1), rounding_mode="floor") + 1


__all__ = ["most_revealed", "num_revealed", "step_schedule"]
