"""Sampling: `generate` for masked diffusion with a latent (arXiv 2510.23606, algorithm 2), made of small pieces."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import ModelOutput

from .noise_vmd import num_revealed, step_schedule

Generators = torch.Generator | list[torch.Generator] | None

REMASKING_RULES = ("random", "top_prob", "top_prob_margin", "entropy")


class VMDGenerationConfig(GenerationConfig):
    """Settings of `generate`, saved with the model in generation_config.json.

    Args:
        max_new_tokens: Mask tokens appended to the prompt before filling; `None`: fill the masks that are there.
        num_steps: Forward passes in which a row is filled; a row with fewer masks takes fewer. `None`: one token a
            step.
        remasking: Which predictions are kept at each step: `"random"` positions, or those with the highest
            probability (`"top_prob"`), the widest margin between the two most probable tokens
            (`"top_prob_margin"`, arXiv 2502.06768), or the lowest entropy (`"entropy"`).
        do_sample: `False`: the most probable token (the paper's algorithm). `True`: a draw from the distribution.
        temperature, top_k, top_p: Change the distribution that tokens are drawn from, with `do_sample` only. The
            confidence of the remasking rules is that of the unchanged distribution.
        confidence_threshold: In (0, 1). Reveals every token whose confidence under `remasking` (`"top_prob"` or
            `"top_prob_margin"`) exceeds it, and at least one: as many steps as it takes, `num_steps` at most.
        resample_latents: Draw a fresh z for each step instead of keeping one. `True` is the sampler that belongs to
            `objective="per_step"` (whose models default to it) and to `"vmd"`; `False`, the paper's, to
            `"per_sample"`.
        latent_scale: Factor on drawn latents: below 1 for more typical samples. 1 samples the model.
        use_cache: Only models with blocks have a cache; no effect on whole sequences.
        return_dict_in_generate: Return a [`VMDGenerateOutput`] instead of the sequences alone.
        output_history: Put the sequences after every step into that output.
        bos_token_id, eos_token_id, pad_token_id: Special tokens. What follows the first end-of-sequence token among
            new tokens becomes padding.

    Raises:
        ValueError: for a value out of range, a contradiction, or an unknown name.
    """

    def __init__(self, **kwargs):
        # The parent's __init__ is left out on purpose: its fields belong to autoregressive sampling.
        self.max_new_tokens: int | None = kwargs.pop("max_new_tokens", None)
        self.num_steps: int | None = kwargs.pop("num_steps", None)
        self.remasking: str = kwargs.pop("remasking", "top_prob")
        self.do_sample: bool = kwargs.pop("do_sample", False)
        self.temperature: float | None = kwargs.pop("temperature", None)
        self.top_k: int | None = kwargs.pop("top_k", None)
        self.top_p: float | None = kwargs.pop("top_p", None)
        self.confidence_threshold: float | None = kwargs.pop("confidence_threshold", None)
        self.resample_latents: bool = kwargs.pop("resample_latents", False)
        self.latent_scale: float = kwargs.pop("latent_scale", 1.0)
        self.use_cache: bool = kwargs.pop("use_cache", True)
        self.return_dict_in_generate: bool = kwargs.pop("return_dict_in_generate", False)
        self.output_history: bool = kwargs.pop("output_history", False)
        self.bos_token_id: int | None = kwargs.pop("bos_token_id", None)
        self.eos_token_id: int | list[int] | None = kwargs.pop("eos_token_id", None)
        self.pad_token_id: int | None = kwargs.pop("pad_token_id", None)

        self._from_model_config: bool | None = kwargs.pop("_from_model_config", None)
        self.transformers_version: str | None = kwargs.pop("transformers_version", None)
        kwargs.pop("_commit_hash", None)
        if kwargs:
            raise ValueError(f"VMDGenerationConfig knows no argument {', '.join(map(repr, sorted(kwargs)))}")
        self.validate()

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None):
        """Raises ValueError at the first broken rule; `strict` and `user_set_attributes` are the parent's."""
        for name in ("max_new_tokens", "num_steps", "top_k"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be None or an integer of at least 1, got {value!r}")
        if self.remasking not in REMASKING_RULES:
            raise ValueError(f"remasking must be one of {REMASKING_RULES}, got {self.remasking!r}")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature must be above 0 (do_sample=False is greedy), got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        for name in ("temperature", "top_k", "top_p"):
            if not self.do_sample and getattr(self, name) is not None:
                raise ValueError(f"{name} needs do_sample=True, got {name}={getattr(self, name)} without it")
        if self.confidence_threshold is not None:
            if not 0 < self.confidence_threshold < 1:
                raise ValueError(f"confidence_threshold must lie in (0, 1), got {self.confidence_threshold}")
            if self.remasking not in ("top_prob", "top_prob_margin"):
                raise ValueError(
                    "confidence_threshold needs remasking='top_prob' or 'top_prob_margin', got "
                    f"remasking={self.remasking!r}"
                )
        if self.latent_scale < 0:
            raise ValueError(f"latent_scale must not be negative, got {self.latent_scale}")
        if self.output_history and not self.return_dict_in_generate:
            raise ValueError("output_history needs return_dict_in_generate=True, got False")

    @classmethod
    def from_model_config(cls, model_config) -> "VMDGenerationConfig":
        """The defaults of a model: its special tokens, and the sampler that belongs to its objective."""
        values = model_config if isinstance(model_config, dict) else model_config.to_dict()
        return cls(
            eos_token_id=values.get("eos_token_id"),
            pad_token_id=values.get("pad_token_id"),
            resample_latents=values.get("objective") == "per_step" and values.get("latent_size", 0) > 0,
            _from_model_config=True,
        )


@dataclass
class VMDGenerateOutput(ModelOutput):
    """Output of `generate` with `return_dict_in_generate=True`.

    Attributes:
        sequences: (batch, length) int64.
        num_forward_passes: (batch,) int64, counted.
        latents: (batch, latent_size) float32 or None; with `resample_latents` those of each row's last step.
        history: With `output_history`, the sequences after every step, a tuple of (batch, length).
    """

    sequences: torch.LongTensor | None = None
    num_forward_passes: torch.LongTensor | None = None
    latents: torch.Tensor | None = None
    history: tuple[torch.LongTensor, ...] | None = None


def prepare_canvas(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int | None, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences to fill and their attention mask, (batch, length).

    With `max_new_tokens` the prompts are aligned to end in one column (padding moves to the left) and that many masks
    are appended; without, both come back as they are.
    """
    if max_new_tokens is None:
        return input_ids.clone(), attention_mask
    padding_first = attention_mask.ne(0).long().argsort(dim=-1, stable=True)
    new = input_ids.new_full((len(input_ids), max_new_tokens), mask_token_id)
    return (
        torch.cat([input_ids.gather(-1, padding_first), new], dim=-1),
        torch.cat([attention_mask.gather(-1, padding_first), torch.ones_like(new)], dim=-1),
    )


def draw(
    sampler: Callable[..., torch.Tensor],
    counts: list[int],
    trailing: tuple[int, ...],
    generator: Generators,
    device: torch.device,
) -> torch.Tensor:
    """`sampler((sum(counts), *trailing))`, row by row of the batch where every row has a generator of its own.

    With a list, row i's numbers come from its generator alone, so they do not depend on the rest of the batch.
    """
    if not isinstance(generator, list):
        source = device if generator is None else generator.device
        return sampler((sum(counts), *trailing), generator=generator, device=source).to(device)
    parts = [
        sampler((count, *trailing), generator=row, device=row.device).to(device)
        for count, row in zip(counts, generator, strict=True)
    ]
    return torch.cat(parts)


def exponential(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, device=device).exponential_(generator=generator)


def warp(logits: torch.Tensor, config: VMDGenerationConfig) -> torch.Tensor:
    """Logits after temperature, top-k and top-p. (..., vocabulary) to the same."""
    if config.temperature is not None:
        logits = TemperatureLogitsWarper(float(config.temperature))(None, logits)
    if config.top_k is not None:
        logits = TopKLogitsWarper(config.top_k)(None, logits)
    if config.top_p is not None:
        logits = TopPLogitsWarper(float(config.top_p))(None, logits)
    return logits


def confidence_of(logits: torch.Tensor, tokens: torch.Tensor, rule: str) -> torch.Tensor:
    """How sure the model is of each prediction, higher is surer: (positions,) float32.

    Args:
        logits: (positions, vocabulary).
        tokens: (positions,), the predicted tokens.
        rule: `"top_prob"`, `"top_prob_margin"` or `"entropy"`.
    """
    probabilities = logits.softmax(-1)
    if rule == "top_prob":
        return probabilities.gather(-1, tokens[:, None]).squeeze(-1)
    if rule == "top_prob_margin":
        best, second = probabilities.topk(2, dim=-1).values.unbind(-1)
        return best - second
    return -torch.special.entr(probabilities).sum(-1)


def select_positions(confidence: torch.Tensor, masked: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The `count` (batch,) masked positions of highest confidence of each row; equal ones from left to right.

    Args:
        confidence: (batch, length) float.
        masked: (batch, length) bool.

    Returns:
        (batch, length) bool.
    """
    order = confidence.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, ranks)
    return masked & (rank < count[:, None])


def pad_after_eos(
    sequences: torch.Tensor, new_tokens: int, eos_token_id: int | list[int] | None, pad_token_id: int | None
) -> torch.Tensor:
    """Sequences with everything after the first end-of-sequence token among the last `new_tokens` padded."""
    if eos_token_id is None:
        return sequences
    eos = torch.tensor(eos_token_id, device=sequences.device).view(-1)
    is_eos = torch.isin(sequences[:, -new_tokens:], eos)
    after = (is_eos.cumsum(-1) - is_eos.long()) > 0
    padded = sequences[:, -new_tokens:].masked_fill(after, eos[0] if pad_token_id is None else pad_token_id)
    return torch.cat([sequences[:, :-new_tokens], padded], dim=-1)


class PrefixStreamer:
    """Feeds a transformers streamer, which reads from left to right, the prefix that is final in every row."""

    def __init__(self, streamer):
        self.streamer = streamer
        self.sent = 0

    def put(self, sequences: torch.Tensor, masked: torch.Tensor):
        open_columns = masked.any(0)
        final = int(open_columns.long().argmax()) if open_columns.any() else len(open_columns)
        if final > self.sent or self.sent == 0:
            self.streamer.put(sequences[:, self.sent : final].cpu())
        self.sent = final


class VMDGenerationMixin:
    """`generate` for [`VMDForMaskedDiffusion`]."""

    output_modalities = ("text",)

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        cache_dir,
        force_download,
        proxies,
        local_files_only,
        token,
        revision,
        subfolder,
        trust_remote_code,
        **kwargs,
    ):
        """Called by `from_pretrained`: takes the given generation config, or loads the saved one."""
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_dict(generation_config.to_dict())
            return
        try:
            self.generation_config = self.generation_config_class.from_pretrained(
                pretrained_model_name_or_path,
                _from_auto=from_auto_class,
                _from_pipeline=from_pipeline,
                cache_dir=cache_dir,
                force_download=force_download,
                proxies=proxies,
                local_files_only=local_files_only,
                token=token,
                revision=revision,
                subfolder=subfolder,
                **kwargs,
            )
        except OSError:
            pass  # a checkpoint without the file keeps the defaults of its model config

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        """Read by PEFT's causal language model wrapper; `generate` does not need it."""
        return {"input_ids": input_ids, **kwargs}

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: VMDGenerationConfig | None = None,
        *,
        latents: torch.Tensor | None = None,
        generator: Generators = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: Any = None,
        **kwargs,
    ) -> torch.LongTensor | VMDGenerateOutput:
        """Fills every mask token of `input_ids`; with `max_new_tokens`, appends that many masks first.

        Tokens that are given never change. Each step runs the model once over the rows that still have masks,
        predicts their masked positions and keeps as many as the schedule says: after step k of its T_n steps a row of
        n masks has floor(k n / T_n) of them filled.

        Args:
            input_ids: (batch, length) int64; some are the mask token.
            attention_mask: (batch, length), 0 for padding on either side; padding is never filled.
            generation_config: Replaces the model's own.
            latents: (batch, latent_size) float, instead of a draw from N(0, I). They are kept for all steps.
            generator: One for the batch, or a list of one for each row: then what a row gets does not depend on the
                rest of the batch.
            logits_processor: Called with `(sequences, scores)`, one row for each masked position: (positions, length)
                and (positions, vocabulary).
            stopping_criteria: Called after each step with the sequences (batch, length), masks included; a row for
                which it says so is left as it is.
            streamer: Gets the prefix of the sequence as it becomes final, the given prefix first.
            kwargs: Any field of [`VMDGenerationConfig`], which it overrides for this call.

        Returns:
            (batch, length) int64, or [`VMDGenerateOutput`] with `return_dict_in_generate=True`. With
            `max_new_tokens` the prompts end in one column, padded on the left.

        Raises:
            ValueError: for wrong shapes, unknown or contradicting settings.
        """
        config = self._generation_settings(generation_config, kwargs)
        self._check_generation_inputs(input_ids, attention_mask, latents, generator, config)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        sequences, attention_mask = prepare_canvas(
            input_ids, attention_mask, config.max_new_tokens, self.config.mask_token_id
        )
        batch_size = len(sequences)
        masked = (sequences == self.config.mask_token_id) & (attention_mask != 0)
        num_maskable = masked.sum(-1)
        row_steps = num_maskable if config.num_steps is None else step_schedule(num_maskable, config.num_steps)
        if latents is None and self.config.latent_size:
            latents = self._draw_latents(torch.arange(batch_size), generator, config)

        num_forward_passes = torch.zeros_like(num_maskable)
        stopped = torch.zeros_like(num_maskable, dtype=torch.bool)
        history = []
        if streamer is not None:
            prefix_streamer = PrefixStreamer(streamer)
            prefix_streamer.put(sequences, masked)

        step = 0
        while len(active := (masked.any(-1) & ~stopped).nonzero().squeeze(-1)):
            step += 1
            if config.resample_latents and step > 1 and latents is not None:
                latents = latents.index_copy(0, active, self._draw_latents(active, generator, config))
            tokens, confidence = self._predict(
                sequences, masked, attention_mask, latents, active, config, generator, logits_processor
            )
            count = num_revealed(step, num_maskable, row_steps) - (num_maskable - masked.sum(-1))
            if config.confidence_threshold is not None:
                count = count.maximum((confidence > config.confidence_threshold).sum(-1))
            revealed = select_positions(confidence, masked, count.clamp(min=1))
            revealed = revealed & confidence.gt(-torch.inf)  # rows that are not active have no prediction
            sequences = torch.where(revealed, tokens, sequences)
            masked = masked & ~revealed
            num_forward_passes[active] += 1
            if config.output_history:
                history.append(sequences)
            if stopping_criteria is not None:
                stopped |= stopping_criteria(sequences, None)
            if streamer is not None:
                final = sequences
                if config.max_new_tokens is not None:
                    final = pad_after_eos(sequences, config.max_new_tokens, config.eos_token_id, config.pad_token_id)
                prefix_streamer.put(final, masked)

        if config.max_new_tokens is not None:
            sequences = pad_after_eos(sequences, config.max_new_tokens, config.eos_token_id, config.pad_token_id)
        if streamer is not None:
            streamer.end()
        if not config.return_dict_in_generate:
            return sequences
        return VMDGenerateOutput(
            sequences=sequences,
            num_forward_passes=num_forward_passes,
            latents=latents,
            history=tuple(history) if config.output_history else None,
        )

    def _predict(
        self, sequences, masked, attention_mask, latents, active, config, generator, logits_processor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted tokens and their confidence at the masked positions of the active rows, both (batch, length);
        elsewhere the confidence is -inf."""
        every = len(active) == len(sequences)
        hidden_states = self.model(
            sequences if every else sequences[active],
            attention_mask=attention_mask if every else attention_mask[active],
            latents=latents if every or latents is None else latents[active],
        ).last_hidden_state
        rows, columns = (masked if every else masked[active]).nonzero(as_tuple=True)
        logits = self.compute_logits(hidden_states[rows, columns]).float()  # (positions, vocabulary)
        rows = active[rows]
        if logits_processor is not None:
            logits = logits_processor(sequences[rows], logits)

        row_generators = [generator[row] for row in active.tolist()] if isinstance(generator, list) else generator
        counts = masked[active].sum(-1).tolist()
        if config.do_sample:
            # The largest of probabilities over independent exponentials falls on a token with its probability.
            race = draw(exponential, counts, (logits.shape[-1],), row_generators, logits.device)
            chosen = (warp(logits, config).softmax(-1) / race).argmax(-1)
        else:
            chosen = logits.argmax(-1)
        if config.remasking == "random":
            confident = draw(torch.rand, counts, (), row_generators, logits.device)
        else:
            confident = confidence_of(logits, chosen, config.remasking)

        tokens = sequences.index_put((rows, columns), chosen)
        confidence = torch.full(sequences.shape, -torch.inf, device=logits.device)
        return tokens, confidence.index_put((rows, columns), confident)

    def _draw_latents(self, rows, generator, config):
        row_generators = [generator[row] for row in rows.tolist()] if isinstance(generator, list) else generator
        latents = draw(torch.randn, [1] * len(rows), (self.config.latent_size,), row_generators, self.device)
        return config.latent_scale * latents

    def _generation_settings(self, generation_config, kwargs) -> VMDGenerationConfig:
        if generation_config is None:
            config = copy.deepcopy(self.generation_config)
        elif isinstance(generation_config, VMDGenerationConfig):
            config = copy.deepcopy(generation_config)
            special_tokens = {name: getattr(self.generation_config, name) for name in ("eos_token_id", "pad_token_id")}
            config.update(defaults_only=True, **special_tokens)
        else:
            raise ValueError(
                f"generation_config must be a VMDGenerationConfig, got {type(generation_config).__name__}"
            )
        if unknown := kwargs.keys() - vars(config).keys():
            raise ValueError(f"generate knows no argument {', '.join(map(repr, sorted(unknown)))}")
        config.update(**kwargs)
        return config

    def _check_generation_inputs(self, input_ids, attention_mask, latents, generator, config):
        if self.config.mask_token_id is None:
            raise ValueError("mask_token_id must be set in the config to generate, got None")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must have shape (batch, length), got {tuple(input_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        if isinstance(generator, list) and len(generator) != len(input_ids):
            raise ValueError(f"generator must hold one for each of {len(input_ids)} rows, got {len(generator)}")
        if latents is None:
            return
        shape = (len(input_ids), self.config.latent_size)
        if self.config.latent_size == 0:
            raise ValueError("latents must be None for a model with latent_size = 0")
        if latents.shape != shape:
            raise ValueError(f"latents must have shape (batch, latent_size) = {shape}, got {tuple(latents.shape)}")
        if config.resample_latents:
            raise ValueError("latents must be None with resample_latents=True, which draws them at every step")


__all__ = ["VMDGenerateOutput", "VMDGenerationConfig", "VMDGenerationMixin"]
