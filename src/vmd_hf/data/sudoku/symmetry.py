"""The 9! * 2 * 6^8 symmetries of the rules: drawn, applied, undone, and used to try a puzzle again."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from .rules import as_boards, valid_boards


class Symmetries(NamedTuple):
    """One symmetry of the Sudoku rules for each of n boards, see `apply_symmetries`.

    Attributes:
        positions: (n, 81) int64: the cell of the old board that each cell of the new board is taken from.
        digits: (n, 10) uint8: the new digit for each old one; entry 0, the empty cell, is 0.
    """

    positions: np.ndarray
    digits: np.ndarray


def random_symmetries(num_boards: int, generator: np.random.Generator | torch.Generator) -> Symmetries:
    """Symmetries drawn uniformly and independently from all 9! * 2 * 6^8 of them.

    They are compositions of a relabelling of the digits, transposition, and permutations of the bands, of the stacks,
    of the rows within a band and of the columns within a stack.

    Raises:
        ValueError: `num_boards` is negative, or `generator` is of another type.
    """
    if num_boards < 0:
        raise ValueError(f"`num_boards` must be 0 or more, got {num_boards}")
    if isinstance(generator, np.random.Generator):
        noise = generator.random((num_boards, 34))
    elif isinstance(generator, torch.Generator):
        noise = torch.rand((num_boards, 34), dtype=torch.float64, generator=generator, device=generator.device)
        noise = noise.cpu().numpy()
    else:
        raise ValueError(f"`generator` must be a numpy or a torch Generator, got {type(generator).__name__}")
    digits = np.zeros((num_boards, 10), dtype=np.uint8)
    digits[:, 1:] = noise[:, :9].argsort(axis=1) + 1
    rows = _line_orders(noise[:, 9:21])[:, :, None]  # (n, 9, 1)
    columns = _line_orders(noise[:, 21:33])[:, None, :]  # (n, 1, 9)
    transposed = noise[:, 33, None, None] < 0.5
    positions = np.where(transposed, 9 * columns + rows, 9 * rows + columns)  # (n, 9, 9)
    return Symmetries(positions.reshape(num_boards, 81), digits)


def apply_symmetries(boards: ArrayLike, symmetries: Symmetries) -> np.ndarray:
    """Each board under its own symmetry.

    What is proper stays proper, and a puzzle's solution goes over into the solution of the new puzzle under the same
    symmetry.

    Args:
        boards: (n, 81) integers in 0..9.
        symmetries: n of them, as `random_symmetries` draws.

    Returns:
        (n, 81) uint8.

    Raises:
        ValueError: wrong shape or type of `boards`, a number outside 0..9, another number of symmetries.
    """
    boards = as_boards(boards, "boards")
    if len(boards) != len(symmetries.positions):
        raise ValueError(f"`symmetries` must be one a board, got {len(symmetries.positions)} for {len(boards)} boards")
    return np.take_along_axis(symmetries.digits, np.take_along_axis(boards, symmetries.positions, axis=1), axis=1)


def inverse_symmetries(symmetries: Symmetries) -> Symmetries:
    """What undoes each of them: `apply_symmetries(apply_symmetries(boards, s), inverse_symmetries(s))` is `boards`."""
    digits = symmetries.digits.argsort(axis=1).astype(np.uint8)
    return Symmetries(symmetries.positions.argsort(axis=1), digits)


def fill_by_attempts(
    fill: Callable[[np.ndarray], np.ndarray], puzzles: ArrayLike, num_attempts: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Fill each board, and try again those that break a rule, which shows without knowing the solution.

    The first attempt is at the puzzle itself, each further one at the puzzle under a random symmetry of its own, which
    to a solver without a search is another puzzle.

    Args:
        fill: from puzzles (n, 81) uint8 to boards of that shape; clues stay.
        puzzles: (n, 81) integers in 0..9.
        num_attempts: attempts at most, 1 or more.
        seed: seed of the symmetries, 0 or more.

    Returns:
        boards: (n, 81) uint8, the last attempt where none is valid.
        attempts: (n,) int64, the number of the attempt that gave a valid board, 0 where none did.

    Raises:
        ValueError: `num_attempts` below 1, or wrong `puzzles`.
    """
    if num_attempts < 1:
        raise ValueError(f"`num_attempts` must be at least 1, got {num_attempts}")
    puzzles = as_boards(puzzles, "puzzles")
    generator = np.random.default_rng(seed)
    boards, attempts = puzzles.copy(), np.zeros(len(puzzles), dtype=np.int64)
    pending = np.arange(len(puzzles))
    for attempt in range(1, num_attempts + 1):
        if attempt == 1:
            boards[pending] = fill(puzzles)
        else:
            symmetries = random_symmetries(len(pending), generator)
            filled = fill(apply_symmetries(puzzles[pending], symmetries))
            boards[pending] = apply_symmetries(filled, inverse_symmetries(symmetries))
        valid = valid_boards(boards[pending])
        attempts[pending[valid]] = attempt
        pending = pending[~valid]
        if not len(pending):
            break
    return boards, attempts


def _line_orders(noise: np.ndarray) -> np.ndarray:
    """(n, 9) orders of nine lines that keep three blocks of three together, from (n, 12) independent noise."""
    blocks = noise[:, :3].argsort(axis=1)[:, :, None]  # (n, 3, 1)
    within = noise[:, 3:].reshape(-1, 3, 3).argsort(axis=2)  # (n, 3, 3)
    return (3 * blocks + within).reshape(-1, 9)
