"""Noise for training that does not depend on how batches are split."""

import numpy as np
import torch
from transformers import TrainerCallback


class SeededNoiseCallback(TrainerCallback):
    """Gives each row of a training batch noise of its own, from `TrainingArguments.seed`, the optimizer step and the
    row's place in the step's batch, with times that are stratified over the step.

    So the training does not depend on how a step's batch is split into processes and accumulated batches, nor on what
    a resumed run drew before. (Dropout does: it comes from each process's default generator.)
    """

    def __init__(self):
        self._handle = None
        self._first_seed = 0  # of the optimizer step
        self._rows = 0  # that this process has seen in it

    @torch.compiler.disable
    def _add_seeds(self, module, args, kwargs):
        if not module.training or "labels" not in kwargs:
            return None
        input_ids = kwargs["input_ids"]
        rows = len(input_ids)
        # Accelerate hands out one batch after the other: this process's rows are behind those of the ones before it.
        first = self._rows * self._world_size + self._process_index * rows
        self._rows += rows
        seeds = self._first_seed + torch.arange(first, first + rows, device=input_ids.device)
        return args, {"noise_seeds": seeds, **kwargs}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_train_end(args, state, control)
        self._world_size, self._process_index = args.world_size, args.process_index
        self._handle = model.register_forward_pre_hook(self._add_seeds, with_kwargs=True)

    def on_step_begin(self, args, state, control, **kwargs):
        sequence = np.random.SeedSequence([args.seed, state.global_step])
        self._first_seed = int(sequence.generate_state(1, np.uint64)[0] >> 2)  # leaves room to add in int64
        self._rows = 0

    def on_train_end(self, args, state, control, **kwargs):
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


__all__ = ["SeededNoiseCallback"]
