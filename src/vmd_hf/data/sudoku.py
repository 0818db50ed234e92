"""Sudoku: solver, generator, symmetries, readers, checks, tokenizer and dataset.

A board is a row of 81 numbers, row by row from the top left: 0 is an empty cell, 1 to 9 are digits. A batch of boards
is an integer array of shape (n, 81), uint8 where this file makes it. Messages count rows and columns from 1: r3c7 is
the cell in row 3, column 7. A puzzle is proper when it has exactly one solution.

Solver, generator and canonical form are compiled by numba: pip install vmd_hf[sudoku]. The rest works without it.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import permutations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, load_dataset, load_dataset_builder
from datasets.packaged_modules.csv.csv import CsvConfig
from numpy.typing import ArrayLike
from pyarrow import csv
from tokenizers import Regex, normalizers, pre_tokenizers
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .text import character_tokenizer

DIGITS = "123456789"
EMPTY_SYMBOLS = "0._*"
MIN_CLUES = 17  # no puzzle of 16 clues is proper (McGuire, Tugemann, Civario, arXiv 1201.0749)

_CELLS = np.arange(81)
_ROWS, _COLUMNS = _CELLS // 9, _CELLS % 9
_BOXES = 3 * (_ROWS // 3) + _COLUMNS // 3
_UNITS_OF_CELL = np.stack([_ROWS, 9 + _COLUMNS, 18 + _BOXES], axis=1)  # (81, 3) of 27: rows, columns, boxes
CELLS_OF_UNIT = np.concatenate([np.argsort(units, kind="stable") for units in (_ROWS, _COLUMNS, _BOXES)])
CELLS_OF_UNIT = CELLS_OF_UNIT.reshape(27, 9)
UNIT_NAMES = [f"{kind} {number}" for kind in ("row", "column", "box") for number in range(1, 10)]

_SYMBOLS = np.full(256, 255, dtype=np.uint8)
for _digit, _symbol in enumerate("0" + DIGITS):
    _SYMBOLS[ord(_symbol)] = _digit
_SYMBOLS[[ord(_symbol) for _symbol in EMPTY_SYMBOLS]] = 0

_PUZZLE_COLUMNS = ("puzzle", "puzzles", "quiz", "quizzes", "question", "text")
_SOLUTION_COLUMNS = ("solution", "solutions", "answer")
_FILE_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}

# Sets of digits are bit masks, bit d - 1 for digit d.
_ALL = 511
_MASKS = np.array([0] + [1 << bit for bit in range(9)], dtype=np.int16)  # of each digit
_BIT_COUNT = np.array([mask.bit_count() for mask in range(512)])
_LOWEST_DIGIT = np.array([(mask & -mask).bit_length() for mask in range(512)])

_LINE_ORDERS = np.array(  # (1296, 9): the orders of nine lines that keep three blocks of three together
    [
        [3 * block + line for block, lines in zip(blocks, within, strict=True) for line in lines]
        for blocks in permutations(range(3))
        for within in product(permutations(range(3)), repeat=3)
    ]
)

_GENERATOR_CHUNK = 256


class PuzzleTable(NamedTuple):
    """What a file or a dataset of n puzzles holds.

    Attributes:
        puzzles: (n, 81) uint8.
        solutions: (n, 81) uint8, or None if there are none.
        extras: the other columns by name, each an array of n entries: ratings, clue counts and the like.
    """

    puzzles: np.ndarray
    solutions: np.ndarray | None
    extras: dict[str, np.ndarray]


class Symmetries(NamedTuple):
    """One symmetry of the Sudoku rules for each of n boards, see `apply_symmetries`.

    Attributes:
        positions: (n, 81) int64: the cell of the old board that each cell of the new board is taken from.
        digits: (n, 10) uint8: the new digit for each old one; entry 0, the empty cell, is 0.
    """

    positions: np.ndarray
    digits: np.ndarray


# --- Text and checks ---------------------------------------------------------------------------------------------


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
                f"{symbol!r} as symbol {index + 1}, {_cell_name(index)}"
            )
    if len(symbols) != 81:
        raise ValueError(f"`text` must have 81 cells, got {len(symbols)}: {_shortened(text)!r}")
    return _SYMBOLS[np.frombuffer(symbols.encode(), dtype=np.uint8)]


def format_boards(boards: ArrayLike) -> list[str]:
    """Each of (n, 81) boards as 81 digits, "0" for an empty cell: `parse_board` the other way round."""
    return [key.decode() for key in _ascii(_as_boards(boards, "boards")).tolist()]


def check_boards(boards: ArrayLike) -> None:
    """Check that boards, complete or not, keep the rules: no digit twice in a row, column or box.

    It does not solve them; `solve_puzzles` tells whether there is a solution.

    Args:
        boards: (n, 81) integers, or (81,) for one board.

    Raises:
        ValueError: wrong shape or type, a number outside 0..9, or a digit that repeats. The message names the board
            (from 0), the cells and the rule.
    """
    _check_rules(_as_boards(np.atleast_2d(np.asarray(boards)), "boards"), "boards")


def check_solution(puzzles: ArrayLike, solutions: ArrayLike) -> None:
    """Check that solutions are complete boards that keep the rules and agree with the clues of their puzzles.

    Args:
        puzzles: (n, 81) integers, or (81,) for one puzzle.
        solutions: as many boards as `puzzles`.

    Raises:
        ValueError: as in `check_boards` for either of them, different numbers of boards, a solution with an empty
            cell, or one that contradicts a clue. The message names the board (from 0) and the cell.
    """
    puzzles = _as_boards(np.atleast_2d(np.asarray(puzzles)), "puzzles")
    solutions = _as_boards(np.atleast_2d(np.asarray(solutions)), "solutions")
    if len(puzzles) != len(solutions):
        raise ValueError(f"`solutions` must be as many as `puzzles`, got {len(solutions)} for {len(puzzles)}")
    _check_rules(puzzles, "puzzles")
    empty, wrong = solutions == 0, (puzzles != 0) & (puzzles != solutions)
    if empty.any():
        board, cell = _first(empty)
        raise ValueError(
            f"`solutions` must have no empty cell, got one at {_cell_name(cell)} of board {board} "
            f"({empty[board].sum()} in that board)"
        )
    if wrong.any():
        board, cell = _first(wrong)
        raise ValueError(
            f"`solutions` must agree with the clues of `puzzles`, got {solutions[board, cell]} at {_cell_name(cell)} "
            f"of board {board}, where the clue is {puzzles[board, cell]}"
        )
    _check_rules(solutions, "solutions")


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


# --- Solver and generator ----------------------------------------------------------------------------------------


def solve_puzzles(puzzles: ArrayLike, limit: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Solve puzzles and count their solutions, exactly, up to a limit.

    A depth-first search: cells and digits that have only one possibility are filled in (naked and hidden singles),
    else the cell with the fewest candidates is tried.

    Args:
        puzzles: (n, 81) integers in 0..9. A puzzle that breaks the rules has no solution.
        limit: where counting stops, at least 1. The default tells proper puzzles (1) from the others (0, 2).

    Returns:
        counts: (n,) int64 in 0..limit.
        solutions: (n, 81) uint8, the first solution found, zeros where there is none.

    Raises:
        ImportError: numba is not installed.
        ValueError: `limit` below 1, wrong shape or type of `puzzles`, a number outside 0..9.
    """
    if limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}")
    puzzles = _as_boards(puzzles, "puzzles")
    counts, solutions = np.zeros(len(puzzles), dtype=np.int64), np.zeros_like(puzzles)
    _solve_all(puzzles, limit, counts, solutions)
    return counts, solutions


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
    states = _stream_states(num_boards, "num_boards", seed, start)
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
    states = _stream_states(num_puzzles, "num_puzzles", seed, start)
    targets = np.empty(num_puzzles, dtype=np.int64)
    _draw_targets(states, lowest, highest, targets)
    puzzles = np.empty((num_puzzles, 81), dtype=np.uint8)
    solutions = np.empty((num_puzzles, 81), dtype=np.uint8)
    pending = np.arange(num_puzzles)
    while len(pending):
        missed = []
        for begin in range(0, len(pending), _GENERATOR_CHUNK):  # a keyboard interrupt is heard between chunks
            chunk = pending[begin : begin + _GENERATOR_CHUNK]
            missed.append(chunk[~_dig_all(chunk, states, targets, puzzles, solutions)])
        pending = np.concatenate(missed)
    return puzzles, solutions


