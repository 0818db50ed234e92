"""What a model did: one call of `generate` as a `Trace`, and a trace after some step as cells."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from ..configuration_vmd import VMDConfig
from ..hub import default_device, load_tokenizer
from ..modeling_vmd import VMDForMaskedDiffusion
from .verdicts import counted

TokenChoice = Literal["auto", "argmax", "sampled"]
LatentChoice = Literal["per_sample", "same", "per_step"]


class ShownModel(NamedTuple):
    """A model with its tokenizer and the name that the demo shows."""

    name: str
    model: VMDForMaskedDiffusion
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, model: str | os.PathLike, device: str | torch.device | None = None) -> "ShownModel":
        """From a folder or an id on the Hub, to `device`; default: the accelerator where there is one, else the CPU.

        Raises:
            OSError: if there is no such model.
            ValueError: if it has no tokenizer, or is none of this package.
        """
        loaded = AutoModelForMaskedLM.from_pretrained(model).eval()
        if not isinstance(loaded, VMDForMaskedDiffusion):
            raise ValueError(f"model must be a VMDForMaskedDiffusion, got {model}, a {type(loaded).__name__}")
        return cls(Path(model).name, loaded.to(device or default_device()), load_tokenizer(model))

    @property
    def has_latent(self) -> bool:
        return self.model.config.latent_size > 0

    @property
    def about(self) -> str:
        """A few words on it."""
        config = self.model.config
        kind = f"VMD, z of {counted(config.latent_size, 'number')}" if self.has_latent else "MDM, no z"
        if config.num_states:
            kind = f"VMD, z is a chain of {counted(config.num_states, 'state')}"
        return kind if config.block_size is None else f"{kind}, blocks of {config.block_size}"


@dataclass(frozen=True)
class Settings:
    """How to fill.

    Attributes:
        num_steps, remasking: As in [`VMDGenerationConfig`].
        tokens: `"argmax"`, `"sampled"`, or `"auto"`: argmax where a latent carries the randomness, sampled by a model
            without one.
        latents: `"per_sample"`: one z for each row, shared by its steps; `"same"`: the same z for all rows;
            `"per_step"`: one for each row and step. (The states of a chain that are shared were drawn in as many
            steps as now, with other tokens.)
        latent_seed, token_seed: Row i draws z by `latent_seed + i` and everything else by `token_seed + i`.
        num_rows: Samples, at least 1.
    """

    num_steps: int = 1
    remasking: str = "top_prob"
    tokens: TokenChoice = "auto"
    latents: LatentChoice = "per_sample"
    latent_seed: int = 0
    token_seed: int = 0
    num_rows: int = 1

    def __post_init__(self):
        for name, least in (("latent_seed", 0), ("token_seed", 0), ("num_rows", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


class Trace(NamedTuple):
    """What one model did, in plain lists of shape (rows, tokens) unless it says otherwise.

    Attributes:
        name: Of the model.
        about: A few words on it.
        tokens: The text of each token at the end.
        revealed_at: The step that revealed it, from 1; 0: it was given.
        confidences: The probability that it had then; 1 where it was given.
        changed: Whether it differs from what the previous trace has there.
        latents: (rows,) what to say about z; nothing for a model without one.
        num_steps: Forward passes of the longest row.
        states: Of a chain, that each token was drawn from, -1 where it was given; `None` for other models.
    """

    name: str
    about: str
    tokens: list[list[str]]
    revealed_at: list[list[int]]
    confidences: list[list[float]]
    changed: list[list[bool]]
    latents: list[str]
    num_steps: int
    states: list[list[int]] | None = None


class Cell(NamedTuple):
    """One token as it is shown after some step: empty text while it is masked. `state`: -1 without a chain."""

    text: str
    given: bool
    confidence: float
    new: bool
    changed: bool
    state: int = -1


def latents_for(model: VMDForMaskedDiffusion, input_ids: torch.Tensor, settings: Settings) -> torch.Tensor | None:
    """What to pass to `generate` as `latents` for rows of the same `input_ids` (tokens,). A Gaussian z is drawn on the
    CPU, so that a seed gives the same on every device.

    Returns:
        (rows, latent_size), with blocks (rows, blocks with a gap, latent_size), of a chain (rows, tokens) and (rows,
        blocks with a gap, block_size) states; `None` where `generate` is to draw them, or the model has none.

    Raises:
        ValueError: for the same z in all rows of a learned prior, which only `generate` can draw from.
    """
    config = model.config
    learned = config.prior == "learned"
    if settings.latents == "same" and learned:
        raise ValueError("z can be the same in all samples only with prior='standard', got prior='learned'")
    if config.latent_size == 0 or settings.latents == "per_step" or learned:
        return None
    seeds = [settings.latent_seed + row * (settings.latents != "same") for row in range(settings.num_rows)]
    if config.num_states:
        drawn = model.generate(
            input_ids.repeat(settings.num_rows, 1).to(model.device),
            num_steps=settings.num_steps,
            remasking=settings.remasking,
            do_sample=True,
            generator=[_seeded(seed, model.device) for seed in seeds],
            return_dict_in_generate=True,
        )
        return drawn.latents
    shape = (config.latent_size,)
    if config.block_size is not None:
        shape = (len(blocks_with_gaps(input_ids, config)), config.latent_size)
    return torch.stack([torch.randn(shape, generator=_seeded(seed)) for seed in seeds])


def blocks_with_gaps(input_ids: torch.Tensor, config: VMDConfig) -> torch.Tensor:
    """The numbers of the blocks of (tokens,) with a masked token, int64 in ascending order."""
    gaps = (input_ids == config.mask_token_id).nonzero().flatten()
    return (gaps // config.block_size).unique()


def states_of(latents: torch.Tensor, input_ids: torch.Tensor, config: VMDConfig) -> torch.Tensor:
    """Where the states that `generate` returns belong: (rows, tokens) int64, -1 where `input_ids` (tokens,) are given.
    Those of blocks are given for the blocks with gaps."""
    if config.block_size is not None:
        blocks = blocks_with_gaps(input_ids, config)
        columns = (blocks[:, None] * config.block_size + torch.arange(config.block_size)).flatten()
        inside = columns < len(input_ids)
        latents = latents.flatten(1)[:, inside]
        latents = latents.new_full((len(latents), len(input_ids)), -1).index_copy(1, columns[inside], latents)
    return latents.masked_fill(input_ids != config.mask_token_id, -1)


def run_model(shown: ShownModel, input_ids: torch.Tensor, settings: Settings, previous: Trace | None = None) -> Trace:
    """Fills `num_rows` copies of `input_ids` (tokens,) and notes what happened; special tokens that were given, which
    nobody typed, are left out.

    Raises:
        ValueError: as `generate` does, and `latents_for`.
    """
    model, tokenizer = shown.model, shown.tokenizer
    rows = range(settings.num_rows)
    latents = latents_for(model, input_ids, settings)
    seeds = [settings.token_seed + row for row in rows]
    extra: dict[str, Any] = {}
    if shown.has_latent:
        if model.config.gaussian_size:
            extra = {"resample_latents": settings.latents == "per_step"}
        if latents is None:  # z comes from the same generators
            seeds = [seed + 1_000_003 * settings.latent_seed for seed in seeds]
        else:
            extra["latents"] = latents.to(model.device)
    batch = input_ids.repeat(settings.num_rows, 1)
    output = model.generate(
        batch.to(model.device),
        num_steps=settings.num_steps,
        remasking=settings.remasking,
        do_sample=settings.tokens == "sampled" or (settings.tokens == "auto" and not shown.has_latent),
        generator=[_seeded(seed, model.device) for seed in seeds],
        return_dict_in_generate=True,
        output_history=True,
        output_confidences=True,
        **extra,
    )
    history = torch.stack([batch, *(state.cpu() for state in output.history)])
    special = torch.tensor(tokenizer.all_special_ids)
    keep = (input_ids == tokenizer.mask_token_id) | ~torch.isin(input_ids, special)
    tokens = [[token_text(index, tokenizer) for index in row] for row in output.sequences.cpu()[:, keep].tolist()]
    revealed_at = steps_of(history, tokenizer.mask_token_id)[:, keep].tolist()
    states = None
    if model.config.num_states:
        states = states_of(output.latents.cpu(), input_ids, model.config)[:, keep].tolist()
    return Trace(
        name=shown.name,
        about=shown.about,
        tokens=tokens,
        revealed_at=revealed_at,
        confidences=output.confidences.cpu()[:, keep].tolist(),
        changed=changes(tokens, revealed_at, previous),
        latents=[_about_latent(shown, latents, settings, row) for row in rows],
        num_steps=int(output.num_forward_passes.max()),
        states=states,
    )


def steps_of(history: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """The step that revealed each token, 0 for those given: (steps + 1, rows, tokens) states, the first before any
    step, to (rows, tokens) int64. (A token is revealed after as many states as had a mask there.)"""
    return (history == mask_token_id).sum(0)


def changes(tokens: list[list[str]], revealed_at: list[list[int]], previous: Trace | None) -> list[list[bool]]:
    """Which filled tokens differ from those of the previous trace: lists of shape (rows, tokens). Nothing has changed
    if that trace filled other gaps, or another number of rows."""
    gaps = _gaps(revealed_at)
    if previous is None or _gaps(previous.revealed_at) != gaps:
        return [[False] * len(row) for row in tokens]
    return [
        [gap and one != other for one, other, gap in zip(*rows, strict=True)]
        for rows in zip(tokens, previous.tokens, gaps, strict=True)
    ]


def token_text(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token as one can see it: white space as a sign, special tokens by name."""
    if token in tokenizer.all_special_ids:
        return tokenizer.convert_ids_to_tokens(token)
    text = tokenizer.decode([token]) or tokenizer.convert_ids_to_tokens(token)
    return text.replace("\n", "⏎") if text.strip() else text.replace(" ", "␣").replace("\n", "⏎")


