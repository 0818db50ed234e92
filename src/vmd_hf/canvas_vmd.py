"""The canvas of `generate`: the sequences at work, the order of their blocks, what blocks see of the ones before, and
who is shown what is final."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from transformers.generation import EosTokenCriteria

from .blocks_vmd import EMPTY, CleanContext, Layout, TokenIndex, join_token_indices, stack_token_indices
from .generation_configuration_vmd import VMDGenerationConfig
from .schedule_vmd import num_revealed, step_schedule


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
    new = input_ids.new_full((input_ids.shape[0], max_new_tokens), mask_token_id)
    return (
        torch.cat([input_ids.gather(-1, padding_first), new], dim=-1),
        torch.cat([attention_mask.gather(-1, padding_first), torch.ones_like(new)], dim=-1),
    )


def check_length(lengths: torch.Tensor, model_config) -> None:
    longest = int(lengths.max())
    if longest > model_config.max_position_embeddings:
        raise ValueError(
            "input_ids and max_new_tokens must make at most max_position_embeddings = "
            f"{model_config.max_position_embeddings} tokens, the length that the model was made for, got {longest}"
        )


class EndOfText:
    """Where texts end: at the first end-of-sequence token among the last `max_new_tokens`."""

    def __init__(self, config: VMDGenerationConfig, device: torch.device):
        tokens = torch.tensor(config.eos_token_id, device=device).view(-1)
        self.criteria = EosTokenCriteria(tokens)
        self.num_new = config.max_new_tokens
        self.padding = tokens[0] if config.pad_token_id is None else config.pad_token_id

    def ends(self, sequences: torch.Tensor) -> torch.Tensor:
        """(batch, max_new_tokens) bool."""
        new = sequences[:, -self.num_new :]
        return self.criteria(new.reshape(-1, 1), None).view_as(new)

    def pad_after(self, sequences: torch.Tensor) -> torch.Tensor:
        """Sequences with everything after their end padded."""
        is_end = self.ends(sequences)
        after = (is_end.cumsum(-1) - is_end.long()) > 0
        padded = torch.where(after, self.padding, sequences[:, -self.num_new :])
        return torch.cat([sequences[:, : -self.num_new], padded], dim=-1)


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


class Rounds(NamedTuple):
    """Which block (or whole sequence) each row fills in each round, as the masks say that are there at the start.

    Attributes:
        block: (batch, rounds) int64; where a row has none left, its last one again.
        num_masked: (batch, rounds) int64, n, masks of that block; 0 where the row has none left.
        num_steps: (batch, rounds) int64, T_n, steps in which they are filled.
    """

    block: torch.Tensor
    num_masked: torch.Tensor
    num_steps: torch.Tensor

    @classmethod
    def plan(cls, num_masked: torch.Tensor, config: VMDGenerationConfig) -> "Rounds":
        """From the number of masks in each block, (batch, N)."""
        has_masks = num_masked > 0
        block = has_masks.long().argsort(dim=-1, descending=True, stable=True)[:, : int(has_masks.sum(-1).max())]
        num_masked = num_masked.gather(-1, block)
        block = block.masked_fill(num_masked == 0, 0).cummax(-1).values
        num_steps = num_masked if config.num_steps is None else step_schedule(num_masked, config.num_steps)
        if config.corrector is not None and config.num_steps is not None:
            num_steps = torch.full_like(num_masked, config.num_steps)
        return cls(block, num_masked, num_steps)

    def most_masked(self, index: int, config: VMDGenerationConfig) -> list[int]:
        """Before each step of a round, the most masks that a row can have left."""
        num_masked, num_steps = self.num_masked[:, index], self.num_steps[:, index]
        steps = torch.arange(int(num_steps.max()))[:, None]
        most = num_masked - num_revealed(steps, num_masked, num_steps)
        if config.corrector is not None:  # no more are masked again in a step than were revealed before it
            most = most.maximum(num_revealed(steps - 1, num_masked, num_steps))
        return most.amax(-1).tolist()

    def most_revealed(self, index: int) -> list[int]:
        """By each step of a round, the most tokens that the schedule reveals in a row."""
        num_masked, num_steps = self.num_masked[:, index], self.num_steps[:, index]
        steps = torch.arange(int(num_steps.max()) + 1)[:, None]
        return num_revealed(steps, num_masked, num_steps).diff(dim=0).amax(-1).tolist()


@dataclass
class Canvas:
    """The sequences at work, on the model's grid (for whole sequences, the rows themselves as one block each).

    Attributes:
        tokens: (batch, N * width) int64.
        masked: (batch, N * width) bool, positions still to be filled.
        given: (batch, N * width) bool, tokens that were there from the start.
        layout: Of the grid.
        padding: (batch, length), the rows as they were given, for what stands on padding.
        real: (batch, length) bool, what does not.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    given: torch.Tensor
    layout: Layout
    padding: torch.Tensor
    real: torch.Tensor

    @classmethod
    def create(cls, sequences, real, layout: Layout, mask_token_id: int) -> "Canvas":
        on_grid = layout.scatter(real, False)
        tokens = layout.scatter(sequences, 0)
        masked = on_grid & (tokens == mask_token_id)
        return cls(tokens, masked, on_grid & ~masked, layout, sequences, real)

    def num_masked(self) -> torch.Tensor:
        """(batch, N) int64, of each block."""
        return self.masked.unflatten(1, (self.layout.num_blocks, self.layout.width)).sum(-1)

    def sequences(self) -> torch.Tensor:
        """(batch, length) in the rows' own columns, a copy."""
        return self.in_rows(self.tokens, self.padding)

    def in_rows(self, grid: torch.Tensor, padding: torch.Tensor | float) -> torch.Tensor:
        """(batch, N * width) values on the grid to (batch, length) in the rows' own columns."""
        return torch.where(self.real, self.layout.gather(grid), padding)

    def open_columns(self) -> torch.Tensor:
        """(batch, length) bool in the rows' own columns, still masked."""
        return self.real & self.layout.gather(self.masked)

    def own_columns(self) -> torch.Tensor:
        """(batch, N * width) int64: the column in the row of each column of the grid."""
        columns = torch.arange(self.real.shape[1], device=self.tokens.device)
        return self.layout.scatter(columns.expand_as(self.real), 0)

    def columns(self, first_block: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """(batch, num_blocks * width): the columns of `num_blocks` blocks from each row's `first_block` (batch,) on,
        the last ones of the grid again where there are no more."""
        width = self.layout.width
        columns = first_block[:, None] * width + torch.arange(num_blocks * width, device=first_block.device)
        return columns.clamp(max=self.tokens.shape[1] - 1)

    def window(self, block: torch.Tensor) -> Layout:
        """Layout of one block (batch,) of each row."""
        layout = self.layout
        if layout.document is None:
            return layout
        columns = self.columns(block, 1)
        return Layout(
            num_blocks=1,
            width=layout.width,
            position_ids=layout.position_ids.gather(-1, columns),
            real=None if layout.real is None else layout.real.gather(-1, columns),
            document=layout.document.expand_as(self.tokens).gather(-1, columns),
            first_block=block[:, None],
            causal=layout.causal,
        )

    def clean_blocks(self, first: torch.Tensor, stop: torch.Tensor, num_blocks: int, without_given: bool):
        """Tokens, positions and places of each row's blocks `first` to `stop` (batch,), `num_blocks` at most.
        `without_given` hides the given tokens from all others."""
        columns = self.columns(first, num_blocks)
        of_row = first[:, None] * self.layout.width + torch.arange(columns.shape[1], device=columns.device)
        hidden = of_row >= stop[:, None] * self.layout.width
        if without_given:
            hidden = hidden | self.given.gather(-1, columns)
        document = self.layout.document.expand_as(self.tokens).gather(-1, columns).masked_fill(hidden, EMPTY)
        places = TokenIndex(self.layout.begin(of_row, clean=True), document, torch.ones_like(hidden))
        return self.tokens.gather(-1, columns), self.layout.position_ids.gather(-1, columns), places

    def put(self, columns: torch.Tensor, tokens: torch.Tensor, masked: torch.Tensor) -> None:
        self.tokens = self.tokens.scatter(-1, columns, tokens)
        self.masked = self.masked.scatter(-1, columns, masked)


class ContextReader:
    """What blocks at work see of the clean blocks before them: read once, with keys and values kept, or, without a
    cache, read again in every pass. With guidance, rows from the batch's size on are those without the prompt.

    Attributes:
        context: For the next pass: the tokens whose keys and values are kept, and those that are to be read now.
    """

    def __init__(self, canvas: Canvas, rounds: Rounds, config: VMDGenerationConfig):
        self.canvas = canvas
        self.config = config
        self.read: TokenIndex | None = None
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # (rows, heads, columns, head_dim)
        stop = rounds.block
        self.first = torch.zeros_like(stop)
        if config.use_cache:
            self.first = torch.cat([self.first[:, :1], stop], dim=-1)[:, :-1]
        self.num_blocks = (stop - self.first).amax(0).tolist()  # to be read in each round
        in_step = bool((stop == stop[:1]).all()) and canvas.layout.real is None
        self.sees_all = in_step and config.guidance_scale is None and config.cache_implementation == "dynamic"
        self.context = self._held()

    def start(self, index: int, block: torch.Tensor) -> None:
        """Begins a round, in which `block` (batch,) are filled."""
        self.context = self._held()
        num_blocks = self.num_blocks[index]
        if num_blocks == 0:
            return
        first = self.first[:, index].to(block.device)
        parts = [self.canvas.clean_blocks(first, block, num_blocks, without_given=False)]
        if self.config.guidance_scale is not None:
            parts.append(self.canvas.clean_blocks(first, block, num_blocks, without_given=True))
        tokens, positions, places = zip(*parts, strict=True)
        self.context.input_ids, self.context.position_ids = torch.cat(tokens), torch.cat(positions)
        self.context.new = stack_token_indices(places)

    def keep(self, read) -> None:
        """Keeps what a pass has read: its output, or the [`CleanContext`] made of it."""
        if not self.config.use_cache or self.context.input_ids is None:
            return
        start, new = 0 if self.read is None else self.read.block.shape[1], self.context.new
        if self.buffers is None:
            self.buffers = [tuple(self._buffer(part) for part in pair) for pair in read.keys_values]
        for buffers, pair in zip(self.buffers, read.keys_values, strict=True):
            for buffer, part in zip(buffers, pair, strict=True):
                buffer[:, :, start : start + part.shape[2]] = part
        self.read = new if self.read is None else join_token_indices([self.read, new])
        self.context = self._held()
        self.context.before = read.before

    def _columns(self) -> int:
        """Clean tokens that are read in all rounds."""
        return sum(self.num_blocks) * self.canvas.layout.width

    def _buffer(self, part: torch.Tensor) -> torch.Tensor:
        """For keys or values (rows, heads, new, head_dim) of all rounds, and behind them those of a pass's own. Zeros,
        since what is masked must be finite."""
        own = 1 + max(self.num_blocks) * (self.config.cache_implementation == "static")
        columns = self._columns() + own * self.canvas.layout.width
        return part.new_zeros(*part.shape[:2], columns, part.shape[3])

    def _held(self) -> CleanContext:
        context = CleanContext(sees_all=self.sees_all)
        if self.read is not None:
            length = self.read.block.shape[1]
            columns = self._columns() if self.config.cache_implementation == "static" else length
            empty = columns - length
            context.read = TokenIndex(
                pad(self.read.block, (0, empty)),
                pad(self.read.document, (0, empty), value=EMPTY),
                pad(self.read.clean, (0, empty), value=True),
            )
            context.keys_values = [tuple(buffer[:, :, :columns] for buffer in pair) for pair in self.buffers]
            context.room = self.buffers
        return context


__all__ = ["Canvas", "ContextReader", "EndOfText", "PrefixStreamer", "Rounds", "check_length", "prepare_canvas"]
