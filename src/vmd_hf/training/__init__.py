"""Callbacks for the plain transformers `Trainer`, in one process, in data parallel and under FSDP2: the parts of the
loss in the logs, with a warning where nothing is learned; noise that does not depend on how batches are split; EMA of
the weights; an early end where gradients are not finite. [`vmd_hf.training.trl`] is TRL's `SFTTrainer` with the
model's own loss."""

from .ema import EMACallback
from .faults import FiniteGradientsCallback, last_whole_checkpoint
from .learning import active_units, moments
from .metrics import VMDMetricsCallback
from .noise import SeededNoiseCallback

__all__ = [
    "EMACallback",
    "FiniteGradientsCallback",
    "SeededNoiseCallback",
    "VMDMetricsCallback",
    "active_units",
    "last_whole_checkpoint",
    "moments",
]
