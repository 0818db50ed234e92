"""Sudoku: shares of puzzles solved, and of sampled boards that keep the rules."""

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.sudoku import (
    PuzzleTable,
    board_ids,
    boards_of,
    fill_by_attempts,
    generate_puzzles,
    group_validity,
    random_boards,
    read_puzzles,
    solve_puzzles,
    valid_boards,
)
from ..data.text import spaced_indices
from ..extras import import_extra
from .sampling import samplers_of
from .tables import Row

_FIRST_SEED = 10**6  # of boards and puzzles that training does not use
TRIES = 10  # boards for each set of clues


def puzzles_to_solve(
    path: str | os.PathLike | None = None, num_puzzles: int = 1000, clues: tuple[int, int] = (31, 36), seed: int = 0
) -> PuzzleTable:
    """Puzzles taken evenly from a file, or new ones of at least and at most so many clues."""
    if path is None:
        puzzles, solutions = generate_puzzles(num_puzzles, clues, seed=_FIRST_SEED + seed)
        return PuzzleTable(puzzles, solutions, {})
    table = read_puzzles(path)
    chosen = spaced_indices(len(table.puzzles), num_puzzles)  # files may be sorted
    solutions = solve_puzzles(table.puzzles[chosen])[1] if table.solutions is None else table.solutions[chosen]
    extras = {name: values[chosen] for name, values in table.extras.items()}
    return PuzzleTable(table.puzzles[chosen], solutions, extras)


def share(solved: np.ndarray) -> Row:
    """Share of True, with its 95 % interval (Wilson)."""
    stats = import_extra("scipy.stats", "scripts")
    interval = stats.binomtest(int(solved.sum()), len(solved)).proportion_ci(method="wilson")
    return {"puzzles": len(solved), "solved": float(solved.mean()), "low": interval.low, "high": interval.high}


def fill_boards(
    model: PreTrainedModel, ids: torch.Tensor, seed: int = 0, batch_size: int = 10_000, **settings: Any
) -> torch.Tensor:
    """(n, 81) int64 tokens without masks, on the CPU, in batches, by `generate` with these settings."""
    generator = torch.Generator().manual_seed(seed)
    title = f"{settings['remasking']}, {settings['num_steps']}"
    batches = tqdm(ids.to(model.device).split(batch_size), desc=title, leave=False, disable=None)
    return torch.cat([model.generate(batch, generator=generator, **settings).cpu() for batch in batches])


def evaluate_sudoku(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    table: PuzzleTable,
    num_steps: Sequence[int],
    remasking: Sequence[str],
    num_attempts: int = 1,
    seed: int = 0,
    batch_size: int = 10_000,
) -> tuple[list[Row], list[Row]]:
    """Shares of puzzles solved for each rule, number of steps and number of attempts (1, 2, 4, ...); and, of the last
    of these, by what is known of the puzzles."""
    model.eval()
    results = []
    for rule in remasking:
        for steps in num_steps:
            settings = {"num_steps": steps, "remasking": rule, "seed": seed, "batch_size": batch_size}

            def fill(puzzles: np.ndarray, settings=settings) -> np.ndarray:
                return boards_of(fill_boards(model, board_ids(puzzles, tokenizer), **settings), tokenizer)

            start = time.perf_counter()
            boards, attempts = fill_by_attempts(fill, table.puzzles, num_attempts, seed)
            seconds = time.perf_counter() - start
            right = (boards == table.solutions).all(-1)
            for limit in (2**power for power in range(num_attempts.bit_length())):
                made = np.where(attempts, attempts, limit).clip(max=limit)
                solved = right & (0 < attempts) & (attempts <= limit)
                effort = {"boards_per_second": len(boards) / seconds}
                if num_attempts > 1:
                    effort = {"num_attempts": limit, "nfe": float(steps * made.mean())}
                results.append({"remasking": rule, "num_steps": steps, **share(solved)} | effort)
    parts = []
    for name, values in {"clues": (table.puzzles > 0).sum(1), **table.extras}.items():
        if np.issubdtype(values.dtype, np.number):
            groups = [np.floor(values) == value for value in np.unique(np.floor(values))]
            parts += [{"group": f"{name} {int(values[group].min())}", **share(solved[group])} for group in groups]
    return results, parts


def puzzles_with_many_solutions(num_puzzles: int, num_clues: int, seed: int, at_least: int = 100) -> np.ndarray:
    """(num_puzzles, 81) uint8: random cells of random boards, which at least so many solutions agree with."""
    random = np.random.default_rng(seed)
    found = np.zeros((0, 81), dtype=np.uint8)
    while len(found) < num_puzzles:
        boards = random_boards(num_puzzles, seed=_FIRST_SEED + seed, start=len(found))
        clues = random.random(boards.shape).argsort(axis=1) < num_clues
        puzzles = np.where(clues, boards, 0).astype(np.uint8)
        found = np.concatenate([found, puzzles[solve_puzzles(puzzles, limit=at_least)[0] == at_least]])
    return found[:num_puzzles]


def evaluate_boards(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_clues: Sequence[int],
    num_steps: Sequence[int],
    remasking: Sequence[str],
    num_boards: int = 1000,
    resample_latents: bool | None = None,
    seed: int = 0,
    batch_size: int = 10_000,
) -> Iterator[Row]:
    """Boards sampled at temperature 1, `TRIES` for each set of clues (without clues there is but one)."""
    model.eval()
    samplers = {name: value for name, value in samplers_of(model, resample_latents).items() if "do_sample" in value}
    for clues in num_clues:
        puzzles = puzzles_with_many_solutions(max(num_boards // TRIES, 1), clues, seed).repeat(TRIES, 0)
        masks = board_ids(puzzles, tokenizer)
        for rule in remasking:
            for steps in num_steps:
                for sampler, settings in samplers.items():
                    settings = {"num_steps": steps, "remasking": rule, **settings}
                    boards = boards_of(fill_boards(model, masks, seed, batch_size, **settings), tokenizer)
                    valid = valid_boards(boards)
                    yield {
                        "clues": clues,
                        "remasking": rule,
                        "num_steps": steps,
                        "sampler": sampler,
                        **share(valid),
                        "valid_units": float(group_validity(boards).mean()),
                        "distinct": len(np.unique(boards, axis=0)),
                        "distinct_valid": len(np.unique(boards[valid], axis=0)),
                    }


__all__ = ["evaluate_boards", "evaluate_sudoku", "puzzles_to_solve", "puzzles_with_many_solutions", "share"]
