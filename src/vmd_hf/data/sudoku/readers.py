"""Puzzles from files."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow.csv import ConvertOptions, ReadOptions, read_csv

from .rules import check_rules, check_solution, parse_board, parse_lines, shortened

_PUZZLE_COLUMNS = ("puzzle", "puzzles", "quiz", "quizzes", "question", "text")
_SOLUTION_COLUMNS = ("solution", "solutions", "answer")


class PuzzleTable(NamedTuple):
    """What a file of n puzzles holds.

    Attributes:
        puzzles: (n, 81) uint8.
        solutions: (n, 81) uint8, or None if there are none.
        extras: the other columns by name, each an array of n entries: ratings, clue counts and the like.
    """

    puzzles: np.ndarray
    solutions: np.ndarray | None
    extras: dict[str, np.ndarray]


def read_puzzles(
    path: str | Path, puzzle_column: str | None = None, solution_column: str | None = None
) -> PuzzleTable:
    """Puzzles from a local file: CSV if there is a comma in its first line, else one puzzle a line.

    CSV has a header. Its puzzle column is called puzzle, puzzles, quiz, quizzes, question or text, and its solution
    column, if any, solution, solutions or answer, in upper or lower case, unless the arguments say otherwise. Lines
    are read by `parse_board`; empty ones and those that begin with "#" are skipped.

    Args:
        path: the file, UTF-8.
        puzzle_column: name of the column with the puzzles, None to find it.
        solution_column: name of the column with the solutions, None to find it or do without.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no puzzles, no puzzle column, or a board that is not readable or breaks the rules (see
            `check_boards`, `check_solution`; whether puzzles are proper is not checked). The message names the row.
    """
    with open(path, encoding="utf-8-sig") as file:
        header = file.readline()
    if "," in header:
        return _read_table(path, header, puzzle_column, solution_column)
    if puzzle_column is not None or solution_column is not None:
        raise ValueError(
            f"`puzzle_column` and `solution_column` must be None unless `path` is a CSV file with a header, got "
            f"{puzzle_column!r} and {solution_column!r} with the first line {shortened(header)!r} of {str(path)!r}"
        )
    with open(path, encoding="utf-8-sig") as file:
        lines = {number: line.strip() for number, line in enumerate(file, start=1)}
    lines = {number: line for number, line in lines.items() if line and not line.startswith("#")}
    numbers = list(lines)
    puzzles = _parse_all(list(lines.values()), path, lambda row: f"line {numbers[row]}")
    check_rules(puzzles, "path")
    return PuzzleTable(puzzles, None, {})


def _read_table(path: str | Path, header: str, puzzle_column: str | None, solution_column: str | None) -> PuzzleTable:
    names = [name.strip() for name in next(csv.reader([header], skipinitialspace=True))]
    puzzle_column, solution_column = _find_columns(names, puzzle_column, solution_column, path)
    columns = [column for column in (puzzle_column, solution_column) if column is not None]
    table = read_csv(
        path,
        ReadOptions(skip_rows=1, column_names=names),
        convert_options=ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),  # else a rounded number
    )
    boards = {
        name: _parse_all(table[name].to_pylist(), path, lambda row, name=name: f"column {name!r}, row {row}")
        for name in columns
    }
    puzzles, solutions = boards[puzzle_column], boards.get(solution_column)
    if solutions is None:
        check_rules(puzzles, puzzle_column)
    else:
        check_solution(puzzles, solutions)
    extras = {name: table[name].to_numpy() for name in table.column_names if name not in boards}
    return PuzzleTable(puzzles, solutions, extras)


def _find_columns(
    names: Sequence[str], puzzle_column: str | None, solution_column: str | None, path: str | Path
) -> tuple[str, str | None]:
    for parameter, column in (("puzzle_column", puzzle_column), ("solution_column", solution_column)):
        if column is not None and column not in names:
            raise ValueError(f"`{parameter}` must be a column of {str(path)!r}, got {column!r} for {list(names)}")
    by_lower_case = {name.lower(): name for name in names}
    if puzzle_column is None:
        puzzle_column = next((by_lower_case[name] for name in _PUZZLE_COLUMNS if name in by_lower_case), None)
    if solution_column is None:
        solution_column = next((by_lower_case[name] for name in _SOLUTION_COLUMNS if name in by_lower_case), None)
    if puzzle_column is None:
        raise ValueError(
            f"`path` must have a column with the puzzles: one of {_PUZZLE_COLUMNS}, or name it in `puzzle_column`; "
            f"got {list(names)} in {str(path)!r}"
        )
    return puzzle_column, solution_column


def _parse_all(texts: list[str], path: str | Path, place: Callable[[int], str]) -> np.ndarray:
    """(n, 81) boards from n texts; `place` names for messages where in the file a text stands."""
    if not texts:
        raise ValueError(f"`path` must hold at least one puzzle, got none in {str(path)!r}")
    boards = parse_lines(texts)
    if boards is not None:
        return boards
    boards = np.empty((len(texts), 81), dtype=np.uint8)
    for row, text in enumerate(texts):
        try:
            boards[row] = parse_board(text)
        except ValueError as error:
            raise ValueError(f"`path` {str(path)!r}, {place(row)}: {error}") from None
    return boards
