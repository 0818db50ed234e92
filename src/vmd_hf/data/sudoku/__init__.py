"""Sudoku: rules, solver, generator, symmetries, reader, tokenizer and dataset.

A board is a row of 81 numbers, row by row from the top left: 0 is an empty cell, 1 to 9 are digits. A batch of boards
is an integer array of shape (n, 81), uint8 where this package makes it. Messages count rows and columns from 1: r3c7
is the cell in row 3, column 7. A puzzle is proper when it has exactly one solution.

Solver, generator and canonical keys are compiled by numba: pip install vmd_hf[sudoku]. The rest works without it.
"""

from .canonical import canonical_keys
from .dataset import (
    SudokuCollator,
    board_ids,
    boards_of,
    puzzle_dataset,
    sudoku_position_groups,
    sudoku_tokenizer,
)
from .generation import MIN_CLUES, generate_puzzles, random_boards
from .readers import PuzzleTable, read_puzzles
from .rules import (
    CELLS_OF_UNIT,
    DIGITS,
    EMPTY_SYMBOLS,
    UNIT_NAMES,
    cell_name,
    check_boards,
    check_solution,
    format_boards,
    group_validity,
    parse_board,
    repeats,
    valid_boards,
)
from .solver import solve_puzzles
from .symmetry import Symmetries, apply_symmetries, fill_by_attempts, inverse_symmetries, random_symmetries

__all__ = [
    "CELLS_OF_UNIT",
    "DIGITS",
    "EMPTY_SYMBOLS",
    "MIN_CLUES",
    "UNIT_NAMES",
    "PuzzleTable",
    "SudokuCollator",
    "Symmetries",
    "apply_symmetries",
    "board_ids",
    "boards_of",
    "canonical_keys",
    "cell_name",
    "check_boards",
    "check_solution",
    "fill_by_attempts",
    "format_boards",
    "generate_puzzles",
    "group_validity",
    "inverse_symmetries",
    "parse_board",
    "puzzle_dataset",
    "random_boards",
    "random_symmetries",
    "read_puzzles",
    "repeats",
    "solve_puzzles",
    "sudoku_position_groups",
    "sudoku_tokenizer",
    "valid_boards",
]
