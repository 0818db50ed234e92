"""Solve puzzles and count their solutions, exactly: a depth-first search over bit masks of digits."""

import numpy as np
from numpy.typing import ArrayLike

from .compiled import Kernel, random_below, shuffle
from .rules import ALL_DIGITS, BOXES, COLUMNS, ROWS, as_boards

_UNITS_OF_CELL = np.stack([ROWS, 9 + COLUMNS, 18 + BOXES], axis=1)  # (81, 3) of 27: rows, columns, boxes
_BIT_COUNT = np.array([mask.bit_count() for mask in range(512)])
_LOWEST_DIGIT = np.array([(mask & -mask).bit_length() for mask in range(512)])


def solve_puzzles(puzzles: ArrayLike, limit: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Solve puzzles and count their solutions, exactly, up to a limit.

    A depth-first search: cells and digits that have only one possibility are filled in (naked and hidden singles),
    else the cell with the fewest candidates is tried.

    Args:
        puzzles: (n, 81) integers in 0..9. A puzzle that breaks the rules has no solution.
        limit: where counting stops, at least 1. The default is enough to know proper puzzles (1).

    Returns:
        counts: (n,) int64 in 0..limit.
        solutions: (n, 81) uint8, the first solution found, zeros where there is none.

    Raises:
        ImportError: numba is not installed.
        ValueError: `limit` below 1, wrong shape or type of `puzzles`, a number outside 0..9.
    """
    if limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}")
    puzzles = as_boards(puzzles, "puzzles")
    counts, solutions = np.zeros(len(puzzles), dtype=np.int64), np.zeros_like(puzzles)
    _solve_all(puzzles, limit, counts, solutions)
    return counts, solutions


@Kernel
def _solve_all(puzzles, limit, counts, solutions):
    forbidden, no_state = np.zeros(81, dtype=np.int64), np.zeros(0, dtype=np.uint64)
    for index in range(len(puzzles)):
        counts[index] = search(puzzles[index], forbidden, limit, solutions[index], no_state)


@Kernel
def search(clues, forbidden, limit, solution, state):
    """Count solutions up to a limit, depth first.

    Args:
        clues: (81,) the board to start from, unchanged.
        forbidden: (81,) digits that a cell must not take, besides those that the rules exclude.
        limit: where to stop.
        solution: (81,) becomes the first solution found, if there is one.
        state: (1,) state of the random numbers by which cells and digits are tried in random order, or (0,) for a
            fixed order.
    """
    board = np.zeros(81, dtype=np.int64)
    order = np.arange(81)
    used = np.zeros(27, dtype=np.int64)
    candidates = np.empty(81, dtype=np.int64)
    seen = np.empty((2, 27), dtype=np.int64)
    branch_cell = np.empty(81, dtype=np.int64)
    branch_mask = np.empty(81, dtype=np.int64)  # digits yet to be tried
    branch_set = np.empty(81, dtype=np.int64)
    if len(state) > 0:
        shuffle(order, state)
    num_set = np.int64(0)
    for index in range(81):
        cell = order[index]
        digit = np.int64(clues[cell])
        if digit == 0:
            continue
        for kind in range(3):
            if used[_UNITS_OF_CELL[cell, kind]] & (1 << (digit - 1)):
                return 0
        _set(board, used, cell, digit)
        order[index], order[num_set] = order[num_set], cell
        num_set += 1

    count, depth = 0, 0
    while True:
        num_set, cell = _propagate(board, order, num_set, used, forbidden, candidates, seen)
        if cell == 81:
            count += 1
            if count == 1:
                solution[:] = board
            if count == limit:
                return count
        elif cell >= 0:
            branch_cell[depth], branch_mask[depth], branch_set[depth] = cell, candidates[cell], num_set
            depth += 1
        while depth > 0 and branch_mask[depth - 1] == 0:
            depth -= 1
        if depth == 0:
            return count

        cell, mask = branch_cell[depth - 1], branch_mask[depth - 1]
        while num_set > branch_set[depth - 1]:
            num_set -= 1
            undone = order[num_set]
            for kind in range(3):
                used[_UNITS_OF_CELL[undone, kind]] &= ~(1 << (board[undone] - 1))
            board[undone] = 0
        if len(state) > 0:
            for _ in range(random_below(state, _BIT_COUNT[mask])):
                mask &= mask - 1
        digit = _LOWEST_DIGIT[mask]
        branch_mask[depth - 1] &= ~(1 << (digit - 1))
        index = num_set
        while order[index] != cell:
            index += 1
        _set(board, used, cell, digit)
        order[index], order[num_set] = order[num_set], cell
        num_set += 1


@Kernel
def _propagate(board, order, num_set, used, forbidden, candidates, seen):
    """Fill in naked and hidden singles until there are none.

    Args:
        board: (81,), filled in here.
        order: (81,) cells: first the `num_set` ones that are set, in the order of setting, then the empty ones.
        used: (27,) digits set in each unit.
        forbidden: (81,) digits that a cell must not take.
        candidates: (81,) and `seen`: (2, 27), working memory; candidates are right for the empty cells on return.

    Returns:
        num_set, and the empty cell with the fewest candidates; 81 if no cell is empty, -1 for a contradiction.
    """
    while num_set < 81:
        before = num_set
        seen[:] = 0
        fewest, best = 10, -1
        for index in range(num_set, 81):
            cell = order[index]
            row, column, box = _UNITS_OF_CELL[cell, 0], _UNITS_OF_CELL[cell, 1], _UNITS_OF_CELL[cell, 2]
            mask = ALL_DIGITS & ~(used[row] | used[column] | used[box] | forbidden[cell])
            if mask == 0:
                return num_set, -1
            if mask & (mask - 1) == 0:
                _set(board, used, cell, _LOWEST_DIGIT[mask])
                order[index], order[num_set] = order[num_set], cell
                num_set += 1
                continue
            candidates[cell] = mask
            if _BIT_COUNT[mask] < fewest:
                fewest, best = _BIT_COUNT[mask], cell
            for unit in (row, column, box):
                seen[1, unit] |= seen[0, unit] & mask  # digits with two cells or more
                seen[0, unit] |= mask
        if num_set > before:
            continue

        for unit in range(27):
            if used[unit] | seen[0, unit] != ALL_DIGITS:
                return num_set, -1
            seen[0, unit] &= ~seen[1, unit]  # digits with one cell
        for index in range(num_set, 81):
            cell = order[index]
            row, column, box = _UNITS_OF_CELL[cell, 0], _UNITS_OF_CELL[cell, 1], _UNITS_OF_CELL[cell, 2]
            mask = candidates[cell] & (seen[0, row] | seen[0, column] | seen[0, box])
            if mask == 0:
                continue
            if mask & (mask - 1) != 0 or mask & (used[row] | used[column] | used[box]) != 0:
                return num_set, -1
            _set(board, used, cell, _LOWEST_DIGIT[mask])
            order[index], order[num_set] = order[num_set], cell
            num_set += 1
        if num_set == before:
            return num_set, best
    return num_set, 81


@Kernel
def _set(board, used, cell, digit):
    board[cell] = digit
    for kind in range(3):
        used[_UNITS_OF_CELL[cell, kind]] |= 1 << (digit - 1)
