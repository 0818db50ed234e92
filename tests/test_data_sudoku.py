import importlib
import pickle
import sys
from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import vmd_hf.data
from vmd_hf.data.sudoku import (
    SudokuCollator,
    apply_symmetries,
    canonical_keys,
    check_boards,
    check_solution,
    fill_by_attempts,
    format_boards,
    generate_puzzles,
    group_validity,
    inverse_symmetries,
    parse_board,
    puzzle_dataset,
    random_boards,
    random_symmetries,
    read_puzzles,
    solve_puzzles,
    sudoku_position_groups,
    sudoku_tokenizer,
    valid_boards,
)
from vmd_hf.data.sudoku.compiled import Kernel

PUZZLE = """
    53..7.... 6..195... .98....6.
    8...6...3 4..8.3..1 7...2...6
    .6....28. ...419..5 ....8..79
"""
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
CLUES_17 = "000000010400000000020000000000050407008000300001090000300400200050100000000806000"

LINE_ORDERS = [
    [3 * block + line for block, lines in zip(blocks, within, strict=True) for line in lines]
    for blocks in permutations(range(3))
    for within in product(permutations(range(3)), repeat=3)
]


@pytest.fixture(scope="module")
def generated():
    return generate_puzzles(40, (26, 40), seed=1)


def cell(name):
    """r3c7 -> the index of that cell."""
    return 9 * int(name[1]) + int(name[3]) - 10


def changed(board, **cells):
    board = board.copy()
    for name, digit in cells.items():
        board[cell(name)] = digit
    return board


def groups(board):
    """The contents of the nine rows, the nine columns and the nine boxes, written with slices."""
    grid = [list(board[9 * row : 9 * row + 9]) for row in range(9)]
    columns = [[row[column] for row in grid] for column in range(9)]
    boxes = [
        grid[row][column : column + 3] + grid[row + 1][column : column + 3] + grid[row + 2][column : column + 3]
        for row in (0, 3, 6)
        for column in (0, 3, 6)
    ]
    return grid, columns, boxes


