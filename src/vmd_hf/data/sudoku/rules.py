"""Boards and the rules of Sudoku: reading and writing one, its rows, columns and boxes, and what is right about it."""

import numpy as np
from numpy.typing import ArrayLike

DIGITS = "123456789"
EMPTY_SYMBOLS = "0._*"

_CELLS = np.arange(81)
ROWS, COLUMNS = _CELLS // 9, _CELLS % 9  # (81,) each, and
BOXES = 3 * (ROWS // 3) + COLUMNS // 3  # the number of a cell's box
CELLS_OF_UNIT = np.stack([np.flatnonzero(units == unit) for units in (ROWS, COLUMNS, BOXES) for unit in range(9)])
UNIT_NAMES = [f"{kind} {number}" for kind in ("row", "column", "box") for number in range(1, 10)]  # of CELLS_OF_UNIT

ALL_DIGITS = 511  # sets of digits are bit masks, bit d - 1 for digit d
_MASKS = np.array([0] + [1 << bit for bit in range(9)], dtype=np.int16)  # of each digit

_SYMBOLS = np.full(256, 255, dtype=np.uint8)  # the digit that each ASCII symbol stands for; 255: none
_SYMBOLS[[ord(symbol) for symbol in DIGITS]] = range(1, 10)
_SYMBOLS[[ord(symbol) for symbol in EMPTY_SYMBOLS]] = 0


def parse_board(text: str) -> np.ndarray:
    """One board from text: 81 cells row by row, digits for clues, "0", ".", "_" or "*" for empty cells.

    White space is ignored, so nine lines of nine cells are as good as one line.

    Returns:
        uint8 array of shape (81,). Whether digits repeat in a row, column or box is for `check_boards` to say.

    Raises:
        ValueError: another number of cells, or another symbol.
    """
    symbols = "".join(text.split())
    for index, symbol in enumerate(symbols):
        if symbol not in DIGITS and symbol not in EMPTY_SYMBOLS:
            raise ValueError(
                f"`text` must consist of the digits 1 to 9 and of {' '.join(EMPTY_SYMBOLS)} for empty cells, got "
                f"{symbol!r} as symbol {index + 1}, {cell_name(index)}"
            )
    if len(symbols) != 81:
        raise ValueError(f"`text` must have 81 cells, got {len(symbols)}: {shortened(text)!r}")
    return _SYMBOLS[np.frombuffer(symbols.encode(), dtype=np.uint8)]


def parse_lines(lines: list[str]) -> np.ndarray | None:
    """(n, 81) uint8 from n texts of exactly 81 symbols, a million at a time; None if any needs `parse_board`."""
    joined = "".join(lines)
    if not joined.isascii() or any(len(line) != 81 for line in lines):
        return None
    boards = _SYMBOLS[np.frombuffer(joined.encode(), dtype=np.uint8)].reshape(-1, 81)
    return boards if (boards <= 9).all() else None


def format_boards(boards: ArrayLike) -> list[str]:
    """Each of (n, 81) boards as 81 digits, "0" for an empty cell: `parse_board` the other way round."""
    return [board.decode() for board in as_bytes(as_boards(boards, "boards")).tolist()]


def check_boards(boards: ArrayLike) -> None:
    """Check that boards, complete or not, keep the rules: no digit twice in a row, column or box.

    It does not solve them; `solve_puzzles` counts their solutions.

    Args:
        boards: (n, 81) integers, or (81,) for one board.

    Raises:
        ValueError: wrong shape or type, a number outside 0..9, or a digit that repeats. The message names the board
            (from 0), the cells and the rule.
    """
    check_rules(as_boards(np.atleast_2d(np.asarray(boards)), "boards"), "boards")


def check_solution(puzzles: ArrayLike, solutions: ArrayLike) -> None:
    """Check that solutions are complete boards that keep the rules and agree with the clues of their puzzles.

    Args:
        puzzles: (n, 81) integers, or (81,) for one puzzle.
        solutions: as many boards as `puzzles`.

    Raises:
        ValueError: as in `check_boards` for either of them, different numbers of boards, a solution with an empty
            cell, or one that contradicts a clue. The message names the board (from 0) and the cell.
    """
    puzzles = as_boards(np.atleast_2d(np.asarray(puzzles)), "puzzles")
    solutions = as_boards(np.atleast_2d(np.asarray(solutions)), "solutions")
    if len(puzzles) != len(solutions):
        raise ValueError(f"`solutions` must be as many as `puzzles`, got {len(solutions)} for {len(puzzles)}")
    check_rules(puzzles, "puzzles")
    empty, wrong = solutions == 0, (puzzles != 0) & (puzzles != solutions)
    if empty.any():
        board, cell = _first(empty)
        raise ValueError(
            f"`solutions` must have no empty cell, got one at {cell_name(cell)} of board {board} "
            f"({empty[board].sum()} in that board)"
        )
    if wrong.any():
        board, cell = _first(wrong)
        raise ValueError(
            f"`solutions` must agree with the clues of `puzzles`, got {solutions[board, cell]} at {cell_name(cell)} "
            f"of board {board}, where the clue is {puzzles[board, cell]}"
        )
    check_rules(solutions, "solutions")


def group_validity(boards: ArrayLike) -> np.ndarray:
    """How much of each board is right: the shares of its rows, columns and boxes that hold each digit once.

    Args:
        boards: (n, 81) integers. A number outside 1..9, such as a mask left over, fills no cell and is no error.

    Returns:
        (n, 3) float64 in steps of 1/9: rows, columns, boxes.

    Raises:
        ValueError: wrong shape or type.
    """
    return _complete_units(boards).reshape(-1, 3, 9).mean(axis=2)


def valid_boards(boards: ArrayLike) -> np.ndarray:
    """Which of (n, 81) boards are complete and right: each digit once in each row, column and box; (n,) bool.

    Agreement with a puzzle's clues is another matter: `((puzzles == 0) | (puzzles == boards)).all(axis=1)`.

    Raises:
        ValueError: as in `group_validity`.
    """
    return _complete_units(boards).all(axis=1)


def repeats(board: ArrayLike) -> list[tuple[str, int, list[int]]]:
    """Every digit that a row, column or box of 81 numbers (0: empty) holds more than once: the unit's name, the digit
    and its cells, rows first."""
    found = []
    for name, cells in zip(UNIT_NAMES, CELLS_OF_UNIT, strict=True):
        digits = np.asarray(board)[cells]
        for digit in range(1, 10):
            same = cells[digits == digit].tolist()
            if len(same) > 1:
                found.append((name, digit, same))
    return found


def check_rules(boards: np.ndarray, name: str) -> None:
    """`check_boards` for (n, 81) uint8; `name` is the argument that a message names."""
    masks = _MASKS[boards]  # (n, 81)
    # A sum of bits differs from their union if and only if one of them occurs twice.
    broken = [masks[:, unit].sum(axis=1) != np.bitwise_or.reduce(masks[:, unit], axis=1) for unit in CELLS_OF_UNIT]
    if not np.any(broken):  # (27, n)
        return
    board = int(np.any(broken, axis=0).argmax())
    unit, digit, cells = repeats(boards[board])[0]
    names = [cell_name(cell) for cell in cells]
    number = {2: "two", 3: "three"}.get(len(cells), str(len(cells)))
    raise ValueError(
        f"`{name}` must not repeat a digit in a row, column or box, got {number} {digit}s in {unit} of board {board}: "
        f"cells {', '.join(names[:-1])} and {names[-1]}"
    )


def as_boards(boards: ArrayLike, name: str, any_number: bool = False) -> np.ndarray:
    """(n, 81) boards as uint8; with `any_number`, numbers that are no digit become 0."""
    boards = np.asarray(boards)
    if boards.ndim != 2 or boards.shape[1] != 81 or boards.dtype.kind not in "iu":
        raise ValueError(
            f"`{name}` must be integers of shape (n, 81), got {boards.dtype} of shape {tuple(boards.shape)}"
        )
    outside = (boards < 0) | (boards > 9)
    if any_number:
        boards = np.where(outside, 0, boards)
    elif outside.any():
        board, cell = _first(outside)
        raise ValueError(
            f"`{name}` must hold 0 for an empty cell and digits from 1 to 9, got {boards[board, cell]} at "
            f"{cell_name(cell)} of board {board}"
        )
    return np.ascontiguousarray(boards, dtype=np.uint8)


def as_bytes(boards: np.ndarray) -> np.ndarray:
    """(n, 81) uint8 boards as (n,) strings of bytes (dtype "S81"), "0" for an empty cell."""
    return (boards + np.uint8(ord("0"))).view("S81")[:, 0]


def cell_name(cell: int) -> str:
    return f"r{cell // 9 + 1}c{cell % 9 + 1}"


def shortened(text: str) -> str:
    return text if len(text) <= 100 else text[:100] + "..."


def _complete_units(boards: ArrayLike) -> np.ndarray:
    """(n, 27) bool: which rows, columns and boxes hold each digit once."""
    boards = as_boards(boards, "boards", any_number=True)
    masks = _MASKS[boards]  # (n, 81)
    return np.stack([np.bitwise_or.reduce(masks[:, unit], axis=1) == ALL_DIGITS for unit in CELLS_OF_UNIT], axis=1)


def _first(where: np.ndarray) -> tuple[int, int]:
    row, column = np.argwhere(where)[0].tolist()
    return row, column
