"""The parts of the loss in the Trainer's logs, and a warning where nothing is learned."""

import logging
import weakref

import torch
from accelerate.state import GradientState
from accelerate.utils import reduce
from transformers import TrainerCallback

from .learning import active_units, advice_on_latent, advice_on_learning, moments, unigram_entropy

logger = logging.getLogger(__name__)

FIRST_WINDOW = 100  # optimizer steps


class _Sums:
    """Running sums over the rows of this process."""

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

    def merge(self, other: "_Sums"):
        self.scalars = self.scalars + other.scalars
        self.moments = self.moments + other.moments
        self.rows += other.rows

    def averages(self, world_size: int, steps: int | None) -> dict[str, float]:
        """Over all processes. Like the Trainer's own `loss`, values of training are sums over an optimizer step's
        micro-batches, and those of an evaluation (`steps` is `None`) are weighted by rows."""
        if not torch.is_tensor(self.scalars):
            return {}
        rows = torch.tensor([float(self.rows)], device=self.scalars.device)
        has_latent = torch.is_tensor(self.moments)
        shifts = self.moments.flatten() if has_latent else rows.new_zeros(0)
        total = torch.cat([rows, self.scalars, shifts])
        if world_size > 1:
            total = reduce(total, "sum")
        rows, scalars = total[0].item(), total[1:7].tolist()
        if steps is None:
            reconstruction, kl = (value / rows for value in scalars[2:4])
        else:
            reconstruction, kl = (value / (steps * world_size) for value in scalars[:2])
        values = {"reconstruction_loss": reconstruction}
        if has_latent:
            values["kl"] = kl
            values["kl_per_latent"] = scalars[4] / scalars[5]
            values["active_units"] = active_units(total[7:].view(3, -1))
        return values


class _Window:
    """The second half of the steps since `begin`, when these are 200, 400, 800 and so on."""

    def __init__(self, begin: int, now: int):
        self.begin = max(begin, now)
        self.start, self.end, self.sums = now, self.begin, _Sums()
        if self.end == now:
            self.move_on()

    def is_second_half(self) -> bool:
        return self.start > self.begin

    def move_on(self):
        self.start, self.end = self.end, self.begin + max(FIRST_WINDOW, 2 * (self.end - self.begin))
        self.sums = _Sums()


class _Hook:
    """Shows a model's outputs to the callback, which it does not keep alive; in a copy of the model, to nobody."""

    def __init__(self, callback: "VMDMetricsCallback | None" = None):
        self.callback = callback and weakref.ref(callback)

    def __reduce__(self):
        return _Hook, ()

    @torch.compiler.disable
    def __call__(self, module, args, kwargs, output):
        callback = self.callback and self.callback()
        if callback is not None and getattr(output, "reconstruction_loss", None) is not None:
            callback.record(module, args, kwargs, output)


