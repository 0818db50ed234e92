"""One key for all puzzles that are symmetric to one another, which finds repeats in disguise."""

from itertools import permutations, product

import numpy as np
from numpy.typing import ArrayLike

from .compiled import Kernel, mix
from .rules import BOXES, as_boards, as_bytes

_LINE_ORDERS = np.array(  # (1296, 9): the orders of nine lines that keep three blocks of three together
    [
        [3 * block + line for block, lines in zip(blocks, within, strict=True) for line in lines]
        for blocks in permutations(range(3))
        for within in product(permutations(range(3)), repeat=3)
    ]
)


def canonical_keys(puzzles: ArrayLike) -> np.ndarray:
    """One key for each class of puzzles that are symmetric to one another.

    Two puzzles have the same key if and only if one of the 9! * 2 * 6^8 symmetries takes one into the other, so that
    `np.isin(canonical_keys(train), canonical_keys(test))` finds the test puzzles that a training set repeats in
    disguise. The key spells out one puzzle of the class: of the 2 * 6^8 arrangements, those in which the hash of what
    each row and column holds is in ascending order; of these, the least row by row, its digits numbered as they
    appear. It is not the least of all arrangements, which other programs may call canonical.

    Args:
        puzzles: (n, 81) integers in 0..9. One core takes about 100,000 puzzles a second, or 400 complete boards.

    Returns:
        (n,) bytes (dtype "S81"): 81 digits each, "0" for an empty cell.

    Raises:
        ImportError: numba is not installed.
        ValueError: wrong shape or type of `puzzles`, a number outside 0..9.
    """
    puzzles = as_boards(puzzles, "puzzles")
    canonical = np.empty_like(puzzles)
    _canonicalise_all(puzzles, canonical)
    return as_bytes(canonical)


@Kernel
def _canonicalise_all(puzzles, canonical):
    for index in range(len(puzzles)):
        _canonicalise(puzzles[index], canonical[index])


@Kernel
def _canonicalise(puzzle, best):
    lines = _line_hashes(puzzle).reshape(2, 9)  # rows, columns
    least = np.stack((_least_order(lines[0]), _least_order(lines[1])))  # (2, 3, 3)
    order = _compare(least[0].reshape(9), least[1].reshape(9))
    num_best = np.int64(0)
    for transposed in range(2):
        if order == (-1 if transposed else 1):
            continue
        grid = puzzle.reshape(9, 9)
        if transposed:
            grid = grid.T.copy()
        row_hashes, column_hashes = lines[transposed], lines[1 - transposed]
        blocks, columns_least = _sorted_blocks(row_hashes), least[1 - transposed].reshape(9)
        for number in range(len(_LINE_ORDERS)):
            columns = _LINE_ORDERS[number]
            for index in range(9):
                if column_hashes[columns[index]] != columns_least[index]:
                    break
            else:
                num_best = _least_rows(
                    grid, columns, row_hashes, blocks, least[transposed], best.reshape(9, 9), num_best
                )


@Kernel
def _line_hashes(board):
    """(18,) uint64 for the nine rows and the nine columns: hashes of what they hold that no symmetry changes.

    Three rounds of colour refinement: cells, digits, boxes, lines and blocks of lines (bands, stacks) take on a hash
    of the hashes of what they consist of or belong to. Sums make it independent of the order, and one rule for rows
    and columns makes transposition exchange the two halves.
    """
    cells = np.empty(81, dtype=np.uint64)
    digits = np.empty(10, dtype=np.uint64)
    boxes = np.empty(9, dtype=np.uint64)
    lines = np.empty(18, dtype=np.uint64)
    weight = np.uint64(0xD6E8FEB86659FD93)  # any odd number: keeps the two terms of a sum apart
    for cell in range(81):
        cells[cell] = mix(np.uint64(1 if board[cell] else 2))
    for _ in range(3):
        digits[:] = 0
        boxes[:] = 0
        for cell in range(81):
            digits[board[cell]] += cells[cell]
        for cell in range(81):
            cells[cell] = mix(cells[cell] + weight * mix(digits[board[cell]]))
            boxes[BOXES[cell]] += cells[cell]
        for line in range(18):
            lines[line] = 0
            for part in range(3):
                minimal = np.uint64(0)
                for position in range(3 * part, 3 * part + 3):
                    minimal += cells[9 * line + position if line < 9 else 9 * position + line - 9]
                lines[line] += mix(minimal)
            lines[line] = mix(lines[line])
        for block in range(0, 18, 3):
            total = weight * mix(lines[block] + lines[block + 1] + lines[block + 2])
            for line in range(block, block + 3):
                lines[line] = mix(lines[line] + total)
        for cell in range(81):
            row, column = cell // 9, cell % 9
            cells[cell] = mix(mix(lines[row] + lines[9 + column]) + weight * (boxes[BOXES[cell]] + cells[cell]))
    return lines