def brute_force(board, limit):
    """Solutions found by trying each digit that fits, in the cell where the fewest do."""
    board = list(map(int, board))
    rows, columns, boxes = groups(board)
    fewest, best = None, None
    for index in range(81):
        if board[index] == 0:
            row, column = divmod(index, 9)
            taken = {*rows[row], *columns[column], *boxes[row // 3 * 3 + column // 3]}
            if fewest is None or 9 - len(taken - {0}) < len(fewest):
                fewest, best = set(range(1, 10)) - taken, index
    if best is None:
        return [board]
    found = []
    for digit in sorted(fewest):
        found += brute_force([*board[:best], digit, *board[best + 1 :]], limit - len(found))
        if len(found) >= limit:
            break
    return found


def symmetric(first, second):
    """Whether a symmetry takes one board into the other: for each order of columns, rows are matched one by one."""
    target = second.reshape(9, 9).tolist()

    def matched(grid, columns, rows, labels):
        if len(rows) == 9:
            return True
        for row in set(range(9)) - set(rows):
            if len(rows) % 3 and row // 3 != rows[-1] // 3:
                continue
            extended = dict(labels)
            pairs = zip([grid[row][column] for column in columns], target[len(rows)], strict=True)
            fits = all(extended.setdefault(old, new) == new for old, new in pairs)
            if fits and len(set(extended.values())) == len(extended):
                if matched(grid, columns, [*rows, row], extended):
                    return True
        return False

    grids = (first.reshape(9, 9).tolist(), first.reshape(9, 9).T.tolist())
    return any(matched(grid, columns, [], {0: 0}) for grid in grids for columns in LINE_ORDERS)


# Text and checks


def test_parse_board():
    board = parse_board(PUZZLE)
    assert board.dtype == np.uint8 and board.shape == (81,)
    assert board[:9].tolist() == [5, 3, 0, 0, 7, 0, 0, 0, 0]
    assert board[-9:].tolist() == [0, 0, 0, 0, 8, 0, 0, 7, 9]
    text = "".join(PUZZLE.split())
    for symbol in "0_*":
        assert np.array_equal(parse_board(text.replace(".", symbol)), board)
    assert format_boards(board[None]) == [text.replace(".", "0")]


@pytest.mark.parametrize(
    "text, message",
    [
        (SOLUTION[:-1], "`text` must have 81 cells, got 80"),
        (SOLUTION + "0", "`text` must have 81 cells, got 82"),
        (SOLUTION[:11] + "x" + SOLUTION[12:], "got 'x' as symbol 12, r2c3"),
        (SOLUTION[:80] + "²", "got '²' as symbol 81, r9c9"),
    ],
)
def test_parse_board_rejects(text, message):
    with pytest.raises(ValueError, match=message):
        parse_board(text)


@pytest.mark.parametrize(
    "cells, message",
    [
        ({"r3c1": 5, "r3c7": 5}, "got two 5s in row 3 of board 1: cells r3c1 and r3c7"),
        ({"r1c9": 2, "r8c9": 2}, "got two 2s in column 9 of board 1: cells r1c9 and r8c9"),
        ({"r4c4": 9, "r6c5": 9}, "got two 9s in box 5 of board 1: cells r4c4 and r6c5"),
        ({"r9c1": 1, "r9c4": 1, "r9c9": 1}, "got three 1s in row 9 of board 1: cells r9c1, r9c4 and r9c9"),
        ({"r2c2": 1, "r2c3": 2, "r2c4": 1}, "got two 1s in row 2 of board 1: cells r2c2 and r2c4"),
    ],
)
def test_check_boards_names_the_cells_and_the_rule(cells, message):
    empty = np.zeros(81, dtype=np.int8)
    with pytest.raises(ValueError, match=message):
        check_boards(np.stack([empty, changed(empty, **cells)]))


@pytest.mark.parametrize(
    "boards, message",
    [
        (np.zeros((2, 80), dtype=int), r"`boards` must be integers of shape \(n, 81\), got int64 of shape \(2, 80\)"),
        (np.zeros((2, 81)), r"`boards` must be integers .* got float64"),
        (np.full(81, 10), "`boards` must hold 0 .* digits from 1 to 9, got 10 at r1c1 of board 0"),
        (np.full((1, 81), -1), "got -1 at r1c1 of board 0"),
    ],
)
def test_check_boards_rejects(boards, message):
    with pytest.raises(ValueError, match=message):
        check_boards(boards)


def test_checks_accept_what_is_right(generated):
    check_boards(parse_board(PUZZLE))
    check_boards(generated[0])
    check_solution(parse_board(PUZZLE), parse_board(SOLUTION))
    check_solution(*map(torch.from_numpy, generated))


@pytest.mark.parametrize(
    "cells, message",
    [
        ({"r1c1": 4}, "must agree with the clues of `puzzles`, got 4 at r1c1 of board 0, where the clue is 5"),
        ({"r1c4": 0, "r9c1": 0}, r"must have no empty cell, got one at r1c4 of board 0 \(2 in that board\)"),
        ({"r1c3": 6}, "`solutions` must not repeat a digit .* got two 6s in row 1 of board 0: cells r1c3 and r1c4"),
    ],
)
def test_check_solution_rejects(cells, message):
    with pytest.raises(ValueError, match=message):
        check_solution(parse_board(PUZZLE), changed(parse_board(SOLUTION), **cells))


def test_check_solution_rejects_bad_puzzles_and_numbers():
    solution = parse_board(SOLUTION)
    with pytest.raises(ValueError, match=r"`puzzles` must not repeat a digit .* got two 5s in row 1"):
        check_solution(changed(parse_board(PUZZLE), r1c9=5), solution)
    with pytest.raises(ValueError, match="`solutions` must be as many as `puzzles`, got 1 for 2"):
        check_solution(np.stack([solution, solution]), solution)


def test_validity_by_hand():
    solution = parse_board(SOLUTION).astype(int)
    boards = np.stack(
        [
            solution,
            changed(solution, r1c1=0),  # row 1, column 1, box 1
            changed(solution, r1c1=3, r1c2=5),  # exchanged: columns 1 and 2
            changed(solution, r1c1=6, r2c1=5),  # exchanged: rows 1 and 2
            changed(solution, r5c5=12, r9c9=-100),  # a mask and a label left over: two of each
            np.zeros(81, dtype=int),
        ]
    )
    expected = [[9, 9, 9], [8, 8, 8], [9, 7, 9], [7, 9, 9], [7, 7, 7], [0, 0, 0]]
    np.testing.assert_allclose(group_validity(boards), np.array(expected) / 9)
    assert valid_boards(torch.from_numpy(boards)).tolist() == [True] + 5 * [False]


# Solver and generator


def test_known_puzzle():
    counts, solutions = solve_puzzles(parse_board(PUZZLE)[None])
    assert counts.tolist() == [1]
    assert format_boards(solutions) == [SOLUTION]
    counts, solutions = solve_puzzles(parse_board(CLUES_17)[None])
    assert counts.tolist() == [1]
    check_solution(parse_board(CLUES_17), solutions[0])


def test_number_of_solutions():
    solution = parse_board(SOLUTION)
    one_rectangle = changed(solution, r4c6=0, r4c9=0, r5c6=0, r5c9=0)  # 1 and 3 can change places: 2 solutions
    two_rectangles = changed(one_rectangle, r2c8=0, r2c9=0, r7c8=0, r7c9=0)  # so can 4 and 8: 4 solutions
    bottom = solution.copy()
    bottom[-27:] = 0
    puzzles = np.stack([solution, one_rectangle, two_rectangles, bottom])
    expected = [1, 2, 4, len(brute_force(bottom, 10**6))]
    assert expected[3] > 12
    for limit in (1, 2, 3, 10**6):
        counts, solutions = solve_puzzles(puzzles, limit)
        assert counts.tolist() == [min(count, limit) for count in expected]
        check_solution(puzzles, solutions)
    assert solve_puzzles(np.zeros((1, 81), dtype=int), limit=500)[0].tolist() == [500]


def test_no_solution():
    solution = parse_board(SOLUTION)
    impossible = changed(np.zeros(81, dtype=int), r1c1=1, r1c2=2, r1c3=3, r2c4=4, r3c7=4)  # 4 only fits outside row 1
    impossible = changed(impossible, r1c4=5, r1c5=6, r1c6=7, r1c7=8, r1c8=9)
    conflicting = changed(solution, r1c1=3)
    wrong_clue = changed(parse_board(PUZZLE), r1c3=2)  # keeps the rules, but the solution has 4
    # Here the last cells to be filled are hidden singles of two units that want the same digit in one box.
    clash = parse_board("730081052000760980008003700100009027007200000000600100006598210095124006400306590")
    counts, solutions = solve_puzzles(np.stack([impossible, conflicting, wrong_clue, clash]))
    assert counts.tolist() == [0, 0, len(brute_force(wrong_clue, 2)), len(brute_force(clash, 2))] == [0, 0, 0, 0]
    assert not solutions.any()
    with pytest.raises(ValueError, match="`limit` must be at least 1, got 0"):
        solve_puzzles(solution[None], limit=0)


def test_counts_agree_with_brute_force():
    # A clue less, and in every other puzzle a clue that is wrong: no solution, or one, or several.
    puzzles = generate_puzzles(150, 30, seed=2)[0]
    for index, puzzle in enumerate(puzzles):
        first, second = np.flatnonzero(puzzle)[[index % 30, (index + 7) % 30]]
        puzzle[first] = 0
        if index % 2:
            row, column = divmod(second, 9)
            rows, columns, boxes = groups(puzzle)
            possible = set(range(1, 10)) - {*rows[row], *columns[column], *boxes[row // 3 * 3 + column // 3]}
            puzzle[second] = max(possible, default=0)
    counts, solutions = solve_puzzles(puzzles, limit=4)
    assert counts.tolist() == [len(brute_force(puzzle, 4)) for puzzle in puzzles]
    assert {0, 1, 2, 4} <= set(counts.tolist())
    check_solution(puzzles[counts > 0], solutions[counts > 0])


def test_random_boards():
    boards = random_boards(300, seed=0)
    assert valid_boards(boards).all()
    assert len(np.unique(boards, axis=0)) == 300
    # Each digit falls on a cell with probability 1/9: 33.3 times, with a standard deviation of 5.4.
    counts = (boards[:, :, None] == np.arange(1, 10)).sum(axis=0)
    assert 7 < counts.min() and counts.max() < 66
    assert len(np.unique(canonical_keys(boards[:20]))) == 20  # no two are shuffles of one another


def test_boards_depend_on_seed_and_number_alone():
    boards = random_boards(10, seed=5)
    assert np.array_equal(np.concatenate([random_boards(4, seed=5), random_boards(6, seed=5, start=4)]), boards)
    assert not (random_boards(10, seed=6) == boards).all(axis=1).any()
    puzzles, solutions = generate_puzzles(300, (24, 40), seed=5)
    for again, whole in zip(generate_puzzles(20, (24, 40), seed=5, start=250), (puzzles, solutions), strict=True):
        assert np.array_equal(again, whole[250:270])


def test_generated_puzzles_have_one_solution_by_brute_force(generated):
    puzzles, solutions = generated
    check_solution(puzzles, solutions)
    order = np.argsort(-(puzzles != 0).sum(axis=1))  # brute force takes its time where there are few clues
    for index in order[:15]:
        assert brute_force(puzzles[index], 2) == [solutions[index].tolist()]
    assert (solve_puzzles(puzzles)[0] == 1).all()


def test_clue_counts(generated):
    for clues in (24, 34, 81):
        puzzles, _ = generate_puzzles(20, clues, seed=0)
        assert ((puzzles != 0).sum(axis=1) == clues).all()
    puzzles, _ = generate_puzzles(600, (30, 32), seed=0)
    counts = np.bincount((puzzles != 0).sum(axis=1), minlength=82)
    assert counts.sum() == counts[30:33].sum()
    assert (abs(counts[30:33] - 200) < 5 * (600 * 1 / 3 * 2 / 3) ** 0.5).all()
    # Which cells are emptied is random: with 34 of 81 clues, each is kept in 252 of 600 puzzles.
    puzzles, _ = generate_puzzles(600, 34, seed=0)
    kept = (puzzles != 0).sum(axis=0)
    assert (abs(kept - 600 * 34 / 81) < 5 * (600 * 34 / 81 * 47 / 81) ** 0.5).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 30, 0), "`num_puzzles` must be 1 or more, got 0"),
        ((1, 16, 0), r"`clues` must be .* in 17\.\.81, .* got 16"),
        ((1, (30, 82), 0), r"`clues` must be .* got \(30, 82\)"),
        ((1, (34, 30), 0), r"`clues` must be .* got \(34, 30\)"),
        ((1, 30, -1), "`seed` must be 0 or more, got -1"),
        ((1, 30, 0, -1), "`start` must be 0 or more, got -1"),
    ],
)
def test_generate_puzzles_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_puzzles(*arguments)


