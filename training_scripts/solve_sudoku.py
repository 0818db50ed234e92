"""Solve a Sudoku with a saved model, and watch the board fill.

    python training_scripts/solve_sudoku.py --model outputs/sudoku \\
        "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"

Empty cells are 0, . or _. Exit status 0 if the board is filled and keeps all rules, 1 if not.
"""

import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from live_view import LiveView
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForMaskedLM, HfArgumentParser, PreTrainedTokenizerBase

import vmd_hf  # noqa: F401, makes AutoModelForMaskedLM know the model
from vmd_hf.data.sudoku import check_boards, parse_board, valid_boards
from vmd_hf.hub import load_tokenizer


@dataclass
class SolverArguments:
    """What to solve, and how."""

    puzzle: str = field(metadata={"help": "81 characters."})
    model: str = field(default="outputs/sudoku", metadata={"help": "Folder or Hub id of the model."})
    num_steps: int = field(default=40, metadata={"help": "Forward passes."})
    remasking: str = "top_prob_margin"
    seconds_per_step: float = field(default=0.05, metadata={"help": "Pause after each step in a terminal."})
    seed: int = 0


class BoardView(LiveView):
    """A streamer that draws the board after every step: clues bold, masks as dots."""

    def __init__(self, puzzle: np.ndarray, tokenizer: PreTrainedTokenizerBase, console: Console, pause: float):
        super().__init__(console, pause)
        self.puzzle = puzzle
        self.tokenizer = tokenizer

    def render(self, ids: torch.Tensor) -> Text:
        text = Text()
        for cell, token in enumerate(ids.tolist()):
            row, column = divmod(cell, 9)
            if column == 0 and row in (3, 6):
                text.append("------+-------+------\n", style="dim")
            if token == self.tokenizer.mask_token_id:
                text.append("·", style="dim")
            else:
                text.append(self.tokenizer.decode([token]), style="bold" if self.puzzle[cell] else "green")
            text.append("\n" if column == 8 else " | " if column in (2, 5) else " ")
        return text


def main(argv: list[str]) -> int:
    argv = [*argv[:-1], f"--puzzle={argv[-1]}"] if argv and not argv[-1].startswith("-") else argv
    (args,) = HfArgumentParser(SolverArguments).parse_args_into_dataclasses(args=argv)
    puzzle = parse_board(args.puzzle)
    check_boards(puzzle[None])
    model = AutoModelForMaskedLM.from_pretrained(args.model).eval()
    tokenizer = load_tokenizer(args.model)
    console = Console()
    view = BoardView(puzzle, tokenizer, console, args.seconds_per_step)
    input_ids = tokenizer(args.puzzle, return_tensors="pt")["input_ids"]
    generator = torch.Generator().manual_seed(args.seed)
    ids = model.generate(
        input_ids, num_steps=args.num_steps, remasking=args.remasking, generator=generator, streamer=view
    )
    if view.live is None:
        console.print(view.render(ids[0]))
    valid = bool(valid_boards(parse_board(tokenizer.decode(ids[0]))[None])[0])
    console.print("valid" if valid else "not valid: some row, column or box repeats a digit")
    return 0 if valid else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