@Kernel
def _least_rows(grid, columns, hashes, blocks, least, best, num_best):
    """Search the orders of the rows for the least board, with the columns in a given order.

    Args:
        grid: (9, 9) the puzzle.
        columns: (9,) the order of its columns.
        hashes: (9,) those of its rows, and `blocks`: (3, 3), the same sorted within each band.
        least: (3, 3) the sequence that they must form.
        best: (9, 9) the least board so far, changed here, of which `num_best` rows are known.

    Returns:
        the number of rows of `best` that are known, 9.
    """
    rows, free = np.zeros(9, dtype=np.int64), np.ones(9, dtype=np.bool_)
    labels = np.zeros((10, 10), dtype=np.uint8)  # on each level: new label of each digit, 0 for none
    num_labels = np.zeros(10, dtype=np.uint8)
    level, row = 0, 0  # row: the next to be tried on this level
    while True:
        while row < 9:
            if free[row] and hashes[row] == least[level // 3, level % 3]:
                if level % 3 != 0:
                    fits = row // 3 == rows[level - 1] // 3
                else:  # a block must fit as a whole, so that no search that has changed `best` ends half-way
                    fits = _compare(blocks[row // 3], least[level // 3]) == 0
                if fits:
                    break
            row += 1
        if row == 9:
            if level == 0:
                return num_best
            level -= 1
            row = rows[level]
            free[row] = True
            row += 1
            continue

        label, labels[level + 1] = num_labels[level], labels[level]
        smaller = level >= num_best
        greater = False
        for column in range(9):
            digit = grid[row, columns[column]]
            if digit != 0:
                if labels[level + 1, digit] == 0:
                    label += np.uint8(1)
                    labels[level + 1, digit] = label
                digit = labels[level + 1, digit]
            if not smaller and digit != best[level, column]:
                greater = digit > best[level, column]
                if greater:
                    break
                smaller = True
            if smaller:
                best[level, column] = digit
        if greater:
            row += 1
            continue
        if smaller:
            num_best = level + 1
        if level == 8:
            row += 1
            continue
        rows[level], free[row] = row, False
        level += 1
        num_labels[level] = label
        row = 0


@Kernel
def _least_order(hashes):
    """(3, 3): the least sequence that the hashes of nine lines form in any order that keeps the blocks together."""
    blocks = _sorted_blocks(hashes)
    for first, second in ((0, 1), (1, 2), (0, 1)):
        if _compare(blocks[first], blocks[second]) > 0:
            for line in range(3):
                blocks[first, line], blocks[second, line] = blocks[second, line], blocks[first, line]
    return blocks


@Kernel
def _sorted_blocks(hashes):
    """(3, 3): the hashes of nine lines, sorted within each block."""
    blocks = hashes.copy().reshape(3, 3)
    for block in range(3):
        for first, second in ((0, 1), (1, 2), (0, 1)):
            if blocks[block, first] > blocks[block, second]:
                blocks[block, first], blocks[block, second] = blocks[block, second], blocks[block, first]
    return blocks


@Kernel
def _compare(first, second):
    """-1, 0 or 1: how two arrays of the same length compare, entry by entry."""
    for index in range(len(first)):
        if first[index] != second[index]:
            return -1 if first[index] < second[index] else 1
    return 0
