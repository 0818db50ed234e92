"""Whether what a model wrote is right, where the rules are known: synthetic tasks and Sudoku."""

from collections.abc import Sequence
from typing import NamedTuple

from ..data.sudoku import cell_name, repeats
from ..data.synthetic import target_distribution

SEQUENCES = {  # what `setting` may name (see `target_distribution`), modulo 10
    "two_token_deterministic": "k, k+1",
    "two_token_nonuniform": "k, k+1",
    "d1": "k, k+1, k+2, k+3",
    "d2": "k, k+1, l, l+1",
}


class Verdict(NamedTuple):
    """`good` is None while it is open."""

    good: bool | None
    text: str


def in_support(tokens: Sequence[str], setting: str) -> bool:
    """Whether tokens are a sequence of a synthetic task (one of SEQUENCES)."""
    target = target_distribution(setting)
    if len(tokens) != target.dim() or not all(token in set("0123456789") for token in tokens):
        return False
    return bool(target[tuple(int(token) for token in tokens)] > 0)


def sudoku_verdict(board: Sequence[int]) -> Verdict:
    """Of 81 numbers, 0 for an empty cell."""
    if faults := repeats(board):
        more = f", and {counted(len(faults) - 1, 'more repeat')}" if len(faults) > 1 else ""
        return Verdict(False, f"Not valid: {describe(faults[0])}{more}")
    empty = sum(digit == 0 for digit in board)
    if empty:
        return Verdict(None, f"{empty} empty, no rule broken so far")
    return Verdict(True, "Valid: every row, column and box has 1 to 9 once")


def describe(repeat: tuple[str, int, list[int]]) -> str:
    """One of `repeats` in words."""
    name, digit, cells = repeat
    often = "twice" if len(cells) == 2 else f"{len(cells)} times"
    return f"{name} has {digit} {often} ({', '.join(cell_name(cell) for cell in cells)})"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
