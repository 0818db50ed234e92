"""Random complete boards, and random puzzles with exactly one solution."""

import numpy as np

from .compiled import Kernel, random_below, shuffle, stream_states
from .solver import search

MIN_CLUES = 17  # no puzzle of 16 clues is proper (McGuire, Tugemann, Civario, arXiv 1201.0749)

_CHUNK = 256  # puzzles


def random_boards(num_boards: int, seed: int, start: int = 0) -> np.ndarray:
    """Random complete boards, each filled from scratch by a randomised search.

    Every complete board can come out, though not all with exactly the same probability.

    Args:
        num_boards: number of boards, at least 1.
        seed: 0 or more. Board i depends on `seed` and `start + i` alone, so a large set can be made in parts, in any
            order and in several processes or threads.
        start: number of the first board, 0 or more.

    Returns:
        (num_boards, 81) uint8.

    Raises:
        ImportError: numba is not installed.
        ValueError: a number out of range.
    """
    states = stream_states(num_boards, "num_boards", seed, start)
    boards = np.empty((num_boards, 81), dtype=np.uint8)
    _fill_all(states, boards)
    return boards


def generate_puzzles(
    num_puzzles: int, clues: int | tuple[int, int], seed: int, start: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Random puzzles with exactly one solution and a wanted number of clues.

    Cells of a random complete board (`random_boards`) are emptied in random order; a cell whose emptying would allow
    a second solution keeps its clue. A board on which the number is not reached is given up for a new one.

    One core makes about 10,000 puzzles a second at 34 clues and 2,000 at 24. From there each clue less takes three to
    ten times as long; 20 and fewer are a matter of luck.

    Args:
        num_puzzles: number of puzzles, at least 1.
        clues: number of clues in 17..81, or a range (lowest, highest), from which each puzzle draws its own number
            uniformly and keeps it through all boards it tries.
        seed: 0 or more. Puzzle i depends on `seed`, `clues` and `start + i` alone, as in `random_boards`.
        start: number of the first puzzle, 0 or more.

    Returns:
        puzzles, solutions: (num_puzzles, 81) uint8 each.

    Raises:
        ImportError: numba is not installed.
        ValueError: a number out of range.
    """
    lowest, highest = (clues, clues) if isinstance(clues, int | np.integer) else clues
    if not MIN_CLUES <= lowest <= highest <= 81:
        raise ValueError(
            f"`clues` must be a number or a range (lowest, highest) in {MIN_CLUES}..81, since fewer than {MIN_CLUES} "
            f"clues never fix the solution, got {clues}"
        )
    states = stream_states(num_puzzles, "num_puzzles", seed, start)
    targets = np.empty(num_puzzles, dtype=np.int64)
    _draw_targets(states, lowest, highest, targets)
    puzzles = np.empty((num_puzzles, 81), dtype=np.uint8)
    solutions = np.empty((num_puzzles, 81), dtype=np.uint8)
    pending = np.arange(num_puzzles)
    while len(pending):
        missed = []
        for begin in range(0, len(pending), _CHUNK):  # a keyboard interrupt is heard between chunks
            chunk = pending[begin : begin + _CHUNK]
            missed.append(chunk[~_dig_all(chunk, states, targets, puzzles, solutions)])
        pending = np.concatenate(missed)
    return puzzles, solutions


@Kernel
def _draw_targets(states, lowest, highest, targets):
    for index in range(len(states)):
        targets[index] = lowest + random_below(states[index : index + 1], highest - lowest + 1)


@Kernel
def _fill_all(states, boards):
    forbidden, empty = np.zeros(81, dtype=np.int64), np.zeros(81, dtype=np.uint8)
    for index in range(len(boards)):
        search(empty, forbidden, np.int64(1), boards[index], states[index : index + 1])


@Kernel
def _dig_all(indices, states, targets, puzzles, solutions):
    """Try one new board for each of the puzzles `indices`; (len(indices),) bool says where the target was reached."""
    forbidden, empty = np.zeros(81, dtype=np.int64), np.zeros(81, dtype=np.uint8)
    reached = np.zeros(len(indices), dtype=np.bool_)
    other, no_state = np.empty(81, dtype=np.uint8), np.zeros(0, dtype=np.uint64)
    for number, index in enumerate(indices):
        state, puzzle, target = states[index : index + 1], puzzles[index], targets[index]
        search(empty, forbidden, np.int64(1), solutions[index], state)
        puzzle[:] = solutions[index]
        cells = np.arange(81)
        shuffle(cells, state)
        num_clues = 81
        for tried in range(81):
            if num_clues == target or num_clues - (81 - tried) > target:
                break
            # The solution without the clue is the only one if and only if no other digit can stand in its place.
            # A clue that is needed now is needed ever after, so each cell is tried once.
            cell = cells[tried]
            digit = puzzle[cell]
            puzzle[cell] = 0
            forbidden[cell] = 1 << (np.int64(digit) - 1)
            if search(puzzle, forbidden, np.int64(1), other, no_state):
                puzzle[cell] = digit
            else:
                num_clues -= 1
            forbidden[cell] = 0
        reached[number] = num_clues == target
    return reached