# --- Symmetries --------------------------------------------------------------------------------------------------


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
    boards = _as_boards(boards, "boards")
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
    """Fills each board, and tries again those that break a rule: the rules tell a wrong board without its solution.

    The first attempt is at the puzzle itself, each further one at the puzzle under a fresh random symmetry, which a
    solver that knows no search meets as another puzzle.

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
    puzzles = _as_boards(puzzles, "puzzles")
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
    puzzles = _as_boards(puzzles, "puzzles")
    canonical = np.empty_like(puzzles)
    _canonicalise_all(puzzles, canonical)
    return _ascii(canonical)


# --- Readers -----------------------------------------------------------------------------------------------------


def read_puzzles(
    path: str | Path, puzzle_column: str | None = None, solution_column: str | None = None
) -> PuzzleTable:
    """Puzzles from a local file, CSV or one puzzle a line; which of the two, its first line tells.

    CSV has a header. Its puzzle column is called puzzle, puzzles, quiz, quizzes, question or text, and its solution
    column, if any, solution, solutions or answer, in upper or lower case, unless the arguments say otherwise. Without
    commas in the first line, each line is a puzzle as `parse_board` reads it; empty lines and those that begin with
    "#" are skipped.

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
        names = [name.strip().strip('"') for name in header.rstrip("\r\n").split(",")]
        columns = _find_columns(names, puzzle_column, solution_column, "path", path)
        as_text = csv.ConvertOptions(column_types={name: pa.string() for name in columns if name is not None})
        table = csv.read_csv(
            path, read_options=csv.ReadOptions(skip_rows=1, column_names=names), convert_options=as_text
        )
        return _puzzle_table(table, *columns, "path", path)
    if puzzle_column is not None or solution_column is not None:
        raise ValueError(
            f"`puzzle_column` and `solution_column` must be None unless `path` is a CSV file with a header, got "
            f"{puzzle_column!r} and {solution_column!r} with the first line {_shortened(header)!r} of {str(path)!r}"
        )
    with open(path, encoding="utf-8-sig") as file:
        lines = {number: line.strip() for number, line in enumerate(file, start=1)}
    lines = {number: line for number, line in lines.items() if line and not line.startswith("#")}
    places = [f"`path` {str(path)!r}, line {number}" for number in lines]
    puzzles = _parse_all(list(lines.values()), places.__getitem__)
    if len(puzzles) == 0:
        raise ValueError(f"`path` must hold at least one puzzle, got none in {str(path)!r}")
    _check_rules(puzzles, "path")
    return PuzzleTable(puzzles, None, {})