class VMDMetricsCallback(TrainerCallback):
    """Adds the parts of the loss to what the Trainer logs, and warns where nothing is learned.

    Training logs gain `reconstruction_loss`, `kl` (both on the scale of `loss`), `kl_per_latent` (nats, mean over
    latents) and `active_units`: the latent dimensions in which the posterior's mean, measured from the prior's in its
    standard deviations, varies over the latents since the last log by a variance above 0.01 (Burda, Grosse,
    Salakhutdinov, arXiv 1509.00519, whose prior is fixed), over those that encode something. Evaluation metrics gain
    the same with the prefix of the evaluation. All are those of the rows of all processes.

    200, 400, 800, ... steps after the warm-up of the learning rate, a line of the Python logger says so if
    `reconstruction_loss` was no lower than the entropy of single tokens in the second half of these steps; and as many
    steps after the warm-up of the KL term, if no latent dimension was active. Each line says what to try.

    Pass it in `Trainer(callbacks=[VMDMetricsCallback()])`. The Trainer calls reporters such as TensorBoard before the
    callbacks it is given; for these to see the values too, use
    `trainer.callback_handler.callbacks.insert(0, VMDMetricsCallback())` instead. The model has a forward hook as long
    as the callback lives, that is, as long as its Trainer does.
    """

    def __init__(self):
        self._args = None
        self._model = None
        self._handle = None
        self._evaluated = _Sums()
        self._start(0, [])

    def _start(self, step: int, windows: list[_Window]):
        self._last_logged_step = step
        self._new = _Sums()  # of training, not yet in the two next
        self._since_log = _Sums()
        self._windows = windows  # of the loss, and of the latent
        self._token_counts = None  # (vocab_size,), on the model's device

    def _attach(self, args, model):
        self._args = args
        if model is None or model is self._model:
            return
        if self._handle is not None:
            self._handle.remove()
        self._model, self._handle = model, model.register_forward_hook(_Hook(self), with_kwargs=True)
        weakref.finalize(self, self._handle.remove)

    def record(self, module, args, kwargs, output):
        rows = len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])
        # Over the items of all processes, each has its share of the loss; the Trainer takes the mean of all of them.
        shared = self._args.average_tokens_across_devices and kwargs.get("num_items_in_batch") is not None
        scale = self._args.world_size if shared else 1
        if not module.training:
            self._evaluated.add(output, self._rows_to_count(rows), scale)
            return
        self._new.add(output, rows, scale)
        if "labels" in kwargs:
            labels = kwargs["labels"].flatten()
            if self._token_counts is None:
                self._token_counts = labels.new_zeros(module.config.vocab_size)
            labelled = labels != -100
            self._token_counts.index_add_(0, labels.where(labelled, 0), labelled.long())

    def _rows_to_count(self, rows: int) -> int:
        """The last batches of an evaluation are filled up with rows that were seen before; the Trainer drops them."""
        state = GradientState()
        if self._args.world_size == 1 or not state.end_of_dataloader or state.remainder < 1:
            return rows
        return min(max(state.remainder - self._args.process_index * rows, 0), rows)

    def _take_new(self):
        for sums in (self._since_log, *(window.sums for window in self._windows)):
            sums.merge(self._new)
        self._new = _Sums()

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._attach(args, model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._attach(args, model)
        warm_ups = args.get_warmup_steps(state.max_steps), model.config.kl_warmup_steps
        self._start(state.global_step, [_Window(warm_up, state.global_step) for warm_up in warm_ups])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for window in self._windows:
            if state.global_step != window.end:
                continue
            self._take_new()
            if window.is_second_half():
                self._look_at(window, args, state, model.config)
            window.move_on()

    def _look_at(self, window: _Window, args, state, config):
        values = window.sums.averages(args.world_size, window.end - window.start)
        steps, advice = range(window.start, window.end), None
        if window is self._windows[0] and self._token_counts is not None:
            counts = self._token_counts.float()
            counts = reduce(counts, "sum") if args.world_size > 1 else counts
            advice = advice_on_learning(config, args, unigram_entropy(counts), steps, values["reconstruction_loss"])
        elif window is self._windows[1] and "active_units" in values:
            advice = advice_on_latent(config, steps, values["kl_per_latent"], values["active_units"])
        if advice and state.is_world_process_zero:
            logger.warning("step %d: %s", state.global_step, advice)

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        self._evaluated = _Sums()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self._take_new()
            sums, self._since_log = self._since_log, _Sums()
            values = sums.averages(args.world_size, max(state.global_step - self._last_logged_step, 1))
            self._last_logged_step = state.global_step
            prefix = ""
        else:
            losses = [name for name in logs if name.endswith("_loss") and name != "train_loss"]
            if not losses:
                return
            sums, self._evaluated = self._evaluated, _Sums()
            values = sums.averages(args.world_size, steps=None)
            prefix = losses[0].removesuffix("loss")
        values = {prefix + name: value for name, value in values.items()}
        logs.update(values)
        state.log_history[-1].update(values)


__all__ = ["VMDMetricsCallback"]
