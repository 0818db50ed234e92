"""Puzzles as tokens: tokenizer, dataset, and a collator that puts each row under a random symmetry."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from numpy.typing import ArrayLike
from tokenizers import Regex, normalizers, pre_tokenizers
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..characters import character_tokenizer
from .rules import BOXES, COLUMNS, DIGITS, EMPTY_SYMBOLS, ROWS, check_solution, format_boards, parse_board
from .symmetry import apply_symmetries, random_symmetries


def sudoku_tokenizer() -> PreTrainedTokenizerFast:
    """Digits "1".."9" are the ids 0..8, "[MASK]" is 9 and "[PAD]" is 10.

    An empty cell of a puzzle, written "0", ".", "_" or "*", becomes the mask token too, and white space is dropped: a
    board of 81 cells, in one line or nine, is always 81 ids. A complete board decodes to its 81 digits.
    """
    tokenizer = character_tokenizer(DIGITS, eos_token=None)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\s+"), ""),
            normalizers.Replace(Regex(f"[{EMPTY_SYMBOLS}]"), tokenizer.mask_token),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\[MASK\]|[\s\S]"), behavior="isolated")
    return tokenizer


def sudoku_position_groups() -> list[list[int]]:
    """The number (0..8) of the row, of the column and of the box of each of the 81 cells: three lists of 81.

    For `VMDConfig(position_groups=..., max_position_embeddings=81)`.
    """
    return [ROWS.tolist(), COLUMNS.tolist(), BOXES.tolist()]


def puzzle_dataset(puzzles: ArrayLike, solutions: ArrayLike, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Puzzles to train on: the solution is the text, and its clues are context, which is never masked.

    Args:
        puzzles: (n, 81) integers in 0..9.
        solutions: (n, 81), the solutions of the puzzles.
        tokenizer: a `sudoku_tokenizer`.

    Returns:
        Dataset in torch format, n rows of two columns, int64, 81 tokens each: `input_ids`, the solution, and `labels`,
        the solution with -100 at the clues.

    Raises:
        ValueError: as in `check_solution`.
    """
    check_solution(puzzles, solutions)
    input_ids = _digit_ids(tokenizer)[np.asarray(solutions)]  # (n, 81)
    labels = np.where(np.asarray(puzzles) != 0, -100, input_ids)
    columns = {"input_ids": input_ids, "labels": labels}
    return Dataset.from_dict(
        {name: pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), 81) for name, ids in columns.items()}
    ).with_format("torch")


def board_ids(boards: ArrayLike, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(n, 81) boards to (n, 81) int64 tokens of a `sudoku_tokenizer`, masks for empty cells."""
    return tokenizer(format_boards(boards), return_tensors="pt")["input_ids"]


def boards_of(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """(n, 81) int64 tokens without masks to (n, 81) uint8 boards."""
    return np.stack([parse_board(text) for text in tokenizer.batch_decode(ids)])


class SudokuCollator:
    """Collator of `puzzle_dataset` rows that puts each row under a fresh random symmetry (`random_symmetries`).

    For training: a Trainer uses its collator in evaluation as well, where the symmetries do no harm but make one
    evaluation differ from the next. Processes of a DataLoader draw from seeds of their own, so that no two of them,
    and no two epochs, repeat the same symmetries.

    Args:
        tokenizer: a `sudoku_tokenizer`.
        seed: seed of the numpy Generator that draws the symmetries, 0 or more.
        extra_clues: each row gets a uniformly drawn number of further clues from 0 to this one, in random cells: what
            a solver sees after some of its steps.

    Called with rows of `input_ids` and `labels`, 81 each, it returns both as int64 tensors of shape (rows, 81).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, extra_clues: int = 0):
        if not 0 <= extra_clues <= 81:
            raise ValueError(f"`extra_clues` must lie in 0..81, got {extra_clues}")
        self.generator = np.random.default_rng(seed)
        self.extra_clues = extra_clues
        self._seed = seed
        self._worker_seed = None
        self._digit_ids = _digit_ids(tokenizer)
        self._digits = np.zeros(len(tokenizer), dtype=np.uint8)
        self._digits[self._digit_ids[1:]] = np.arange(1, 10)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        worker = get_worker_info()
        if worker is not None and worker.seed != self._worker_seed:
            self._worker_seed = worker.seed
            self.generator = np.random.default_rng([self._seed, worker.seed])
        solutions = self._digits[np.stack([np.asarray(row["input_ids"]) for row in rows])]  # (rows, 81)
        clues = np.stack([np.asarray(row["labels"]) for row in rows]) == -100
        if self.extra_clues:
            extra = self.generator.integers(self.extra_clues + 1, size=(len(rows), 1))
            rank = np.where(clues, 2.0, self.generator.random(clues.shape)).argsort(axis=1).argsort(axis=1)
            clues |= rank < extra
        symmetries = random_symmetries(len(rows), self.generator)
        input_ids = self._digit_ids[apply_symmetries(solutions, symmetries)]
        labels = np.where(np.take_along_axis(clues, symmetries.positions, axis=1), -100, input_ids)
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


def _digit_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """(10,) int64: the id of each digit, of the mask for an empty cell."""
    return np.array(tokenizer.convert_tokens_to_ids([tokenizer.mask_token, *DIGITS]), dtype=np.int64)
