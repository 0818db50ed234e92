"""Solve a Sudoku with a saved model, and watch the board fill.

    python training_scripts/solve_sudoku.py --model outputs/sudoku \\
        "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"

The puzzle is the argument without a name, wherever it stands, or `--puzzle`: 81 characters, row by row, 0, . or _ for
empty cells. A board that breaks a rule is tried again in another symmetry, out of sight. Exit status 0 if the board
keeps all rules, 1 if not.
"""

import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser


@dataclass
class SolverArguments:
    """What to solve, and how."""

    puzzle: str | None = field(default=None, metadata={"help": "81 characters; --puzzle itself may be left out."})
    model: str = field(default="outputs/sudoku", metadata={"help": "Folder or Hub id of the model."})
    device: str | None = field(default=None, metadata={"help": "Default: the accelerator if there is one, else cpu."})
    num_steps: int = field(default=40, metadata={"help": "Forward passes."})
    remasking: str = "top_prob_margin"
    num_attempts: int = field(default=16, metadata={"help": "Attempts, as long as the board breaks a rule."})
    seconds_per_step: float = field(default=0.05, metadata={"help": "Pause after each step in a terminal."})
    seed: int = 0


def parse(argv: list[str]) -> SolverArguments:
    parser = HfArgumentParser(SolverArguments)
    args, rest = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    puzzles = [*rest, *([] if args.puzzle is None else [args.puzzle])]
    if len(puzzles) != 1:
        parser.error(f"one puzzle must be given, got {', '.join(map(repr, puzzles)) or 'none'}")
    (args.puzzle,) = puzzles
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)

    import numpy as np  # what follows takes seconds to import, which --help need not wait for
    import torch
    from rich.console import Console

    from vmd_hf.data.sudoku import board_ids, boards_of, check_boards, fill_by_attempts, parse_board
    from vmd_hf.hub import check_tokenizer, load_model, load_tokenizer
    from vmd_hf.live_view import BoardView

    puzzle = parse_board(args.puzzle)
    check_boards(puzzle[None])
    model = load_model(args.model, args.device)
    tokenizer = load_tokenizer(args.model)
    check_tokenizer(tokenizer, model.config)
    console = Console()
    view = BoardView(puzzle, tokenizer, console, args.seconds_per_step)
    generator = torch.Generator(model.device).manual_seed(args.seed)
    views = iter([view])  # of the first attempt

    def fill(puzzles: np.ndarray) -> np.ndarray:
        settings = {"num_steps": args.num_steps, "remasking": args.remasking, "streamer": next(views, None)}
        ids = board_ids(puzzles, tokenizer).to(model.device)
        return boards_of(model.generate(ids, generator=generator, **settings), tokenizer)

    boards, (attempt,) = fill_by_attempts(fill, puzzle[None], args.num_attempts, args.seed)
    if view.live is None or attempt != 1:
        console.print(view.render(board_ids(boards, tokenizer)[0]))
    made = f"attempt {attempt}" if attempt else f"{args.num_attempts} attempts"
    console.print(f"valid ({made})" if attempt else f"not valid ({made}): some row, column or box repeats a digit")
    return 0 if attempt else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
