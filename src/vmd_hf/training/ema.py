"""Exponential moving average of the weights in the plain Trainer."""

import os
from pathlib import Path

import torch
from accelerate import DistributedType
from accelerate.utils import fsdp2_canonicalize_names
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


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


__all__ = ["EMACallback"]
