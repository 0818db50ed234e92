"""What is typed, as ids: a text with gaps, or a Sudoku."""

import torch
from transformers import PreTrainedTokenizerBase

from ..data.sudoku import parse_board, repeats
from .verdicts import describe

GAP = "_"  # how a mask token is typed


def read_text(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """A text with gaps as ids: (tokens,) int64. `_`, or the mask token spelled out, is a gap of one token.

    Raises:
        ValueError: if there is no gap, or a character that the tokenizer does not know.
    """
    masked = text.replace(GAP, tokenizer.mask_token)
    if tokenizer.mask_token not in masked:
        raise ValueError(f"text must have a gap, typed as {GAP}, got {text!r}")
    return _encode(masked, tokenizer)


def read_puzzle(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """A Sudoku as ids: (81,) int64, masks for empty cells.

    Raises:
        ValueError: for anything but 81 cells, a digit that its row, column or box has already, a board without an
            empty cell, or a tokenizer that has not one token a cell. The message names cells and rule.
    """
    try:
        board = parse_board(text).tolist()
    except ValueError as error:
        raise ValueError(str(error).replace("`text`", "the puzzle")) from error
    if faults := repeats(board):
        raise ValueError(f"the clues must not repeat a digit in a row, column or box, but {describe(faults[0])}")
    if 0 not in board:
        raise ValueError("the puzzle must have an empty cell, got 81 clues")
    ids = _encode("".join(str(digit) if digit else tokenizer.mask_token for digit in board), tokenizer)
    if len(ids) != 81:
        raise ValueError(f"the model's tokenizer must have one token for each of 81 cells, got {len(ids)}")
    return ids


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(tokens,) int64; a ValueError names the symbol that the tokenizer does not know."""
    try:
        return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
    except Exception as error:  # the tokenizers library raises nothing more special
        symbols = [*text.replace(tokenizer.mask_token, "")]
        if len(symbols) == 1:
            raise ValueError(f"text must consist of what the model's tokenizer knows, got {symbols[0]!r}") from error
        for symbol in symbols:
            _encode(symbol, tokenizer)
        raise
