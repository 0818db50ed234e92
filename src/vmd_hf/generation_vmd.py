"""Sampling: `generate` for masked diffusion with a latent (arXiv 2510.23606, algorithm 2), made of small pieces."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import ModelOutput

from .blocks_vmd import EMPTY, CleanContext, Layout, Places, join_places, stack_places
from .schedule_vmd import most_revealed, num_revealed, step_schedule

Generators = torch.Generator | list[torch.Generator] | None

REMASKING_RULES = ("random", "top_prob", "top_prob_margin", "entropy")
CORRECTORS = (None, "cap", "rescale", "confidence")
CACHES = ("dynamic", "static")


class VMDGenerationConfig(GenerationConfig):
    """Settings of `generate`, saved with the model in generation_config.json.

    Args:
        max_new_tokens: Mask tokens appended to the prompt before filling; `None`: fill the masks that are there.
        num_steps: Forward passes in which a row, or with blocks each block of it, is filled; with fewer masks than
            that it takes fewer. `None`: one token a step.
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
        corrector: Mask revealed tokens again at each step, so that they can be corrected (ReMDM, arXiv 2503.00307,
            section 4). With alpha and alpha' the shares of tokens revealed before and after the step, the probability
            is at most sigma_max = min(1, (1 - alpha') / alpha): `"cap"`: min(corrector_strength, sigma_max);
            `"rescale"`: corrector_strength * sigma_max; `"confidence"`: that times the softmax over the row's
            revealed tokens of minus the probability that they had when they were revealed. Given tokens stay. With a
            corrector, a row takes `num_steps` steps even where it has fewer masks. Off by default.
        corrector_strength: eta of that paper, in (0, 1].
        guidance_scale: Classifier-free guidance on the given tokens: hidden states are extrapolated from those
            without the prompt, `without + guidance_scale * (with - without)`, which the linear output layer turns
            into the same for logits. Without the prompt: its tokens are masks (in earlier blocks: not there). One
            pass of twice as many rows. `None` and 1 are no guidance.
        use_cache: Keep keys and values of finished blocks; no effect on whole sequences.
        cache_implementation: `"dynamic"` (grows) or `"static"` (allocated once).
        return_dict_in_generate: Return a [`VMDGenerateOutput`] instead of the sequences alone.
        output_history: Put the sequences after every step into that output.
        output_confidences: Put the probability that each token had when it was revealed into that output.
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
        self.corrector: str | None = kwargs.pop("corrector", None)
        self.corrector_strength: float = kwargs.pop("corrector_strength", 0.1)
        self.guidance_scale: float | None = kwargs.pop("guidance_scale", None)
        self.use_cache: bool = kwargs.pop("use_cache", True)
        self.cache_implementation: str = kwargs.pop("cache_implementation", "dynamic")
        self.return_dict_in_generate: bool = kwargs.pop("return_dict_in_generate", False)
        self.output_history: bool = kwargs.pop("output_history", False)
        self.output_confidences: bool = kwargs.pop("output_confidences", False)
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
        if self.corrector not in CORRECTORS:
            raise ValueError(f"corrector must be one of {CORRECTORS}, got {self.corrector!r}")
        if not 0 < self.corrector_strength <= 1:
            raise ValueError(f"corrector_strength must lie in (0, 1], got {self.corrector_strength}")
        if self.corrector is not None and self.confidence_threshold is not None:
            raise ValueError(
                "corrector must be None with confidence_threshold, which leaves no schedule to correct in, got "
                f"{self.corrector!r}"
            )
        if self.guidance_scale is not None and self.guidance_scale < 0:
            raise ValueError(f"guidance_scale must be None or not negative, got {self.guidance_scale}")
        if self.cache_implementation not in CACHES:
            raise ValueError(f"cache_implementation must be one of {CACHES}, got {self.cache_implementation!r}")
        for name in ("output_history", "output_confidences"):
            if getattr(self, name) and not self.return_dict_in_generate:
                raise ValueError(f"{name} needs return_dict_in_generate=True, got False")

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
        latents: (batch, latent_size) float32 or None; with `resample_latents` those of each row's last step. With
            blocks (batch, generated blocks, latent_size), 0 for blocks that a row did not generate.
        history: With `output_history`, the sequences after every step, a tuple of (batch, length).
        confidences: With `output_confidences`, (batch, length) float32: the probability of each token given what was
            there when it was revealed (before temperature, top-k and top-p); 1 for what was given, 0 for masks that
            are left.
    """

    sequences: torch.LongTensor | None = None
    num_forward_passes: torch.LongTensor | None = None
    latents: torch.Tensor | None = None
    history: tuple[torch.LongTensor, ...] | None = None
    confidences: torch.Tensor | None = None


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


def check_generators(generator: Generators, num_rows: int) -> None:
    if isinstance(generator, list) and len(generator) != num_rows:
        raise ValueError(f"generator must hold one for each of {num_rows} rows, got {len(generator)}")


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


def new_eos_tokens(sequences: torch.Tensor, config: VMDGenerationConfig) -> torch.Tensor | None:
    """Which of the last `max_new_tokens` end a sequence: (batch, max_new_tokens) bool; `None` where none can."""
    if config.eos_token_id is None or config.max_new_tokens is None:
        return None
    return torch.isin(
        sequences[:, -config.max_new_tokens :], torch.tensor(config.eos_token_id, device=sequences.device).view(-1)
    )


def pad_after_eos(sequences: torch.Tensor, config: VMDGenerationConfig) -> torch.Tensor:
    """Sequences with everything after the first end-of-sequence token among the last `max_new_tokens` padded."""
    is_eos = new_eos_tokens(sequences, config)
    if is_eos is None:
        return sequences
    after = (is_eos.cumsum(-1) - is_eos.long()) > 0
    eos = config.eos_token_id if isinstance(config.eos_token_id, int) else config.eos_token_id[0]
    padding = eos if config.pad_token_id is None else config.pad_token_id
    padded = sequences[:, -config.max_new_tokens :].masked_fill(after, padding)
    return torch.cat([sequences[:, : -config.max_new_tokens], padded], dim=-1)


def check_length(attention_mask: torch.Tensor, model_config) -> None:
    longest = int(attention_mask.ne(0).sum(-1).max())
    if longest > model_config.max_position_embeddings:
        raise ValueError(
            "input_ids and max_new_tokens must make at most max_position_embeddings = "
            f"{model_config.max_position_embeddings} tokens, the length that the model was made for, got {longest}"
        )


def corrector_probability(
    revealed: torch.Tensor,
    probability: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    num_maskable: torch.Tensor,
    config: VMDGenerationConfig,
) -> torch.Tensor:
    """sigma of ReMDM (arXiv 2503.00307, section 4): with which probability each revealed token is masked again.

    Args:
        revealed: (batch, length) bool, tokens that were filled in earlier steps.
        probability: (batch, length), what each of them had when it was revealed.
        before, after, num_maskable: (batch,), tokens revealed before and after the step by the schedule, and of all.

    Returns:
        (batch, length) float, 0 where nothing was revealed.
    """
    sigma_max = ((num_maskable - after) / before.clamp(min=1)).clamp(max=1)[:, None]
    if config.corrector == "cap":
        sigma = sigma_max.clamp(max=config.corrector_strength)
    else:
        sigma = config.corrector_strength * sigma_max
        if config.corrector == "confidence":
            sigma = sigma * (-probability).masked_fill(~revealed, -torch.inf).softmax(-1).nan_to_num()
    return torch.where(revealed, sigma, 0.0)


class PrefixStreamer:
    """Feeds a transformers streamer, which reads from left to right, the prefix that is final in every row; and, if it
    has `put_draft`, the sequences after every step."""

    def __init__(self, streamer):
        self.streamer = streamer
        self.sent = -1  # not even the given prefix, which may be empty

    def put(self, sequences: torch.Tensor, masked: torch.Tensor):
        open_columns = masked.any(0)
        final = int(open_columns.long().argmax()) if open_columns.any() else len(open_columns)
        if final > self.sent:
            self.streamer.put(sequences[:, max(self.sent, 0) : final].cpu())
            self.sent = final

    def draft(self, sequences: torch.Tensor):
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(sequences.cpu())


@dataclass
class Canvas:
    """The sequences at work, on the model's grid (for whole sequences, the rows themselves as one block each).

    Attributes:
        tokens: (batch, N * width) int64.
        masked: (batch, N * width) bool, positions still to be filled.
        given: (batch, N * width) bool, tokens that were there from the start.
        layout: Of the grid.
        order: (batch, rounds) int64, the block that each row fills in each round, -1 where it has none left.
        padding: (batch, length), the rows as they were given, for what stands on padding.
        real: (batch, length) bool, what does not.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    given: torch.Tensor
    layout: Layout
    order: torch.Tensor
    padding: torch.Tensor
    real: torch.Tensor

    @classmethod
    def create(cls, sequences, attention_mask, layout: Layout, mask_token_id: int) -> "Canvas":
        real = layout.scatter(attention_mask != 0, False)
        tokens = layout.scatter(sequences, 0)
        masked = real & (tokens == mask_token_id)
        unfilled = masked.unflatten(1, (layout.num_blocks, layout.width)).any(-1)
        count = unfilled.sum(-1, keepdim=True)
        order = unfilled.long().argsort(dim=-1, descending=True, stable=True)[:, : int(count.max())]
        order = order.masked_fill(torch.arange(order.shape[1], device=order.device) >= count, -1)
        return cls(tokens, masked, real & ~masked, layout, order, sequences, attention_mask != 0)

    def sequences(self) -> torch.Tensor:
        """(batch, length) in the rows' own columns, a copy."""
        return self.in_rows(self.tokens, self.padding)

    def in_rows(self, grid: torch.Tensor, padding: torch.Tensor | float) -> torch.Tensor:
        """(batch, N * width) values on the grid to (batch, length) in the rows' own columns."""
        return torch.where(self.real, self.layout.gather(grid), padding)

    def open_columns(self) -> torch.Tensor:
        """(batch, length) bool in the rows' own columns, still masked."""
        return self.real & self.layout.gather(self.masked)

    def columns(self, first_block: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """(rows, num_blocks * width): the columns of `num_blocks` blocks from each row's `first_block` (rows,) on,
        the last ones of the grid again where there are no more."""
        width = self.layout.width
        columns = first_block[:, None] * width + torch.arange(num_blocks * width, device=first_block.device)
        return columns.clamp(max=self.tokens.shape[1] - 1)

    def window(self, rows: torch.Tensor, block: torch.Tensor) -> Layout:
        """Layout of one block of each of some rows."""
        columns = self.columns(block, 1)
        layout = self.layout
        return Layout(
            num_blocks=1,
            width=layout.width,
            position_ids=layout.position_ids[rows].gather(-1, columns),
            real=None if layout.real is None else layout.real[rows].gather(-1, columns),
            document=None
            if layout.document is None
            else layout.document.expand_as(self.tokens)[rows].gather(-1, columns),
            first_block=block[:, None],
        )

    def clean_blocks(self, rows: torch.Tensor, first: torch.Tensor, stop: torch.Tensor, without_given: bool):
        """Tokens, positions and places of blocks `first` to `stop` (rows,) of some rows, in as many columns as the
        longest needs. `without_given` hides the given tokens from all others."""
        count = int((stop - first).max())
        columns = self.columns(first, count)
        block = first[:, None] + torch.arange(columns.shape[1], device=columns.device) // self.layout.width
        hidden = block >= stop[:, None]
        if without_given:
            hidden = hidden | self.given[rows].gather(-1, columns)
        document = self.layout.document.expand_as(self.tokens)[rows].gather(-1, columns).masked_fill(hidden, EMPTY)
        places = Places(block, document, torch.ones_like(hidden))
        return self.tokens[rows].gather(-1, columns), self.layout.position_ids[rows].gather(-1, columns), places

    def put(self, rows: torch.Tensor, block: torch.Tensor, tokens: torch.Tensor, masked: torch.Tensor):
        columns = self.columns(block, 1)
        self.tokens[rows[:, None], columns] = tokens
        self.masked[rows[:, None], columns] = masked


class ContextReader:
    """What blocks at work see of the clean blocks before them: read once and kept in a transformers cache, or, without
    a cache, read again in every pass. With guidance, rows from `batch` on are those without the prompt."""

    def __init__(self, model_config, canvas: Canvas, config: VMDGenerationConfig):
        self.canvas = canvas
        self.guided = config.guidance_scale is not None
        self.batch = len(canvas.tokens) * (2 if self.guided else 1)
        self.read: Places | None = None
        self.cache = None
        if config.use_cache and config.cache_implementation == "static":
            before = canvas.order.clamp(min=0)
            num_blocks = int(torch.diff(before, prepend=torch.zeros_like(before[:, :1])).clamp(min=0).amax(0).sum())
            num_layers = model_config.num_hidden_layers * model_config.num_loops
            columns = max(num_blocks, 1) * canvas.layout.width
            self.cache = Cache(layers=[StaticLayer(max_cache_len=columns) for _ in range(num_layers)])
        elif config.use_cache:
            self.cache = DynamicCache()

    def context(self, rows: torch.Tensor, block: torch.Tensor, round_index: int, first_step: bool) -> CleanContext:
        """For denoising `block` (rows,): the tokens that the cache holds, and those that are to be read now."""
        context = CleanContext()
        both = self._both(rows)
        if self.read is not None:
            # What a static cache has left.
            empty = self.cache.layers[0].keys.shape[2] - self.read.block.shape[1]
            context.read = Places(
                pad(self._select(self.read.block, both), (0, empty)),
                pad(self._select(self.read.document, both), (0, empty), value=EMPTY),
                pad(self._select(self.read.clean, both), (0, empty), value=True),
            )
            context.keys_values = [
                (self._select(layer.keys, both), self._select(layer.values, both)) for layer in self.cache.layers
            ]
        if self.cache is not None and not first_step:
            return context
        first = torch.zeros_like(block)
        if self.cache is not None and round_index:
            first = self.canvas.order[rows, round_index - 1]
        if not bool((block > first).any()):
            return context
        parts = [self.canvas.clean_blocks(rows, first, block, without_given=False)]
        if self.guided:
            parts.append(self.canvas.clean_blocks(rows, first, block, without_given=True))
        tokens, positions, places = zip(*parts, strict=True)
        context.input_ids, context.position_ids = torch.cat(tokens), torch.cat(positions)
        context.new = stack_places(places)
        return context

    def keep(self, rows: torch.Tensor, context: CleanContext, keys_values) -> None:
        """Writes what a pass has read into the cache."""
        if self.cache is None or context.input_ids is None:
            return
        both = self._both(rows)
        new = context.new.map(lambda value: value.contiguous())
        if len(both) < self.batch:
            new = Places(
                *(
                    fill.new_full((self.batch, fill.shape[1]), empty).index_copy(0, both, fill)
                    for fill, empty in ((new.block, 0), (new.document, EMPTY), (new.clean, True))
                )
            )
        for index, pair in enumerate(keys_values):
            if len(both) < self.batch:
                pair = tuple(part.new_zeros((self.batch, *part.shape[1:])).index_copy(0, both, part) for part in pair)
            self.cache.update(*pair, index)
        self.read = new if self.read is None else join_places([self.read, new])

    def _both(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, rows + self.batch // 2]) if self.guided else rows

    def _select(self, value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return value if len(rows) == len(value) else value[rows]


@dataclass
class GenerationState:
    """What one call of `generate` carries along."""

    config: VMDGenerationConfig
    canvas: Canvas
    reader: ContextReader | None
    latents: torch.Tensor | None  # (batch, rounds, latent_size)
    given_latents: bool
    generator: Generators
    num_forward_passes: torch.Tensor
    stopped: torch.Tensor
    history: list[torch.Tensor]
    confidences: torch.Tensor  # (batch, N * width)
    logits_processor: LogitsProcessorList | None
    stopping_criteria: StoppingCriteriaList | None
    streamer: PrefixStreamer | None

    def sequences(self) -> torch.Tensor:
        """(batch, length) in the rows' own columns, with everything after an end-of-sequence token padded."""
        return pad_after_eos(self.canvas.sequences(), self.config)

    def generators(self, rows: torch.Tensor) -> Generators:
        return [self.generator[row] for row in rows.tolist()] if isinstance(self.generator, list) else self.generator


def execution_device(model) -> torch.device:
    """Where the model computes: weights that are offloaded are moved there when they are used."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


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
        """Called by `from_pretrained`: takes the given generation config, or loads the saved one. (`kwargs` are fields
        of the model's config.)"""
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_dict(generation_config.to_dict())
            return
        if pretrained_model_name_or_path is None:
            return  # weights were given, so there is no file
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

        With blocks, they are filled from left to right: a block sees its own given tokens and everything in the blocks
        before it, but nothing after it. Given tokens in later blocks do not influence a gap before them; a model
        without blocks (`block_size=None`) fills gaps from both sides.

        Tokens that are given never change. Each step runs the model once over the rows that still have masks,
        predicts their masked positions and keeps as many as the schedule says: after step k of its T_n steps a row (or
        block) of n masks has floor(k n / T_n) of them filled.

        Args:
            input_ids: (batch, length) int64; some are the mask token.
            attention_mask: (batch, length), 0 for padding on either side; padding is never filled.
            generation_config: Replaces the model's own.
            latents: (batch, latent_size) float, instead of a draw from N(0, I). They are kept for all steps. With
                blocks (batch, generated blocks, latent_size), for the blocks in which there is something to fill.
            generator: One for the batch, or a list of one for each row: then what a row gets does not depend on the
                rest of the batch.
            logits_processor: Called with `(sequences, scores)`, one row for each masked position: (positions, length)
                and (positions, vocabulary).
            stopping_criteria: Called after each step with the sequences (batch, length), masks included; a row for
                which it says so is left as it is.
            streamer: Gets the prefix of the sequence as it becomes final, the given prefix first. If it has a method
                `put_draft`, that gets the sequences (batch, length) after every step, masks included.
            kwargs: Any field of [`VMDGenerationConfig`], which it overrides for this call.

        Returns:
            (batch, length) int64, or [`VMDGenerateOutput`] with `return_dict_in_generate=True`. With
            `max_new_tokens` the prompts end in one column, padded on the left.

        Raises:
            ValueError: for wrong shapes, unknown or contradicting settings.
        """
        input_ids = input_ids.long()
        config = self._generation_settings(generation_config, kwargs)
        self._check_generation_inputs(input_ids, attention_mask, latents, generator, config)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        sequences, attention_mask = prepare_canvas(
            input_ids, attention_mask, config.max_new_tokens, self.config.mask_token_id
        )
        check_length(attention_mask, self.config)
        layout = self.model.lay_out(sequences, attention_mask)
        canvas = Canvas.create(sequences, attention_mask, layout, self.config.mask_token_id)
        state = GenerationState(
            config=config,
            canvas=canvas,
            reader=None if self.config.block_size is None else ContextReader(self.config, canvas, config),
            latents=self._round_latents(latents, canvas),
            given_latents=latents is not None,
            generator=generator,
            num_forward_passes=torch.zeros_like(sequences[:, 0]),
            stopped=torch.zeros_like(sequences[:, 0], dtype=torch.bool),
            history=[],
            confidences=(~canvas.masked).float(),
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=None if streamer is None else PrefixStreamer(streamer),
        )
        if streamer is not None:
            state.streamer.put(sequences, canvas.open_columns())
        for round_index in range(canvas.order.shape[1]):
            rows = ((canvas.order[:, round_index] >= 0) & ~state.stopped).nonzero().squeeze(-1)
            if len(rows) == 0:
                break
            self._fill_blocks(state, rows, round_index)

        sequences = state.sequences()
        if streamer is not None:
            state.streamer.put(sequences, torch.zeros_like(sequences, dtype=torch.bool))  # a stopped row's rest
            streamer.end()
        if not config.return_dict_in_generate:
            return sequences
        return VMDGenerateOutput(
            sequences=sequences,
            num_forward_passes=state.num_forward_passes,
            latents=state.latents.squeeze(1) if state.latents is not None and state.reader is None else state.latents,
            history=tuple(state.history) if config.output_history else None,
            confidences=canvas.in_rows(state.confidences, 1.0) if config.output_confidences else None,
        )

    def _fill_blocks(self, state: GenerationState, rows: torch.Tensor, round_index: int) -> None:
        """Fills one block (or the whole sequence) of each of `rows`."""
        config, canvas = state.config, state.canvas
        block = canvas.order[rows, round_index]
        columns = canvas.columns(block, 1)
        tokens, masked = canvas.tokens[rows[:, None], columns], canvas.masked[rows[:, None], columns]
        fillable = masked
        probability = torch.zeros(masked.shape, device=masked.device)  # of the revealed tokens
        num_maskable = masked.sum(-1)
        row_steps = num_maskable if config.num_steps is None else step_schedule(num_maskable, config.num_steps)
        if config.corrector is not None and config.num_steps is not None:
            row_steps = torch.full_like(num_maskable, config.num_steps)
        prior = None
        if self.model.latent_prior is not None and not state.given_latents:
            at_most = num_maskable
            if config.confidence_threshold is None:
                at_most = most_revealed(num_maskable, row_steps)
            if (at_most >= self.config.latent_min_tokens).any():
                prior = self._read_prior(state, rows, round_index)
        modulation = None
        step = 0
        while len(active := (masked.any(-1) & ~state.stopped[rows]).nonzero().squeeze(-1)):
            step += 1
            if state.latents is not None and (step == 1 or config.resample_latents):
                if not state.given_latents:
                    state.latents[rows[active], round_index] = self._draw_latents(rows[active], state, prior, active)
                modulation = self.model.condition(state.latents[rows, round_index, None])
            open_now, done_now = masked[active], fillable[active] & ~masked[active]
            before = num_revealed(step - 1, num_maskable, row_steps)[active]
            after = num_revealed(step, num_maskable, row_steps)[active]
            at_most = after - before if config.confidence_threshold is None else open_now.sum(-1)
            chosen, confidence, chosen_probability = self._predict(
                state,
                rows[active],
                round_index,
                tokens[active],
                masked[active],
                None if modulation is None else self.model.for_steps(modulation[active], at_most[:, None]),
                step == 1 and prior is None,
            )
            again = torch.zeros_like(open_now)
            if config.corrector is not None:
                sigma = corrector_probability(
                    done_now, probability[active], before, after, num_maskable[active], config
                )
                counts = [sigma.shape[1]] * len(active)
                uniform = draw(torch.rand, counts, (), state.generators(rows[active]), sigma.device)
                again = uniform.view_as(sigma) < sigma
            count = after - done_now.sum(-1) + again.sum(-1)
            if config.confidence_threshold is not None:
                count = count.maximum((confidence > config.confidence_threshold).sum(-1)).clamp(min=1)
            revealed = select_positions(confidence, open_now, count)
            tokens[active] = torch.where(revealed, chosen, tokens[active]).masked_fill(
                again, self.config.mask_token_id
            )
            masked = masked.index_copy(0, active, (open_now & ~revealed) | again)
            if chosen_probability is not None:
                probability[active] = torch.where(revealed, chosen_probability, probability[active])
                state.confidences[rows[:, None], columns] = torch.where(
                    fillable & ~masked, probability, (~fillable).float()
                )
            canvas.put(rows, block, tokens, masked)
            self._after_step(state, rows[active])
        self._after_blocks(state)

    def _after_step(self, state: GenerationState, active: torch.Tensor) -> None:
        """Counts, and shows the sequences to whoever wants them."""
        state.num_forward_passes[active] += 1
        if state.stopping_criteria is not None:
            state.stopped |= state.stopping_criteria(state.canvas.sequences(), None)
        if state.config.output_history or state.streamer is not None:
            sequences = state.sequences()
        if state.config.output_history:
            state.history.append(sequences)
        if state.streamer is not None:
            state.streamer.draft(sequences)
            if state.config.corrector is None:  # with one, nothing is final before its block is
                state.streamer.put(sequences, state.canvas.open_columns())

    def _after_blocks(self, state: GenerationState) -> None:
        """Rows with an end-of-sequence token are finished; what is final is streamed."""
        if (is_eos := new_eos_tokens(state.canvas.sequences(), state.config)) is not None:
            state.stopped |= is_eos.any(-1)
        if state.streamer is not None:
            state.streamer.put(state.sequences(), state.canvas.open_columns())

    def _predict(
        self,
        state: GenerationState,
        rows: torch.Tensor,
        round_index: int,
        tokens: torch.Tensor,
        masked: torch.Tensor,
        modulation: torch.Tensor | None,
        first_step: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """One forward pass over the blocks of `rows`, tokens and masked both (rows, width), under the modulation by
        their latents.

        Returns:
            Predicted tokens, their confidence under the remasking rule, and, if anybody asks, their probability, each
            (rows, width); at positions that are not masked the last two are -inf.
        """
        config, canvas = state.config, state.canvas
        block = canvas.order[rows, round_index]
        layout, context = canvas.window(rows, block), None
        if state.reader is not None:
            context = state.reader.context(rows, block, round_index, first_step)
        inputs = tokens
        if config.guidance_scale is not None:
            given = canvas.given[rows[:, None], canvas.columns(block, 1)]
            inputs = torch.cat([tokens, tokens.masked_fill(given, self.config.mask_token_id)])
            layout = layout.select(torch.arange(len(tokens), device=tokens.device).repeat(2))
            modulation = None if modulation is None else torch.cat([modulation, modulation])
        outputs = self.model(inputs, layout=layout, conditioning=modulation, context=context, return_dict=True)
        if state.reader is not None:
            state.reader.keep(rows, context, outputs.keys_values)
        hidden_states = outputs.last_hidden_state
        if config.guidance_scale is not None:
            guided, unguided = hidden_states.chunk(2)
            hidden_states = unguided + config.guidance_scale * (guided - unguided)

        places = masked.nonzero(as_tuple=True)
        logits = self.compute_logits(hidden_states[places]).float()  # (positions, vocabulary)
        if state.logits_processor is not None:
            logits = state.logits_processor(canvas.sequences()[rows[places[0]]], logits)
        counts = masked.sum(-1).tolist()
        if config.do_sample:
            # The largest of probabilities over independent exponentials falls on a token with its probability.
            race = draw(exponential, counts, (logits.shape[-1],), state.generators(rows), logits.device)
            chosen = (warp(logits, config).softmax(-1) / race).argmax(-1)
        else:
            chosen = logits.argmax(-1)
        if config.remasking == "random":
            confident = draw(torch.rand, counts, (), state.generators(rows), logits.device)
        else:
            confident = confidence_of(logits, chosen, config.remasking)
        nowhere = torch.full(tokens.shape, -torch.inf, device=logits.device)
        probability = None
        if config.corrector == "confidence" or config.output_confidences:
            probability = nowhere.index_put(places, confidence_of(logits, chosen, "top_prob"))
        return tokens.index_put(places, chosen), nowhere.index_put(places, confident), probability

    def _round_latents(self, latents: torch.Tensor | None, canvas: Canvas) -> torch.Tensor | None:
        """(batch, rounds, latent_size): the given ones, or room for those to be drawn."""
        if self.config.latent_size == 0:
            return None
        batch, rounds = canvas.order.shape
        size = self.config.latent_size
        if self.config.block_size is None:
            rounds = 1
        if latents is None:
            return torch.zeros(batch, rounds, size, device=self.device)
        if self.config.block_size is None:
            return latents.clone()[:, None]
        if latents.shape != (batch, rounds, size):
            raise ValueError(
                "latents must have shape (batch, generated blocks, latent_size) = "
                f"{(batch, rounds, size)}, got {tuple(latents.shape)}"
            )
        return latents.clone()

    def _read_prior(
        self, state: GenerationState, rows: torch.Tensor, round_index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A pass over the clean tokens before the blocks of `rows`: mean and log-variance of p(z | these tokens), each
        (rows, latent_size)."""
        canvas, block = state.canvas, state.canvas.order[rows, round_index]
        context = state.reader.context(rows, block, round_index, True)
        before = torch.zeros(len(rows), self.config.hidden_size, device=self.device, dtype=self.dtype)
        if context.input_ids is not None:
            width = canvas.layout.width
            first = context.new.block[:, :1]
            new = Layout(
                num_blocks=context.input_ids.shape[1] // width,
                width=width,
                position_ids=context.position_ids,
                real=None,
                document=context.new.document,
                first_block=first,
            )
            hidden_states, read = self.model.read(context.input_ids, new, context.without_new())
            state.reader.keep(rows, context, read.keys_values)
            last = (block - first[: len(rows), 0]) * width - 1  # -1: nothing before the block
            state.num_forward_passes[rows[last >= 0]] += 1
            before = hidden_states[torch.arange(len(rows)), last] * (last >= 0)[:, None]
        return self.model.latent_prior(before)

    def _draw_latents(self, rows, state: GenerationState, prior=None, active=None) -> torch.Tensor:
        sizes = [1] * len(rows), (self.config.latent_size,)
        noise = state.config.latent_scale * draw(torch.randn, *sizes, state.generators(rows), self.device)
        if prior is None:
            return noise
        mean, log_variance = prior
        return mean[active] + (0.5 * log_variance[active]).exp() * noise

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
        if len(input_ids) == 0 or not (input_ids.shape[1] or config.max_new_tokens):
            raise ValueError(
                "input_ids must have at least one row, and one column unless max_new_tokens is given, got shape "
                f"{tuple(input_ids.shape)}"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        check_generators(generator, len(input_ids))
        if latents is None:
            return
        shape = (len(input_ids), self.config.latent_size)
        if self.config.latent_size == 0:
            raise ValueError("latents must be None for a model with latent_size = 0")
        if self.config.block_size is None and latents.shape != shape:
            raise ValueError(f"latents must have shape (batch, latent_size) = {shape}, got {tuple(latents.shape)}")
        if config.resample_latents:
            raise ValueError("latents must be None with resample_latents=True, which draws them at every step")


__all__ = ["VMDGenerateOutput", "VMDGenerationConfig", "VMDGenerationMixin"]
