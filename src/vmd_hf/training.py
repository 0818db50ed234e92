"""Callbacks for the plain transformers `Trainer`: the parts of the loss in the logs, noise that does not depend on how
batches are split, and EMA of the weights. They work in one process, in data parallel and under FSDP2."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import DistributedType
from accelerate.state import GradientState
from accelerate.utils import fsdp2_canonicalize_names, reduce
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

ACTIVE_UNIT_VARIANCE = 0.01


def moments(shift: torch.Tensor) -> torch.Tensor:
    """(3, latent_size) of posterior shifts (..., latent_size): how many are told something (with the null latent, and
    in slices of tokens that a step does not reveal, they are exactly 0), their sum, and that of their squares."""
    shift = shift.flatten(0, -2)
    return torch.stack([shift != 0, shift, shift.square()]).sum(1)


def active_units(sums: torch.Tensor) -> int:
    """Latent dimensions that the posterior uses, see [`VMDMetricsCallback`]; of sums of `moments`."""
    count, *powers = sums
    mean, square = (power / count for power in powers)  # NaN, so not active, where there are none
    return int((square - mean.square() > ACTIVE_UNIT_VARIANCE).sum())


class _Sums:
    """Running sums of what one log line reports."""

    def __init__(self):
        self.scalars = 0  # (6,): reconstruction_loss, kl, both also times rows, kl_per_latent, latents; summed
        self.moments = 0  # (3, latent_size), see `moments`
        self.rows = 0

    def add(self, output, rows: int, scale: float):
        """Of the output's first `rows`, whose parts of the loss are `scale` times those of the output."""
        parts = scale * torch.stack([output.reconstruction_loss.detach(), output.kl.detach()]).float()
        latent_kl = parts.new_zeros(2)
        if output.kl_per_latent is not None:
            kl_per_latent = output.kl_per_latent[:rows]
            latent_kl = torch.stack([kl_per_latent.sum(), kl_per_latent.new_tensor(kl_per_latent.numel())])
        self.scalars = self.scalars + torch.cat([parts, parts * rows, latent_kl])
        self.rows += rows
        if output.posterior_shift is not None:
            self.moments = self.moments + moments(output.posterior_shift[:rows])


