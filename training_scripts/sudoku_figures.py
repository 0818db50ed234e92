"""Figures of Sudoku models: accuracy over forward passes, over training steps, and a board that fills.

    python training_scripts/evaluate_vmd.py --model outputs/sudoku --task sudoku --num_steps 1 5 10 20
    python training_scripts/sudoku_figures.py --model outputs/sudoku
    python training_scripts/sudoku_figures.py --model outputs/mdm outputs/vmd

Reads `results.json` of the models' folders and of the checkpoints in them, as `evaluate_vmd.py --task sudoku` writes
them, and writes `accuracy_over_steps.png`, `accuracy_over_training.png` (all models in one) and `board.png` (of the
first) in the first folder.
"""

import json
import sys
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from transformers import HfArgumentParser, PreTrainedModel

from vmd_hf.data.sudoku import parse_board
from vmd_hf.hub import load_model, load_tokenizer

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class FigureArguments:
    """What to draw."""

    model: list[str] = field(default_factory=lambda: ["outputs/sudoku"], metadata={"help": "Folders of models."})
    puzzle: str = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
    num_steps: int = field(default=10, metadata={"help": "Forward passes for the board, and over training steps."})
    remasking: str = "top_prob_margin"
    device: str | None = field(default=None, metadata={"help": "Default: the accelerator if there is one, else cpu."})


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The rows of the first table of `results.json`, a row for each rule and number of steps; first attempts."""
    first = next(iter(json.loads((folder / "results.json").read_text()).values()))
    return [row for row in first if row.get("num_attempts", 1) == 1]


def draw_accuracy(axes: plt.Axes, x: list[int], rows: list[dict[str, Any]], label: str, style: str) -> None:
    """Percent solved with its interval."""
    solved, low, high = (100 * np.array([row[name] for row in rows]) for name in ("solved", "low", "high"))
    axes.errorbar(
        x,
        solved,
        yerr=[(solved - low).clip(0), (high - solved).clip(0)],
        fmt=style,
        marker="o",
        capsize=3,
        label=label,
    )


def accuracy_over_steps(folders: list[Path]) -> None:
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    ticks = set()
    for folder, line in zip(folders, cycle(("-", "--", ":", "-."))):
        results = read_results(folder)
        for number, rule in enumerate(dict.fromkeys(row["remasking"] for row in results)):
            rows = sorted((row for row in results if row["remasking"] == rule), key=lambda row: row["num_steps"])
            steps = [row["num_steps"] for row in rows]
            draw_accuracy(axes, steps, rows, f"{folder.name}, {rule}", f"C{number}{line}")
        ticks |= {row["num_steps"] for row in results}
    axes.set(xlabel="forward passes", ylabel="puzzles solved, %", ylim=(0, 101), xscale="log")
    axes.set_xticks(list(ticks), [str(tick) for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(folders[0] / "accuracy_over_steps.png", dpi=110)


def accuracy_over_training(folders: list[Path], remasking: str, num_steps: int) -> None:
    """Of the checkpoints that were evaluated; no figure if there are none."""
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for number, folder in enumerate(folders):
        checkpoints = {
            int(path.parent.name.removeprefix("checkpoint-")): read_results(path.parent)
            for path in folder.glob("checkpoint-*/results.json")
        }
        updates = sorted(checkpoints)
        rows = [
            next(row for row in checkpoints[update] if (row["remasking"], row["num_steps"]) == (remasking, num_steps))
            for update in updates
        ]
        if rows:
            draw_accuracy(axes, updates, rows, folder.name, f"C{number}-")
    axes.set(xlabel="updates", ylabel="puzzles solved, %", ylim=(0, 101), title=f"{remasking}, {num_steps} passes")
    if axes.lines:
        axes.legend()
        figure.savefig(folders[0] / "accuracy_over_training.png", dpi=110)


def board_that_fills(folder: Path, model: PreTrainedModel, puzzle: str, remasking: str, num_steps: int) -> None:
    """The board after each forward pass: clues black, earlier digits grey, those of the step blue."""
    tokenizer = load_tokenizer(folder)
    output = model.generate(
        tokenizer(puzzle, return_tensors="pt")["input_ids"].to(model.device),
        num_steps=num_steps,
        remasking=remasking,
        generator=torch.Generator().manual_seed(0),
        output_history=True,
        return_dict_in_generate=True,
    )
    clues = parse_board(puzzle)
    texts = [tokenizer.decode(ids[0]).replace(tokenizer.mask_token, ".") for ids in output.history]
    boards = [clues, *map(parse_board, texts)]
    columns = min(len(boards), 6)
    rows = -(-len(boards) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.4 * columns, 2.6 * rows), squeeze=False, layout="constrained"
    )
    for number, axis in enumerate(axes.flat):
        axis.axis("off")
        if number >= len(boards):
            continue
        axis.set(xlim=(0, 9), ylim=(9, 0), aspect="equal", title="clues" if number == 0 else f"pass {number}")
        for line in range(10):
            width = 1.5 if line % 3 == 0 else 0.4
            axis.plot([0, 9], [line, line], color="black", lw=width)
            axis.plot([line, line], [0, 9], color="black", lw=width)
        for cell, digit in enumerate(boards[number]):
            new = number and boards[number - 1][cell] != digit
            if digit:
                style = {"weight": "bold"} if clues[cell] else {"color": "tab:blue" if new else "dimgray"}
                axis.text(cell % 9 + 0.5, cell // 9 + 0.5, str(digit), ha="center", va="center", fontsize=8, **style)
    figure.savefig(folder / "board.png", dpi=110)


def main(argv: list[str]) -> None:
    (args,) = HfArgumentParser(FigureArguments).parse_args_into_dataclasses(args=argv)
    folders = [Path(name) for name in args.model]
    accuracy_over_steps(folders)
    accuracy_over_training(folders, args.remasking, args.num_steps)
    model = load_model(folders[0], args.device)
    board_that_fills(folders[0], model, args.puzzle, args.remasking, args.num_steps)


if __name__ == "__main__":
    main(sys.argv[1:])