def load_puzzles(
    name: str | Path,
    split: str = "train",
    config_name: str | None = None,
    puzzle_column: str | None = None,
    solution_column: str | None = None,
) -> PuzzleTable:
    """Puzzles from a dataset on the Hub, or from a local file or folder, read by `datasets.load_dataset`.

    Args:
        name: id of a dataset on the Hub, a local folder, or a local file ending in .csv, .json, .jsonl, .parquet or
            .txt. Boards are text as `parse_board` reads it, or lists of 81 or of 9 times 9 numbers.
        split: "train" (what a single local file is), "test[:1000]" and so on.
        config_name: configuration of the dataset.
        puzzle_column: as in `read_puzzles`.
        solution_column: as in `read_puzzles`.

    Raises:
        FileNotFoundError: nothing that `datasets.load_dataset` finds.
        ValueError: as in `read_puzzles`, or a file of another type.
    """
    source: dict[str, Any] = {"path": str(name), "name": config_name}
    if Path(name).is_file():
        if Path(name).suffix not in _FILE_BUILDERS:
            raise ValueError(
                f"`name` must be a folder, a dataset id or a file {tuple(_FILE_BUILDERS)}, got {str(name)!r}"
            )
        source = {"path": _FILE_BUILDERS[Path(name).suffix], "data_files": str(name)}
    if isinstance(load_dataset_builder(**source).config, CsvConfig):
        # Else 81 digits would be read as a number and rounded.
        given = [column for column in (puzzle_column, solution_column) if column is not None]
        source["converters"] = dict.fromkeys([*_PUZZLE_COLUMNS, *_SOLUTION_COLUMNS, *given], str)
    table = load_dataset(**source, split=split).with_format("arrow")[:]
    columns = _find_columns(table.column_names, puzzle_column, solution_column, "name", name)
    return _puzzle_table(table, *columns, "name", name)


# --- Tokenizer and dataset ---------------------------------------------------------------------------------------


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
    return [_ROWS.tolist(), _COLUMNS.tolist(), _BOXES.tolist()]


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


# --- Helpers -----------------------------------------------------------------------------------------------------


