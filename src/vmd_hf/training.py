"""Callbacks for the plain transformers `Trainer`: logging of the loss's parts, and EMA of the weights."""

import os
from pathlib import Path

import torch
from accelerate.utils import reduce
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

ACTIVE_UNIT_VARIANCE = 0.01


class _Sums:
    """Running sums of what one log line reports."""

    def __init__(self):
        self.scalars = 0  # (6,): reconstruction_loss, kl, both also times rows, kl_per_latent, latents; summed
        self.moments = 0  # (2, latent_size): sums of the posterior means and of their squares
        self.rows = 0

    def add(self, output, rows: int, device: torch.device):
        kl_per_latent = output.kl_per_latent
        latent_kl = torch.zeros(2, device=device)
        if kl_per_latent is not None:
            latent_kl = torch.stack([kl_per_latent.sum(), kl_per_latent.new_tensor(kl_per_latent.numel())])
        parts = torch.stack([output.reconstruction_loss.detach(), output.kl.detach()]).float()
        self.scalars = self.scalars + torch.cat([parts, parts * rows, latent_kl])
        self.rows += rows
        if output.posterior_mean is not None:
            mean = output.posterior_mean.flatten(0, -2)  # with blocks, each has a latent
            self.moments = self.moments + torch.stack([mean.sum(0), mean.square().sum(0)])


class VMDMetricsCallback(TrainerCallback):
    """Adds the parts of the loss to what the Trainer logs, so that posterior collapse is visible.

    Training logs gain `reconstruction_loss`, `kl` (both on the scale of `loss`), `kl_per_latent` (nats, mean over
    latents) and `active_units`: the latent dimensions whose posterior mean varies over the latents since the last log
    by a variance above 0.01 (Burda, Grosse, Salakhutdinov, arXiv 1509.00519). Evaluation metrics gain the same with
    the prefix of the evaluation.

    Pass it in `Trainer(callbacks=[VMDMetricsCallback()])`. The Trainer calls reporters such as TensorBoard before the
    callbacks it is given; for these to see the values too, use
    `trainer.callback_handler.callbacks.insert(0, VMDMetricsCallback())` instead.
    """

    def __init__(self):
        self._model = None
        self._sums = {True: _Sums(), False: _Sums()}  # by model.training
        self._last_logged_step = 0

    def _attach(self, model):
        if model is not None and model is not self._model:
            model.register_forward_hook(self._record, with_kwargs=True)
            self._model = model

    @torch.compiler.disable
    def _record(self, module, args, kwargs, output):
        if getattr(output, "reconstruction_loss", None) is None:
            return
        rows = len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])
        self._sums[module.training].add(output, rows, output.kl.device)

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._attach(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._attach(model)
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
        if sums.rows == 0:
            return {}
        rows = torch.tensor([float(sums.rows)], device=sums.scalars.device)
        has_latent = torch.is_tensor(sums.moments)
        moments = sums.moments.flatten() if has_latent else rows.new_zeros(0)
        total = torch.cat([rows, sums.scalars, moments])
        if args.world_size > 1:
            total = reduce(total, "sum")
        rows, scalars = total[0].item(), total[1:7].tolist()
        reconstruction, kl = (value / steps for value in scalars[:2]) if training else (v / rows for v in scalars[2:4])
        values = {"reconstruction_loss": reconstruction}
        if has_latent:
            moments = total[7:].view(2, -1) / scalars[5]
            values["kl"] = kl
            values["kl_per_latent"] = scalars[4] / scalars[5]
            variance = moments[1] - moments[0].square()
            values["active_units"] = int((variance > ACTIVE_UNIT_VARIANCE).sum())
        return values


class EMACallback(TrainerCallback):
    """Exponential moving average of the weights, by `torch.optim.swa_utils.AveragedModel`.

    The average is in the model whenever the Trainer evaluates or saves, and after training; so a checkpoint's
    `model.safetensors` holds the averaged weights, those that its metrics belong to and that
    `load_best_model_at_end` brings back. The weights being trained go beside it, in `training_weights.safetensors`,
    from which a resumed run goes on exactly.

    Args:
        decay: In (0, 1): average = decay * average + (1 - decay) * weights, after every optimizer step. After n steps
            at most (1 + n) / (10 + n), so that the first weights are soon forgotten.
        checkpoint: The folder that training resumes from; `None`: `checkpoint-<step>` in the output folder.

    Raises:
        ValueError: for a decay out of range.
        FileNotFoundError: when training resumes from a checkpoint that was saved without this callback.
    """

    file_name = "training_weights.safetensors"

    def __init__(self, decay: float = 0.999, checkpoint: str | os.PathLike | None = None):
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie in (0, 1), got {decay}")
        self.decay = decay
        self.checkpoint = checkpoint
        self._average = None  # AveragedModel; holds the trained weights while the average is in the model
        self._model = None
        self._average_in_model = False

    @torch.no_grad()
    def _put_average_in_model(self, wanted: bool):
        if wanted == self._average_in_model:
            return
        for trained, averaged in zip(self._model.parameters(), self._average.module.parameters(), strict=True):
            kept = trained.clone()
            trained.copy_(averaged)
            averaged.copy_(kept)
        self._average_in_model = wanted

    def _update(self, averages, weights, num_averaged):
        decay = min(self.decay, (1 + num_averaged.item()) / (10 + num_averaged.item()))
        get_ema_multi_avg_fn(decay)(averages, weights, num_averaged)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._model = model
        self._average = AveragedModel(model, multi_avg_fn=self._update)
        self._average_in_model = False
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
        self._average.n_averaged.fill_(state.global_step)
        trained = load_file(path, device=str(args.device))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(trained[name])

    def on_step_begin(self, args, state, control, **kwargs):
        self._put_average_in_model(False)

    def on_step_end(self, args, state, control, **kwargs):
        self._average.update_parameters(self._model)
        self._put_average_in_model(control.should_evaluate or control.should_save)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._put_average_in_model(self._average_in_model or control.should_evaluate or control.should_save)

    def on_save(self, args, state, control, **kwargs):
        if not args.should_save:
            return
        path = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / self.file_name
        partial = path.with_suffix(".partial")
        trained = self._average.module if self._average_in_model else self._model
        save_file({name: value.detach().contiguous() for name, value in trained.named_parameters()}, partial)
        os.replace(partial, path)

    def on_train_end(self, args, state, control, **kwargs):
        if not (args.load_best_model_at_end and state.best_model_checkpoint):
            self._put_average_in_model(True)


__all__ = ["EMACallback", "VMDMetricsCallback"]
