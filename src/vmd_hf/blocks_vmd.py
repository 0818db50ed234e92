"""Blocks: how rows are laid out in them, and which token may attend to which (block diffusion, BD3-LM, arXiv
2503.09573).

A model with blocks works on a grid: every row starts at column 0, every document of a packed row at the start of a
block, and what is missing to a whole block is padding. So left, right and no padding are the same thing, block n is
always the columns n * block_size to (n + 1) * block_size, and a latent belongs to one of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers.utils.generic import is_flash_attention_requested

PADDING, EMPTY = -1, -2  # documents of padding, and of key columns that hold nothing
# Columns that a chunk of attention has at least, and chunks that a row has at most: more save little more time, and
# take more memory, since every chunk keeps its keys for the gradient.
CHUNK_SIZE, NUM_CHUNKS = 64, 4
LARGEST_CHUNK_OF_PROMPTS = 1024  # which are read without a gradient


@dataclass
class TokenIndex:
    """Where tokens stand, as attention sees it. Each (batch, length), or (1, length) if all rows agree.

    Attributes:
        block: int64, the column, counted through the row, at which the token's block begins. A clean token that may
            not see what follows it in its block is a block of its own.
        document: int64, the text that the token belongs to; `PADDING` or `EMPTY` for none.
        clean: bool, whether the token is read as clean context, or is part of a block that is being denoised.
    """

    block: torch.Tensor
    document: torch.Tensor
    clean: torch.Tensor

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.block, self.document, self.clean

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "TokenIndex":
        return TokenIndex(*map(function, self.parts()))


def stack_token_indices(parts: list[TokenIndex], dim: int = 0) -> TokenIndex:
    """TokenIndex of batches that are concatenated along a dimension."""
    return TokenIndex(*(torch.cat(same, dim) for same in zip(*(part.parts() for part in parts), strict=True)))


def join_token_indices(parts: list[TokenIndex]) -> TokenIndex:
    """TokenIndex of sequences that are concatenated along their length."""
    batch = max(part.document.shape[0] for part in parts)
    return stack_token_indices([part.map(lambda value: value.expand(batch, -1)) for part in parts], dim=-1)


def may_attend(query: TokenIndex, key: TokenIndex) -> torch.Tensor:
    """The attention pattern of block diffusion, elementwise over broadcastable places.

    A token sees the clean tokens of earlier blocks of its document, and its own block in its own stream: a clean token
    the clean ones, a noisy token the noisy ones.
    """
    earlier = key.clean & (key.block < query.block)
    own = (key.block == query.block) & (key.clean == query.clean)
    return (key.document == query.document) & (earlier | own)


def block_attention_mask(config, query: TokenIndex, key: TokenIndex, dtype: torch.dtype):
    """`may_attend` in the form that the config's attention implementation takes.

    Raises:
        ValueError: for FlashAttention, which knows no such pattern.
    """
    if is_flash_attention_requested(config):
        raise ValueError(
            "attn_implementation must be 'eager', 'sdpa' or 'flex_attention' with block_size, got "
            f"{config._attn_implementation!r}, which cannot express which block sees which"
        )
    if config._attn_implementation == "flex_attention":
        batch = max(query.document.shape[0], key.document.shape[0])
        query, key = (part.map(lambda value: value.expand(batch, -1).contiguous()) for part in (query, key))

        def mask_mod(b, h, q, k):
            row = b if batch > 1 else 0  # which may be of a larger batch, whose rows agree
            return may_attend(query.map(lambda value: value[row, q]), key.map(lambda value: value[row, k]))

        lengths = query.block.shape[-1], key.block.shape[-1]
        return create_block_mask(mask_mod, batch, None, *lengths, device=str(query.block.device), _compile=True)
    allowed = may_attend(query.map(lambda v: v[:, None, :, None]), key.map(lambda v: v[:, None, None, :]))
    if config._attn_implementation == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


@dataclass
class Layout:
    """Rows as the model works on them: as they are, or, with blocks, on the grid.

    Attributes:
        num_blocks: N, blocks of each row; 1 for whole sequences.
        width: Tokens of a block (for whole sequences the length), so that the grid is (batch, N * width).
        position_ids: (batch, N * width), positions in each row's own text.
        real: (batch, N * width) bool, False for padding; `None` where nothing is padding.
        document: (batch or 1, N * width), see [`TokenIndex`]; `None` for whole sequences, one document a row.
        columns: (batch, length), the column on the grid of each column of the row, N * width for padding; `None` where
            the grid is the row itself.
        first_block: Number of the grid's first block, (batch, 1) where it is not the row's first.
        causal: Whether clean tokens see nothing on their right, in their own block either.
    """

    num_blocks: int
    width: int
    position_ids: torch.Tensor
    real: torch.Tensor | None
    document: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    first_block: torch.Tensor | int = 0
    causal: bool = False

    def scatter(self, values: torch.Tensor, fill: int | bool | float) -> torch.Tensor:
        """(batch, length) values of the rows on the grid, `fill` where it has padding of its own."""
        if self.columns is None:
            return values
        grid = values.new_full((values.shape[0], self.num_blocks * self.width + 1), fill)
        return grid.scatter_(-1, self.columns, values)[:, :-1]

    def gather(self, grid: torch.Tensor) -> torch.Tensor:
        """Values on the grid, (batch, N * width) or with further dimensions, for each column of the rows. What padding
        gets is arbitrary."""
        if self.columns is None:
            return grid
        columns = self.columns.clamp(max=self.num_blocks * self.width - 1)
        columns = columns.view(*columns.shape, *[1] * (grid.dim() - 2)).expand(*columns.shape, *grid.shape[2:])
        return grid.gather(1, columns)  # take_along_dim would fix the sizes of an exported model

    def select(self, rows: torch.Tensor) -> "Layout":
        """The layout on the grid of a batch that is made of these rows (int64, any number of times each)."""
        parts = (self.position_ids, self.real, self.document, self.first_block)
        position_ids, real, document, first_block = (
            part[rows] if isinstance(part, torch.Tensor) and part.shape[0] > 1 else part for part in parts
        )
        position_ids = position_ids.expand(rows.shape[0], -1)
        real = None if real is None else real.expand(rows.shape[0], -1)
        return Layout(self.num_blocks, self.width, position_ids, real, document, None, first_block, self.causal)

    def blocks(self, grid: torch.Tensor) -> torch.Tensor:
        """(batch, N * width, ...) on the grid to (batch, N, width, ...)."""
        return grid.unflatten(1, (self.num_blocks, self.width))

    def token_index(self, clean: bool) -> TokenIndex:
        columns = torch.arange(self.num_blocks * self.width, device=self.document.device)[None]
        return TokenIndex(
            block=self.begin(columns + self.first_block * self.width, clean),
            document=self.document,
            clean=torch.full_like(columns, clean, dtype=torch.bool),
        )

    def begin(self, columns: torch.Tensor, clean: bool) -> torch.Tensor:
        """Where the blocks of tokens begin (see [`TokenIndex`]) that stand at these columns of the row."""
        return columns if clean and self.causal else columns // self.width * self.width


def row_positions(real: torch.Tensor) -> torch.Tensor:
    """Position of each token in its own row, padding (`real` False) left out: (batch, length), 0 at padding."""
    return (real.long().cumsum(-1) - 1).clamp(min=0)


def documents_of(position_ids: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """(batch, length) int64: which document of its row a token belongs to. A position that is no larger than that of
    the real token before it starts a new one. What padding gets is arbitrary."""
    columns = torch.arange(position_ids.shape[1], device=position_ids.device)
    last = columns.expand_as(position_ids) if real is None else torch.where(real, columns, -1)
    last = nn.functional.pad(last.cummax(-1).values[:, :-1], (1, 0), value=-1)  # the last real column before each
    before = torch.where(last >= 0, position_ids.gather(-1, last.clamp(min=0)), -1)
    starts = position_ids <= before
    return (starts if real is None else starts & real).long().cumsum(-1)


def lay_out_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> Layout:
    """Whole sequences as they are. Arguments as in [`lay_out_blocks`]."""
    real = None if attention_mask is None else attention_mask != 0
    document = None
    if position_ids is not None:
        document = documents_of(position_ids, real)
        if document.device.type == "cpu" and not torch.compiler.is_compiling() and not document.any():
            document = None  # one document a row, which attention need not be told (elsewhere asking would wait)
    elif real is not None:
        position_ids = row_positions(real)
    else:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return Layout(1, input_ids.shape[1], position_ids, real, document)


def lay_out_blocks(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, block_size: int
) -> Layout:
    """The grid of a batch of rows.

    Args:
        input_ids: (batch, length), for its shape.
        attention_mask: (batch, length), 0 for padding on either side, or `None`.
        position_ids: (batch, length), where a position that is no larger than the one before it starts a new
            document (a packed row); `None`: counted in each row without its padding.
    """
    (batch, length), device = input_ids.shape, input_ids.device
    columns = torch.arange(length, device=device)
    num_blocks = -(-length // block_size)
    if position_ids is None and attention_mask is None:
        missing = num_blocks * block_size - length
        positions = torch.arange(num_blocks * block_size, device=device)
        document = torch.where(positions < length, 0, PADDING)[None]
        layout = Layout(num_blocks, block_size, positions.expand(batch, -1), None, document)
        if missing:
            layout.columns = columns.expand(batch, -1)
            layout.real = (document >= 0).expand(batch, -1)
            layout.position_ids = positions.where(positions < length, 0).expand(batch, -1)
        return layout

    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    if position_ids is None:
        positions = row_positions(real)
        document = torch.zeros_like(positions)
        columns = positions
    else:
        positions = position_ids
        document = documents_of(positions, real)
        block_in_document = positions // block_size
        key = (document << 32) + block_in_document  # grows along the row's real tokens
        last = torch.where(real, key, -1).cummax(-1).values
        last = nn.functional.pad(last[:, :-1], (1, 0), value=-1)
        new_block = real & (key > last)
        block = new_block.long().cumsum(-1) - 1
        num_blocks = max(int(block.max()) + 1, 1)
        columns = block.clamp(min=0) * block_size + positions % block_size
    layout = Layout(num_blocks, block_size, positions, None, document)
    layout.columns = columns.masked_fill(~real, num_blocks * block_size)
    layout.real = layout.scatter(real, False)
    layout.document = layout.scatter(document, PADDING)
    layout.position_ids = layout.scatter(positions, 0)
    return layout


@dataclass
class AttentionChunks:
    """The attention pattern of whole grids in chunks of consecutive columns. Queries and keys are one or more such
    grids, one after the other.

    Attributes:
        sizes: Columns of each chunk of a grid.
        keys: For each chunk of the queries, the chunks of the keys that it reads.
        masks: For each chunk of the queries, (batch or 1, 1, queries, keys): bool, or 0 and -inf to add to the
            scores.
    """

    sizes: list[int]
    keys: list[list[int]]
    masks: list[torch.Tensor]

    @classmethod
    def plan(
        cls, config, layout: Layout, clean: bool, query: TokenIndex, key: TokenIndex, dtype: torch.dtype
    ) -> "AttentionChunks | None":
        """`None` where one mask over everything is no slower: for short rows, and on other devices than a CPU.

        Args:
            layout: Of every grid.
            clean: Whether the last grid is one of clean tokens, as all others are.
            query, key: Of whole grids; those of the queries are the last ones of the keys.
        """
        # Under a compiler or exporter, lengths may be symbols.
        if config._attn_implementation != "sdpa" or query.block.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        if isinstance(layout.first_block, torch.Tensor):
            return cls.of_prompts(config, query, dtype) if key is query else None  # or what was read is not the grid
        length = layout.num_blocks * layout.width
        size = -(-max(CHUNK_SIZE, length // NUM_CHUNKS) // layout.width) * layout.width
        num_keys, rest = divmod(key.block.shape[-1], length)
        if length < 2 * size or rest:
            return None
        plan = cls([min(size, length - start) for start in range(0, length, size)], [], [])
        queries, keys = (
            [TokenIndex(*parts) for parts in zip(*(plan.split(part, -1) for part in index.parts()), strict=True)]
            for index in (query, key)
        )
        num_chunks = len(plan.sizes)
        noisy = None if clean else num_keys - 1  # the number of that grid
        # Rows that are one document all see the same of their own columns, and all of the earlier ones.
        one_document = key.document.shape[0] == 1 and bool((key.document == key.document[:, :1]).all())
        largest: dict[tuple[int, int], torch.Tensor] = {}
        for number, chunk in reversed(list(enumerate(queries, start=len(keys) - len(queries)))):
            grid, column = divmod(number, num_chunks)
            grids = [other for other in range(num_keys) if other != noisy]
            seen = [other * num_chunks + column for other in grids] + [number] * (grid == noisy)
            seen += [other * num_chunks + i for other in grids for i in range(column)]
            held = join_token_indices([keys[index] for index in seen])
            kind = grid, chunk.block.shape[-1]
            mask = largest.get(kind) if one_document else None
            if mask is None:
                # As numbers: what attention makes of them, and keeps for the gradient, in every layer anew.
                allowed = block_attention_mask(config, chunk, held, dtype)
                mask = largest[kind] = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
            plan.keys.insert(0, seen)
            plan.masks.insert(0, mask[..., : held.block.shape[-1]])
        return plan

    @classmethod
    def of_prompts(cls, config, tokens: TokenIndex, dtype: torch.dtype) -> "AttentionChunks | None":
        """Of clean tokens, each row's from a column of its own on, and blocks behind them, in generation."""
        length = tokens.block.shape[-1]
        size = max(CHUNK_SIZE, min(-(-length // NUM_CHUNKS), LARGEST_CHUNK_OF_PROMPTS))
        if length < 2 * size:
            return None
        plan = cls([min(size, length - start) for start in range(0, length, size)], [], [])
        for parts in zip(*(plan.split(part, -1) for part in tokens.parts()), strict=True):
            masks = plan.split(block_attention_mask(config, TokenIndex(*parts), tokens, dtype), -1)
            plan.keys.append([index for index, mask in enumerate(masks) if mask.any()])
            plan.masks.append(torch.cat([masks[index] for index in plan.keys[-1]], dim=-1))
        return plan

    def split(self, values: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """Values of one or more grids, in chunks."""
        return list(values.split(self.sizes * (values.shape[dim] // sum(self.sizes)), dim))


@dataclass
class CleanContext:
    """The clean tokens that blocks under denoising see: those already read, and those to be read in the same pass.

    Attributes:
        keys_values: For each layer keys and values (batch, heads, read, head_dim) of the tokens already read.
        read: TokenIndex of these.
        input_ids: (batch, new) int64, whole blocks of clean tokens still to be read, or `None`.
        position_ids, new: Their positions (batch, new) and places.
        room: For each layer the tensors whose first columns `keys_values` are, where a pass may write its own behind.
        sees_all: Whether every token of the blocks may attend to all that was read, and to all of the blocks.
        attention: Arguments of attention, of the first pass with this context for the next ones over the same blocks.
        before: With `token_shift`, the clean hidden state before each block under denoising, (batch, N, hidden), and
            whether there is one, (batch, N) bool; `None` where it is among those of the tokens still to be read.
    """

    keys_values: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    read: TokenIndex | None = None
    input_ids: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    new: TokenIndex | None = None
    room: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    sees_all: bool = False
    attention: dict | None = None
    before: tuple[torch.Tensor, torch.Tensor] | None = None

    def select(self, rows: torch.Tensor) -> "CleanContext":
        """The context of a batch that is made of these rows (int64, any number of times each)."""

        def of_rows(value):
            if isinstance(value, TokenIndex):  # which may be one for all rows
                return value.map(lambda part: part if part.shape[0] == 1 else part[rows])
            if isinstance(value, tuple | list):
                return tuple(map(of_rows, value))
            return None if value is None else value[rows]

        names = ("keys_values", "read", "input_ids", "position_ids", "new", "before")
        return CleanContext(**{name: of_rows(getattr(self, name)) for name in names})

    def without_new(self) -> "CleanContext":
        return CleanContext(keys_values=self.keys_values, read=self.read, room=self.room)


def states_before_blocks(
    hidden_states: torch.Tensor, clean: TokenIndex, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each block of a layout the hidden state of the clean token before it, (batch, N, hidden), and whether there
    is one in its document, (batch, N) bool; arbitrary states where there is none.

    Args:
        hidden_states: (batch, clean tokens, hidden).
        clean: Where these tokens stand: whole blocks from the start of one.
    """
    batch = hidden_states.shape[0]
    block = torch.arange(layout.num_blocks, device=hidden_states.device) + layout.first_block
    index = (block * layout.width - clean.block[:, :1] - 1).expand(batch, -1)
    document = layout.blocks(layout.document)[:, :, 0].expand(batch, -1)
    last = index.clamp(min=0)
    exists = (index >= 0) & (document >= 0) & (clean.document.expand(batch, -1).gather(-1, last) == document)
    return hidden_states.gather(1, last[..., None].expand(-1, -1, hidden_states.shape[-1])), exists


def shift_right(
    hidden_states: torch.Tensor, before: tuple[torch.Tensor, torch.Tensor] | None, layout: Layout
) -> torch.Tensor:
    """Hidden states of blocks under denoising, (batch, N * width, hidden), each for the column on its right.

    A block's first column gets the state `before` it (see [`CleanContext`]). A document's first token has nothing on
    its left: it keeps the state at its own column, that of the mask itself.
    """
    own, document = layout.blocks(hidden_states), layout.blocks(layout.document)
    follows = document[:, :, 1:] == document[:, :, :-1]
    if before is None:
        before = own[:, :, 0], torch.zeros_like(follows[:, :, 0])
    states, exists = before
    left = torch.cat([states[:, :, None], own[:, :, :-1]], dim=2)
    batch = own.shape[0]
    follows = torch.cat([exists[:, :, None].expand(batch, -1, -1), follows.expand(batch, -1, -1)], dim=2)
    return torch.where(follows[..., None], left, own).flatten(1, 2)