def _as_boards(boards: ArrayLike, name: str, any_number: bool = False) -> np.ndarray:
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
            f"{_cell_name(cell)} of board {board}"
        )
    return np.ascontiguousarray(boards, dtype=np.uint8)


def _check_rules(boards: np.ndarray, name: str) -> None:
    masks = _MASKS[boards]  # (n, 81)
    # A sum of bits differs from their union if and only if one of them occurs twice.
    repeats = [masks[:, unit].sum(axis=1) != np.bitwise_or.reduce(masks[:, unit], axis=1) for unit in CELLS_OF_UNIT]
    repeats = np.stack(repeats, axis=1)  # (n, 27)
    if not repeats.any():
        return
    board, unit = _first(repeats)
    digits = boards[board, CELLS_OF_UNIT[unit]].tolist()
    digit = next(digit for digit in digits if digit and digits.count(digit) > 1)
    cells = [_cell_name(cell) for cell in CELLS_OF_UNIT[unit] if boards[board, cell] == digit]
    number = {2: "two", 3: "three"}.get(len(cells), str(len(cells)))
    raise ValueError(
        f"`{name}` must not repeat a digit in a row, column or box, got {number} {digit}s in {UNIT_NAMES[unit]} of "
        f"board {board}: cells {', '.join(cells[:-1])} and {cells[-1]}"
    )


def _complete_units(boards: ArrayLike) -> np.ndarray:
    """(n, 27) bool: which rows, columns and boxes hold each digit once."""
    boards = _as_boards(boards, "boards", any_number=True)
    masks = _MASKS[boards]  # (n, 81)
    return np.stack([np.bitwise_or.reduce(masks[:, unit], axis=1) == _ALL for unit in CELLS_OF_UNIT], axis=1)


def _first(where: np.ndarray) -> tuple[int, int]:
    row, column = np.argwhere(where)[0].tolist()
    return row, column


def _cell_name(cell: int) -> str:
    return f"r{cell // 9 + 1}c{cell % 9 + 1}"


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else text[:100] + "..."


def _ascii(boards: np.ndarray) -> np.ndarray:
    """(n, 81) uint8 as (n,) strings of bytes."""
    return (boards + np.uint8(ord("0"))).view("S81")[:, 0]


def _line_orders(noise: np.ndarray) -> np.ndarray:
    """(n, 9) orders of nine lines that keep three blocks of three together, from (n, 12) independent noise."""
    blocks = noise[:, :3].argsort(axis=1)[:, :, None]  # (n, 3, 1)
    within = noise[:, 3:].reshape(-1, 3, 3).argsort(axis=2)  # (n, 3, 3)
    return (3 * blocks + within).reshape(-1, 9)


def _stream_states(num_boards: int, name: str, seed: int, start: int) -> np.ndarray:
    """(num_boards,) uint64: the state that the random numbers of each board begin with."""
    for argument, value, lowest in ((name, num_boards, 1), ("seed", seed, 0), ("start", start, 0)):
        if value < lowest:
            raise ValueError(f"`{argument}` must be {lowest} or more, got {value}")
    states = np.arange(start, start + num_boards, dtype=np.uint64)
    _start_streams(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0], states)
    return states


def _digit_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """(10,) int64: the id of each digit, of the mask for an empty cell."""
    return np.array(tokenizer.convert_tokens_to_ids([tokenizer.mask_token, *DIGITS]), dtype=np.int64)


def _find_columns(
    names: Sequence[str], puzzle_column: str | None, solution_column: str | None, argument: str, source: str | Path
) -> tuple[str, str | None]:
    for parameter, column in (("puzzle_column", puzzle_column), ("solution_column", solution_column)):
        if column is not None and column not in names:
            raise ValueError(f"`{parameter}` must be a column of {str(source)!r}, got {column!r} for {list(names)}")
    by_lower_case = {name.lower(): name for name in names}
    if puzzle_column is None:
        puzzle_column = next((by_lower_case[name] for name in _PUZZLE_COLUMNS if name in by_lower_case), None)
    if solution_column is None:
        solution_column = next((by_lower_case[name] for name in _SOLUTION_COLUMNS if name in by_lower_case), None)
    if puzzle_column is None:
        raise ValueError(
            f"`{argument}` must have a column with the puzzles: one of {_PUZZLE_COLUMNS}, or name it in "
            f"`puzzle_column`; got {list(names)} in {str(source)!r}"
        )
    return puzzle_column, solution_column