def cells_after(trace: Trace, step: int) -> list[list[Cell]]:
    """The cells of each row after `step` steps, 0 to `num_steps`; what has changed since the previous trace is marked
    after the last one."""
    states = trace.states or [[-1] * len(row) for row in trace.tokens]
    return [
        [
            Cell(
                text="" if when > step else text,
                given=when == 0,
                confidence=confidence,
                new=when == step > 0,
                changed=changed and step >= trace.num_steps,
                state=state,
            )
            for text, when, confidence, changed, state in zip(*row, strict=True)
        ]
        for row in zip(trace.tokens, trace.revealed_at, trace.confidences, trace.changed, states, strict=True)
    ]


def _about_latent(shown: ShownModel, latents: torch.Tensor | None, settings: Settings, row: int) -> str:
    if not shown.has_latent:
        return ""
    if settings.latents == "per_step":
        return "a z per step"
    if latents is not None and latents.is_floating_point() and latents[row].numel() <= 2:
        return f"z = {', '.join(f'{value:.2f}' for value in latents[row].flatten().tolist())}"
    return f"z no. {settings.latent_seed + (0 if settings.latents == 'same' else row)}"


def _gaps(revealed_at: list[list[int]]) -> list[list[bool]]:
    return [[when > 0 for when in row] for row in revealed_at]


def _seeded(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