# Symmetries


@pytest.mark.parametrize("generators", [np.random.default_rng, lambda seed: torch.Generator().manual_seed(seed)])
def test_symmetries_take_solutions_into_solutions(generated, generators):
    puzzles, solutions = (np.repeat(boards, 5, axis=0) for boards in generated)
    symmetries = random_symmetries(200, generators(0))
    new_puzzles, new_solutions = apply_symmetries(puzzles, symmetries), apply_symmetries(solutions, symmetries)
    assert ((new_puzzles != 0).sum(axis=1) == (puzzles != 0).sum(axis=1)).all()
    assert not (new_puzzles == puzzles).all(axis=1).any()
    check_solution(new_puzzles, new_solutions)
    counts, solved = solve_puzzles(new_puzzles)
    assert (counts == 1).all() and np.array_equal(solved, new_solutions)
    assert np.array_equal(apply_symmetries(new_puzzles, inverse_symmetries(symmetries)), puzzles)
    for again, first in zip(random_symmetries(200, generators(0)), symmetries, strict=True):
        assert np.array_equal(again, first)


def test_symmetries_are_drawn_from_the_whole_group():
    num_draws = 40_000
    positions, digits = random_symmetries(num_draws, np.random.default_rng(0))
    five_deviations = 5 * (num_draws / 81) ** 0.5
    # Any cell comes from any cell, and any digit goes to any digit, with equal probability.
    for new_cell in (0, 40, 79):
        assert (abs(np.bincount(positions[:, new_cell], minlength=81) - num_draws / 81) < five_deviations).all()
    table = np.stack([np.bincount(digits[:, digit], minlength=10) for digit in range(1, 10)])
    assert (table[:, 0] == 0).all() and (digits[:, 0] == 0).all()
    assert (abs(table[:, 1:] - num_draws / 9) < 5 * (num_draws / 9) ** 0.5).all()
    # Half are transposed: the first row is then taken from a column.
    transposed = positions[:, 1] % 9 == positions[:, 0] % 9
    assert abs(transposed.mean() - 0.5) < 5 * 0.5 / num_draws**0.5
    rows = np.where(transposed[:, None], positions[:, :9] // 9, positions[:, :9] % 9)
    assert len(np.unique(rows, axis=0)) == 1296
    assert set(map(tuple, np.unique(rows, axis=0).tolist())) == set(map(tuple, LINE_ORDERS))


def test_symmetries_reject():
    with pytest.raises(ValueError, match="`generator` must be a numpy or a torch Generator, got int"):
        random_symmetries(3, 0)
    with pytest.raises(ValueError, match="`symmetries` must be one a board, got 3 for 2 boards"):
        apply_symmetries(np.zeros((2, 81), dtype=int), random_symmetries(3, np.random.default_rng(0)))


def test_keys_are_those_of_the_class(generated):
    boards = np.concatenate([generated[0], generated[1][:5], parse_board(PUZZLE)[None], parse_board(CLUES_17)[None]])
    keys = canonical_keys(boards)
    assert len(set(keys.tolist())) == len(boards)
    generator = np.random.default_rng(0)
    for _ in range(10):
        assert np.array_equal(
            canonical_keys(apply_symmetries(boards, random_symmetries(len(boards), generator))), keys
        )


def test_keys_of_boards_with_many_symmetries():
    rows, columns = np.divmod(np.arange(81), 9)
    cyclic = (3 * rows + rows // 3 + columns) % 9 + 1
    diagonal_boxes = np.where(rows // 3 == columns // 3, cyclic, 0)
    assert valid_boards(cyclic[None]).all()
    boards = np.stack([cyclic, diagonal_boxes])
    keys = canonical_keys(boards)
    symmetries = random_symmetries(2, np.random.default_rng(0))
    assert np.array_equal(canonical_keys(apply_symmetries(boards, symmetries)), keys)
    # One clue goes to any cell. Two clues share a box and a line, a box, a line, a band or stack only, or nothing; in
    # the last two cases their digits can be equal as well.
    singles = np.eye(81, dtype=int)
    assert len(np.unique(canonical_keys(singles))) == 1
    different = 7 * singles[40] + 8 * np.delete(singles, 40, axis=0)
    equal = 7 * singles[40] + 7 * np.delete(singles, 40, axis=0)
    equal = equal[[all(group.count(7) < 2 for part in groups(board) for group in part) for board in equal]]
    assert len(equal) == 80 - 20  # a cell has 20 peers
    assert len(np.unique(canonical_keys(different))) == 5
    assert len(np.unique(canonical_keys(equal))) == 2
    assert len(np.unique(canonical_keys(np.concatenate([different, equal])))) == 7


def test_keys_agree_with_a_search_for_the_symmetry(generated):
    # A key spells out a puzzle of its own class.
    puzzles = generated[0][:3]
    for puzzle, key in zip(puzzles, canonical_keys(puzzles).tolist(), strict=True):
        assert symmetric(puzzle, parse_board(key.decode()))
    # Near misses: one clue less each, on a pattern with symmetries, so that some are symmetric and others are not.
    rows, columns = np.divmod(np.arange(81), 9)
    pattern = np.where(rows // 3 == columns // 3, (3 * rows + rows // 3 + columns) % 9 + 1, 0)
    boards = [np.where(np.arange(81) == index, 0, pattern) for index in np.flatnonzero(pattern)[[0, 1, 2, 9, 13, 20]]]
    boards += [changed(boards[0], r1c4=4), changed(boards[0], r1c4=9), changed(boards[0], r4c1=4)]
    keys = canonical_keys(np.stack(boards))
    equal = [symmetric(boards[0], board) for board in boards]
    assert (keys == keys[0]).tolist() == equal
    assert any(equal[1:]) and not all(equal)


# Readers


@pytest.fixture
def table(generated):
    puzzles, solutions = generated
    return format_boards(puzzles), format_boards(solutions), puzzles, solutions


@pytest.mark.parametrize("header", ["quizzes,solutions,rating,source", 'Puzzle, "Solution",rating,source'])
def test_read_csv(tmp_path, table, header):
    *texts, puzzles, solutions = table
    rows = [f"{puzzle},{solution},{row / 2},kaggle" for row, (puzzle, solution) in enumerate(zip(*texts, strict=True))]
    path = tmp_path / "puzzles.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
    result = read_puzzles(path)
    assert result.puzzles.dtype == result.solutions.dtype == np.uint8
    assert np.array_equal(result.puzzles, puzzles) and np.array_equal(result.solutions, solutions)
    assert list(result.extras) == ["rating", "source"]
    assert result.extras["rating"].tolist() == [row / 2 for row in range(len(puzzles))]
    assert set(result.extras["source"].tolist()) == {"kaggle"}


def test_read_lines(tmp_path, table):
    puzzle_texts, _, puzzles, _ = table
    path = tmp_path / "puzzles.txt"
    lines = [text.replace("0", ".") if row % 2 else text for row, text in enumerate(puzzle_texts)]
    path.write_bytes(("# a comment\r\n\r\n" + "\r\n".join(lines)).encode("utf-8-sig"))
    result = read_puzzles(path)
    assert np.array_equal(result.puzzles, puzzles)
    assert result.solutions is None and result.extras == {}


@pytest.mark.parametrize(
    "content, message",
    [
        (f"board,rating\n{SOLUTION},1\n", r"`path` must have a column with the puzzles: .* got \['board', 'rating'\]"),
        (f"puzzle,x\n{SOLUTION},1\n{SOLUTION[:80]},1\n", "column 'puzzle', row 1: `text` must have 81 cells, got 80"),
        (
            f"puzzle,x\n{SOLUTION},1\n{SOLUTION[:80]}0,1\n{SOLUTION[:80]}5,1\n",
            "`puzzle` must not repeat .* two 5s in row 9 of board 2: cells r9c3 and r9c9",
        ),
        (
            f"puzzle,solution\n{SOLUTION},{'0' * 81}\n",
            "`solutions` must have no empty cell, got one at r1c1 of board 0",
        ),
        ("puzzle,solution\n", "`path` must hold at least one puzzle, got none"),
        ("# nothing\n\n", "`path` must hold at least one puzzle, got none"),
        (f"{SOLUTION}\n\n{SOLUTION[:-1]}-\n", "line 3: `text` must consist of .* got '-' as symbol 81, r9c9"),
    ],
)
def test_read_puzzles_rejects(tmp_path, content, message):
    path = tmp_path / "puzzles"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_puzzles(path)


def test_columns_may_be_named_and_must_exist(tmp_path, table):
    path = tmp_path / "puzzles.txt"
    path.write_text(f"puzzle,start,end\n7,{table[0][0]},{table[1][0]}\n")
    result = read_puzzles(path, puzzle_column="start", solution_column="end")
    assert format_boards(result.puzzles) == table[0][:1] and format_boards(result.solutions) == table[1][:1]
    assert result.extras["puzzle"].tolist() == [7]
    path.write_text(SOLUTION)
    with pytest.raises(ValueError, match="`puzzle_column` and `solution_column` must be None unless `path` is a CSV"):
        read_puzzles(path, puzzle_column="puzzle")
    path.write_text(f"puzzle,x\n{SOLUTION},1\n")
    with pytest.raises(ValueError, match=r"`solution_column` must be a column .* got 'y' for \['puzzle', 'x'\]"):
        read_puzzles(path, solution_column="y")


# Tokenizer and dataset


def test_tokenizer_round_trip_and_reload(tmp_path):
    tokenizer = sudoku_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    ids = [int(digit) - 1 for digit in SOLUTION]
    board = parse_board(PUZZLE).tolist()
    for candidate in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert dict(candidate("9123")) == {"input_ids": [8, 0, 1, 2], "attention_mask": [1, 1, 1, 1]}
        assert candidate(SOLUTION).input_ids == ids
        assert candidate.decode(ids) == SOLUTION
        assert candidate(PUZZLE).input_ids == [digit - 1 if digit else 9 for digit in board]
        assert candidate("1 0.\n_*[MASK]9[PAD]").input_ids == [0, 9, 9, 9, 9, 9, 8, 10]
        assert candidate.decode([0, 9, 10]) == "1[MASK][PAD]"
        assert (candidate.mask_token_id, candidate.pad_token_id, len(candidate)) == (9, 10, 11)
        assert candidate.eos_token is None and candidate.unk_token is None


def test_position_groups():
    board = parse_board(SOLUTION).tolist()
    position_groups = sudoku_position_groups()
    assert len(position_groups) == 3
    for numbers, contents in zip(position_groups, groups(board), strict=True):
        collected = [[digit for digit, number in zip(board, numbers, strict=True) if number == k] for k in range(9)]
        assert collected == contents


def test_puzzle_dataset(generated):
    puzzles, solutions = generated
    tokenizer = sudoku_tokenizer()
    rows = puzzle_dataset(puzzles, solutions, tokenizer)[:]
    assert set(rows) == {"input_ids", "labels"} and rows["labels"].dtype == torch.int64
    assert tokenizer.batch_decode(rows["input_ids"]) == format_boards(solutions)
    for puzzle, ids, labels in zip(puzzles, rows["input_ids"].tolist(), rows["labels"].tolist(), strict=True):
        assert labels == [-100 if clue else token for clue, token in zip(puzzle, ids, strict=True)]
    with pytest.raises(ValueError, match="`solutions` must agree with the clues"):
        puzzle_dataset(puzzles, solutions[::-1], tokenizer)


def test_collator_moves_the_clues_with_the_digits(generated):
    puzzles, solutions = generated
    tokenizer = sudoku_tokenizer()
    data = puzzle_dataset(puzzles, solutions, tokenizer)
    collator = SudokuCollator(tokenizer, seed=0)
    rows = [data[index] for index in range(len(data))]
    batch = collator(rows)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"].where(batch["labels"] != -100, torch.tensor(-100)))
    new_solutions = batch["input_ids"].numpy() + 1
    new_puzzles = np.where(batch["labels"].numpy() == -100, new_solutions, 0)
    check_solution(new_puzzles, new_solutions)
    assert np.array_equal(canonical_keys(new_puzzles), canonical_keys(puzzles))
    assert not (new_puzzles == puzzles).all(axis=1).any()

    assert not torch.equal(collator(rows)["input_ids"], batch["input_ids"])
    assert torch.equal(pickle.loads(pickle.dumps(SudokuCollator(tokenizer, seed=0)))(rows)["labels"], batch["labels"])
    assert not torch.equal(SudokuCollator(tokenizer, seed=1)(rows)["input_ids"], batch["input_ids"])


def test_extra_clues_are_as_many_as_drawn_and_the_puzzle_stays_the_same(generated):
    puzzles, solutions = generated
    tokenizer = sudoku_tokenizer()
    data = puzzle_dataset(puzzles, solutions, tokenizer)
    rows = [data[index] for index in range(len(data))]
    plain, more = (SudokuCollator(tokenizer, seed=0, extra_clues=number)(rows) for number in (0, 10))
    clues = [(batch["labels"] == -100).sum(-1) for batch in (plain, more)]
    extra = clues[1] - clues[0]
    assert extra.min() >= 0 and extra.max() <= 10 and len(extra.unique()) > 5
    new_solutions = more["input_ids"].numpy() + 1
    check_solution(np.where(more["labels"].numpy() == -100, new_solutions, 0), new_solutions)
    with pytest.raises(ValueError, match=r"`extra_clues` must lie in 0..81, got -1"):
        SudokuCollator(tokenizer, seed=0, extra_clues=-1)


def test_boards_that_break_a_rule_are_tried_again_under_symmetries(generated):
    puzzles, solutions = generated
    seen = []

    def fill(puzzles):  # solves a puzzle on every third call, otherwise writes ones
        seen.append(puzzles)
        return solve_puzzles(puzzles)[1] if len(seen) == 3 else np.where(puzzles, puzzles, 1).astype(np.uint8)

    boards, attempts = fill_by_attempts(fill, puzzles, num_attempts=5)
    assert np.array_equal(boards, solutions) and (attempts == 3).all() and len(seen) == 3
    assert np.array_equal(seen[0], puzzles) and not (seen[1] == puzzles).all(axis=1).any()
    assert np.array_equal(canonical_keys(seen[1]), canonical_keys(puzzles))

    boards, attempts = fill_by_attempts(lambda puzzles: np.where(puzzles, puzzles, 1), puzzles, num_attempts=2)
    assert not attempts.any() and np.array_equal(boards[puzzles > 0], puzzles[puzzles > 0])
    with pytest.raises(ValueError, match="`num_attempts` must be at least 1, got 0"):
        fill_by_attempts(fill, puzzles, num_attempts=0)


def test_workers_and_epochs_do_not_repeat_symmetries(generated):
    tokenizer = sudoku_tokenizer()
    data = puzzle_dataset(generated[0][:1].repeat(8, axis=0), generated[1][:1].repeat(8, axis=0), tokenizer)
    loader = DataLoader(data, batch_size=4, collate_fn=SudokuCollator(tokenizer, seed=0), num_workers=2)
    rows = torch.cat([batch["input_ids"] for _ in range(2) for batch in loader])
    assert len(rows.unique(dim=0)) == 16


# Compilation


def test_numba_is_needed_only_where_it_is_used(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("vmd_hf.data.sudoku")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(vmd_hf.data, "sudoku", None)  # put back afterwards
    monkeypatch.setitem(sys.modules, "numba", None)
    module = importlib.import_module("vmd_hf.data.sudoku")
    assert module.valid_boards(module.parse_board(SOLUTION)[None]).all()
    board = np.zeros((1, 81), dtype=int)
    for function, *arguments in (
        (module.solve_puzzles, board),
        (module.canonical_keys, board),
        (module.random_boards, 1, 0),
        (module.generate_puzzles, 1, 30, 0),
    ):
        with pytest.raises(ImportError, match=r"pip install vmd_hf\[sudoku\]"):
            function(*arguments)


def test_compiles_where_nothing_can_be_kept(monkeypatch):
    numba = pytest.importorskip("numba")

    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function")
        return lambda function: function

    monkeypatch.setattr(numba, "njit", njit)
    assert Kernel(lambda number: number + 1)(2) == 3