def _puzzle_table(
    table: pa.Table, puzzle_column: str, solution_column: str | None, argument: str, source: str | Path
) -> PuzzleTable:
    if table.num_rows == 0:
        raise ValueError(f"`{argument}` must hold at least one puzzle, got none in {str(source)!r}")
    boards = {}
    for name in (puzzle_column, solution_column):
        if name is not None:
            column = table[name]
            place = f"`{argument}` {str(source)!r}, column {name!r}"
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                boards[name] = _parse_all(column.to_pylist(), lambda row, place=place: f"{place}, row {row}")
            elif pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
                boards[name] = _as_boards(np.array(column.to_pylist()).reshape(len(column), -1), name)
            else:
                raise ValueError(f"{place} must hold text or lists of 81 numbers, got {column.type}")
    puzzles, solutions = boards[puzzle_column], boards.get(solution_column)
    if solutions is None:
        _check_rules(puzzles, puzzle_column)
    else:
        check_solution(puzzles, solutions)
    extras = {name: table[name].to_numpy() for name in table.column_names if name not in boards}
    return PuzzleTable(puzzles, solutions, extras)


def _parse_all(texts: list[str], place: Callable[[int], str]) -> np.ndarray:
    """(n, 81) boards from n texts; `place` says for messages where a text stands."""
    if None in texts:
        raise ValueError(f"{place(texts.index(None))} must hold a board, got null")
    joined = "".join(texts)
    if joined.isascii() and all(len(text) == 81 for text in texts):  # a million at a time, not one by one
        boards = _SYMBOLS[np.frombuffer(joined.encode(), dtype=np.uint8)].reshape(-1, 81)
        if (boards <= 9).all():
            return boards
    boards = np.empty((len(texts), 81), dtype=np.uint8)
    for row, text in enumerate(texts):
        try:
            boards[row] = parse_board(text)
        except ValueError as error:
            raise ValueError(f"{place(row)}: {error}") from None
    return boards


# --- Compiled ----------------------------------------------------------------------------------------------------

# Numba compiles a kernel once more for each literal that it is called with; `np.int64(1)` is none.


class _Kernel:
    """A function that numba compiles when it is first called, so that importing this file does not need numba.

    Other kernels may call it: numba asks a global for its `_numba_type_`.
    """

    def __init__(self, function: Callable):
        self._function = function

    @cached_property
    def _compiled(self) -> Callable:
        try:
            from numba import njit
        except ImportError as error:
            raise ImportError(
                "Sudoku's solver, generator and canonical form need the package numba: pip install vmd_hf[sudoku]"
            ) from error
        try:
            return njit(cache=True, nogil=True)(self._function)
        except (
            RuntimeError
        ):  # no place to keep the compiled code in: neither this folder nor the user's can be written
            return njit(nogil=True)(self._function)

    @property
    def _numba_type_(self):
        return self._compiled._numba_type_

    def __call__(self, *args):
        return self._compiled(*args)