class VMDMetricsCallback(TrainerCallback):
    """Adds the parts of the loss to what the Trainer logs, so that posterior collapse is visible.

    Training logs gain `reconstruction_loss`, `kl` (both on the scale of `loss`), `kl_per_latent` (nats, mean over
    latents) and `active_units`: the latent dimensions in which the posterior's mean, measured from the prior's in its
    standard deviations, varies over the latents since the last log by a variance above 0.01 (Burda, Grosse,
    Salakhutdinov, arXiv 1509.00519, whose prior is fixed), over those that are told something. Evaluation metrics gain
    the same with the prefix of the evaluation. All are those of the rows of all processes.

    Pass it in `Trainer(callbacks=[VMDMetricsCallback()])`. The Trainer calls reporters such as TensorBoard before the
    callbacks it is given; for these to see the values too, use
    `trainer.callback_handler.callbacks.insert(0, VMDMetricsCallback())` instead.
    """

    def __init__(self):
        self._model = None
        self._args = None
        self._sums = {True: _Sums(), False: _Sums()}  # by model.training
        self._last_logged_step = 0

    def _attach(self, args, model):
        self._args = args
        if model is not None and model is not self._model:
            model.register_forward_hook(self._record, with_kwargs=True)
            self._model = model

    @torch.compiler.disable
    def _record(self, module, args, kwargs, output):
        if getattr(output, "reconstruction_loss", None) is None:
            return
        rows = len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])
        # Over the items of all processes, each has its share of the loss; the Trainer takes the mean of all of them.
        shared = self._args.average_tokens_across_devices and kwargs.get("num_items_in_batch") is not None
        if not module.training:
            rows = self._rows_to_count(rows)
        self._sums[module.training].add(output, rows, self._args.world_size if shared else 1)

    def _rows_to_count(self, rows: int) -> int:
        """The last batches of an evaluation are filled up with rows that were seen before; the Trainer drops them."""
        state = GradientState()
        if self._args.world_size == 1 or not state.end_of_dataloader or state.remainder < 1:
            return rows
        return min(max(state.remainder - self._args.process_index * rows, 0), rows)

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._attach(args, model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._attach(args, model)
        self._last_logged_step = state.global_step
        self._sums[True] = _Sums()

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        self._sums[False] = _Sums()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            values = self._drain(args, training=True, steps=max(state.global_step - self._last_logged_step, 1))
            self._last_logged_step = state.global_step
            prefix = ""
        else:
            losses = [name for name in logs if name.endswith("_loss") and name != "train_loss"]
            if not losses:
                return
            values = self._drain(args, training=False, steps=None)
            prefix = losses[0].removesuffix("loss")
        values = {prefix + name: value for name, value in values.items()}
        logs.update(values)
        state.log_history[-1].update(values)

    def _drain(self, args, training: bool, steps: int | None) -> dict[str, float]:
        """Totals over all processes since the last call, as averages. Like the Trainer's own `loss`, training values
        are sums over an optimizer step's micro-batches, and evaluation values are weighted by rows."""
        sums = self._sums[training]
        self._sums[training] = _Sums()
        if not torch.is_tensor(sums.scalars):
            return {}
        rows = torch.tensor([float(sums.rows)], device=sums.scalars.device)
        has_latent = torch.is_tensor(sums.moments)
        shifts = sums.moments.flatten() if has_latent else rows.new_zeros(0)
        total = torch.cat([rows, sums.scalars, shifts])
        if args.world_size > 1:
            total = reduce(total, "sum")
        rows, scalars = total[0].item(), total[1:7].tolist()
        if training:
            reconstruction, kl = (value / (steps * args.world_size) for value in scalars[:2])
        else:
            reconstruction, kl = (value / rows for value in scalars[2:4])
        values = {"reconstruction_loss": reconstruction}
        if has_latent:
            values["kl"] = kl
            values["kl_per_latent"] = scalars[4] / scalars[5]
            values["active_units"] = active_units(total[7:].view(3, -1))
        return values


class SeededNoiseCallback(TrainerCallback):
    """Gives each row of a training batch noise of its own, from `TrainingArguments.seed`, the optimizer step and the
    row's place in the step's batch, with times that are stratified over the step.

    So the training does not depend on how a step's batch is split into processes and accumulated batches, nor on what
    a resumed run drew before. Without it each process draws from its default generator, which the Trainer seeds alike
    in all of them: their rows get the same noise. (Dropout still comes from those generators, and `kl_warmup_steps`
    counts forward passes, so that accumulation makes it shorter.)
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


class EMACallback(TrainerCallback):
    """Exponential moving average of the weights. Under FSDP2 each process averages its part.

    The average is in the model whenever the Trainer evaluates or saves, and after training; so a checkpoint's
    `model.safetensors` holds the averaged weights, those that its metrics belong to and that
    `load_best_model_at_end` brings back. The weights being trained go beside it, in `training_weights.safetensors`,
    from which a resumed run goes on exactly.

    Args:
        decay: In (0, 1): average = decay * average + (1 - decay) * weights, after every optimizer step. After n steps
            at most (1 + n) / (10 + n), so that the first weights are soon forgotten.
        checkpoint: The folder that training resumes from; `None`: `checkpoint-<step>` in the output folder.

    Raises:
        ValueError: for a decay out of range, or when training starts under DeepSpeed, which has weights of its own.
        FileNotFoundError: when training resumes from a checkpoint that was saved without this callback.
    """

    file_name = "training_weights.safetensors"

    def __init__(self, decay: float = 0.999, checkpoint: str | os.PathLike | None = None):
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie in (0, 1), got {decay}")
        self.decay = decay
        self.checkpoint = checkpoint
        self._average = []  # tensors; the trained weights while the average is in the model
        self._num_averaged = 0
        self._model = None
        self._average_in_model = False
        self._saved_step = None

    def _weights(self) -> list[torch.Tensor]:
        """This process's part of each of the model's parameters, to be changed in place."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves whole weights behind, which would be used once more
        parameters = [parameter.detach() for parameter in self._model.parameters()]
        return [value.to_local() if isinstance(value, DTensor) else value for value in parameters]

    def _named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """By the names that they have in one process."""
        return fsdp2_canonicalize_names(dict(self._model.named_parameters()))

    def _put_average_in_model(self, wanted: bool):
        if wanted == self._average_in_model:
            return
        for trained, averaged in zip(self._weights(), self._average, strict=True):
            kept = trained.clone()
            trained.copy_(averaged)
            averaged.copy_(kept)
        self._average_in_model = wanted

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.distributed_state.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError("EMACallback cannot be used with DeepSpeed, whose optimizer keeps weights of its own")
        self._model = model
        self._average = [weight.clone() for weight in self._weights()]
        self._average_in_model = False
        self._num_averaged = state.global_step
        self._saved_step = None
        if state.global_step == 0:
            return
        folder = Path(self.checkpoint or Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        path = folder / self.file_name
        if not path.exists():
            raise FileNotFoundError(
                f"EMACallback resumes from {path}, which does not exist: the checkpoint was saved without the "
                "callback, or lies elsewhere (then give its folder as EMACallback(checkpoint=...))"
            )
        # The Trainer has just loaded the average into the model.
        trained = load_file(path)
        with torch.no_grad():
            for name, parameter in self._named_parameters().items():
                value = trained[name].to(args.device)
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
                parameter.copy_(value)

    def on_step_begin(self, args, state, control, **kwargs):
        self._put_average_in_model(False)

    def on_step_end(self, args, state, control, **kwargs):
        weights, n = self._weights(), self._num_averaged
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        get_ema_multi_avg_fn(decay)(self._average, weights, n)
        self._num_averaged += 1
        if control.should_save:  # before the Trainer saves: what it writes last tells that a checkpoint is whole
            self._save(args, state)
        self._put_average_in_model(control.should_evaluate or control.should_save)

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_save:
            self._save(args, state)
        self._put_average_in_model(self._average_in_model or control.should_evaluate or control.should_save)

    def on_save(self, args, state, control, **kwargs):
        self._save(args, state)  # that a model is to be saved may have been found out in its evaluation

    def _save(self, args, state):
        if self._saved_step == state.global_step:
            return
        self._saved_step = state.global_step
        average_in_model = self._average_in_model
        self._put_average_in_model(False)
        trained = {}
        for name, parameter in self._named_parameters().items():
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value  # all processes take part
            if args.should_save:
                trained[name] = value.cpu().clone(memory_format=torch.contiguous_format)
        self._put_average_in_model(average_in_model)
        if not args.should_save:
            return
        path = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / self.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(trained, partial)
        os.replace(partial, path)

    def on_train_end(self, args, state, control, **kwargs):
        if not (args.load_best_model_at_end and state.best_model_checkpoint):
            self._put_average_in_model(True)


class FiniteGradientsCallback(TrainerCallback):
    """Stops the training before a gradient that is infinite or not a number spoils the weights.

    Not for fp16, whose scaler skips such steps itself.

    Raises:
        FloatingPointError: with the step, and what to do.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16:
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        gradients = [value.to_local() if isinstance(value, DTensor) else value for value in gradients]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            raise FloatingPointError(
                f"the gradient of step {state.global_step + 1} is not finite, and no step was taken: look for wrong "
                f"values in its batch, or lower learning_rate (now at most {args.learning_rate}) and resume from the "
                "last checkpoint"
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


__all__ = [
    "EMACallback",
    "FiniteGradientsCallback",
    "SeededNoiseCallback",
    "VMDMetricsCallback",
    "last_whole_checkpoint",
]
