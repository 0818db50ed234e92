"""Trainings that go wrong: gradients that are not finite, checkpoints that were not written to their end."""

import json
import math
import os
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class FiniteGradientsCallback(TrainerCallback):
    """Stops the training when the Trainer's `grad_norm` is infinite or not a number, before it saves a checkpoint.

    The norm is read where the Trainer logs it, so no step waits for the device; it is that of the gradients of all
    processes, so all of them stop alike. For that, each step that saves logs, too. One such gradient leaves weights
    and gradients that are not a number, so that none is missed between two logs. Not for fp16, whose scaler skips such
    steps itself.

    Raises:
        FloatingPointError: with the step, and what to do.
    """

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save

    on_epoch_end = on_step_end

    def on_log(self, args, state, control, logs=None, **kwargs):
        if args.fp16 or math.isfinite(logs.get("grad_norm", 0.0)):
            return
        raise FloatingPointError(
            f"the gradient is not finite (grad_norm {logs['grad_norm']} logged at step {state.global_step}), and "
            "neither are the weights any more: resume from the last checkpoint, look for wrong values in the batches, "
            f"or lower learning_rate (now at most {args.learning_rate})"
        )


def last_whole_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint in the folder that was written to its end, for `resume_from_checkpoint`; `None`: there is
    none. (The Trainer's `resume_from_checkpoint=True` takes the newest, even if saving was interrupted.)"""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    for folder in sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text())  # the Trainer writes it last
        except (OSError, ValueError):
            continue
        return str(folder)
    return None


__all__ = ["FiniteGradientsCallback", "last_whole_checkpoint"]