@_Kernel
def _mix(value):
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection that scatters 64 bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@_Kernel
def _random_below(state, bound):
    """A random integer in 0..bound - 1 by SplitMix64, whose state is the only entry of `state`."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    return np.int64(((_mix(state[0]) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@_Kernel
def _shuffle(items, state):
    for last in range(len(items) - 1, 0, -1):
        other = _random_below(state, last + 1)
        items[last], items[other] = items[other], items[last]


@_Kernel
def _start_streams(seed, states):
    for index in range(len(states)):
        states[index] = _mix(seed ^ _mix(states[index] + np.uint64(1)))


@_Kernel
def _draw_targets(states, lowest, highest, targets):
    for index in range(len(states)):
        targets[index] = lowest + _random_below(states[index : index + 1], highest - lowest + 1)


@_Kernel
def _set(board, used, cell, digit):
    board[cell] = digit
    for kind in range(3):
        used[_UNITS_OF_CELL[cell, kind]] |= 1 << (digit - 1)


@_Kernel
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
            mask = _ALL & ~(used[row] | used[column] | used[box] | forbidden[cell])
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
                seen[1, unit] |= seen[0, unit] & mask  # digits with two places or more
                seen[0, unit] |= mask
        if num_set > before:
            continue

        for unit in range(27):
            if used[unit] | seen[0, unit] != _ALL:
                return num_set, -1
            seen[0, unit] &= ~seen[1, unit]  # digits with one place
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


@_Kernel
def _search(clues, forbidden, limit, solution, state):
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
        _shuffle(order, state)
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
            for _ in range(_random_below(state, _BIT_COUNT[mask])):
                mask &= mask - 1
        digit = _LOWEST_DIGIT[mask]
        branch_mask[depth - 1] &= ~(1 << (digit - 1))
        index = num_set
        while order[index] != cell:
            index += 1
        _set(board, used, cell, digit)
        order[index], order[num_set] = order[num_set], cell
        num_set += 1


@_Kernel
def _solve_all(puzzles, limit, counts, solutions):
    forbidden, no_state = np.zeros(81, dtype=np.int64), np.zeros(0, dtype=np.uint64)
    for index in range(len(puzzles)):
        counts[index] = _search(puzzles[index], forbidden, limit, solutions[index], no_state)


@_Kernel
def _fill_all(states, boards):
    forbidden, empty = np.zeros(81, dtype=np.int64), np.zeros(81, dtype=np.uint8)
    for index in range(len(boards)):
        _search(empty, forbidden, np.int64(1), boards[index], states[index : index + 1])


@_Kernel
def _dig_all(indices, states, targets, puzzles, solutions):
    """Try one new board for each of the puzzles `indices`; (len(indices),) bool says where the target was reached."""
    forbidden, empty = np.zeros(81, dtype=np.int64), np.zeros(81, dtype=np.uint8)
    reached = np.zeros(len(indices), dtype=np.bool_)
    other, no_state = np.empty(81, dtype=np.uint8), np.zeros(0, dtype=np.uint64)
    for number, index in enumerate(indices):
        state, puzzle, target = states[index : index + 1], puzzles[index], targets[index]
        _search(empty, forbidden, np.int64(1), solutions[index], state)
        puzzle[:] = solutions[index]
        cells = np.arange(81)
        _shuffle(cells, state)
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
            if _search(puzzle, forbidden, np.int64(1), other, no_state):
                puzzle[cell] = digit
            else:
                num_clues -= 1
            forbidden[cell] = 0
        reached[number] = num_clues == target
    return reached


@_Kernel
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
        cells[cell] = _mix(np.uint64(1 if board[cell] else 2))
    for _ in range(3):
        digits[:] = 0
        boxes[:] = 0
        for cell in range(81):
            digits[board[cell]] += cells[cell]
        for cell in range(81):
            cells[cell] = _mix(cells[cell] + weight * _mix(digits[board[cell]]))
            boxes[_BOXES[cell]] += cells[cell]
        for line in range(18):
            lines[line] = 0
            for part in range(3):
                minimal = np.uint64(0)
                for position in range(3 * part, 3 * part + 3):
                    minimal += cells[9 * line + position if line < 9 else 9 * position + line - 9]
                lines[line] += _mix(minimal)
            lines[line] = _mix(lines[line])
        for block in range(0, 18, 3):
            total = weight * _mix(lines[block] + lines[block + 1] + lines[block + 2])
            for line in range(block, block + 3):
                lines[line] = _mix(lines[line] + total)
        for cell in range(81):
            row, column = cell // 9, cell % 9
            cells[cell] = _mix(_mix(lines[row] + lines[9 + column]) + weight * (boxes[_BOXES[cell]] + cells[cell]))
    return lines


@_Kernel
def _compare(first, second):
    """-1, 0 or 1: how two arrays of the same length compare, entry by entry."""
    for index in range(len(first)):
        if first[index] != second[index]:
            return -1 if first[index] < second[index] else 1
    return 0


@_Kernel
def _sorted_blocks(hashes):
    """(3, 3): the hashes of nine lines, sorted within each block."""
    blocks = hashes.copy().reshape(3, 3)
    for block in range(3):
        for first, second in ((0, 1), (1, 2), (0, 1)):
            if blocks[block, first] > blocks[block, second]:
                blocks[block, first], blocks[block, second] = blocks[block, second], blocks[block, first]
    return blocks


@_Kernel
def _least_order(hashes):
    """(3, 3): the least sequence that the hashes of nine lines form in any order that keeps the blocks together."""
    blocks = _sorted_blocks(hashes)
    for first, second in ((0, 1), (1, 2), (0, 1)):
        if _compare(blocks[first], blocks[second]) > 0:
            for line in range(3):
                blocks[first, line], blocks[second, line] = blocks[second, line], blocks[first, line]
    return blocks


@_Kernel
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


@_Kernel
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


@_Kernel
def _canonicalise_all(puzzles, canonical):
    for index in range(len(puzzles)):
        _canonicalise(puzzles[index], canonical[index])
