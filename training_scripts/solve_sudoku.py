"""Solve a Sudoku with a saved model, and watch the board fill.

    python training_scripts/solve_sudoku.py --model outputs/sudoku \\
        "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"

Empty cells are 0, . or _. A board that breaks a rule is tried again in another symmetry, out of sight. Exit status 0
if the board keeps all rules, 1 if not.
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
from vmd_hf.data.sudoku import board_ids, boards_of, check_boards, fill_by_attempts, parse_board
from vmd_hf.hub import load_tokenizer


@dataclass
class SolverArguments:
    """What to solve, and how."""

    puzzle: str = field(metadata={"help": "81 characters."})
    model: str = field(default="outputs/sudoku", metadata={"help": "Folder or Hub id of the model."})
    num_steps: int = field(default=40, metadata={"help": "Forward passes."})
    remasking: str = "top_prob_margin"
    num_attempts: int = field(default=16, metadata={"help": "Attempts, as long as the board breaks a rule."})
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
    generator = torch.Generator().manual_seed(args.seed)
    views = iter([view])  # of the first attempt

    def fill(puzzles: np.ndarray) -> np.ndarray:
        settings = {"num_steps": args.num_steps, "remasking": args.remasking, "streamer": next(views, None)}
        return boards_of(model.generate(board_ids(puzzles, tokenizer), generator=generator, **settings), tokenizer)

    boards, (attempt,) = fill_by_attempts(fill, puzzle[None], args.num_attempts, args.seed)
    if view.live is None or attempt != 1:
        console.print(view.render(board_ids(boards, tokenizer)[0]))
    made = f"attempt {attempt}" if attempt else f"{args.num_attempts} attempts"
    console.print(f"valid ({made})" if attempt else f"not valid ({made}): some row, column or box repeats a digit")
    return 0 if attempt else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
