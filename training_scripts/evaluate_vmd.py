"""Evaluate a saved model: print tables, and write them as JSON, lists of rows under a title.

    python training_scripts/evaluate_vmd.py --model outputs/d1 --setting d1
    python training_scripts/evaluate_vmd.py --model outputs/sotu --task text --judge outputs/judge
    python training_scripts/evaluate_vmd.py --model outputs/sotu --task text --judge outputs/judge \\
        --temperatures 0.6 0.8 1.0 1.2 --num_steps 4 16
    python training_scripts/evaluate_vmd.py --model outputs/web --task text --source HUB_ID --streaming
    python training_scripts/evaluate_vmd.py --model outputs/sotu_latent --task text --baseline outputs/sotu
    python training_scripts/evaluate_vmd.py --model outputs/sotu_lora --task text \\
        --where president=Roosevelt party=Democratic
    python training_scripts/evaluate_vmd.py --model outputs/sudoku --task sudoku --puzzles sudoku.csv
    python training_scripts/evaluate_vmd.py --model outputs/boards --task boards --num_steps 5 10 20 40 81

Synthetic settings: accuracy (share of samples inside the support) and KL(target || samples) over the support in nats,
a support point that was never sampled counted as half a sample. Text: the objective on the test split; upper bounds
on the bits a token of the sampler of each number of steps, with their 95 % interval over rows, and beside a baseline
(of an adapter the model that it is for) the difference on the same rows with its own; and samples with the share of
their words that occur in the training text, and what a judge thinks of them and of as many test rows. A judge likes
texts that repeat themselves: with `--temperatures` its perplexity is drawn over the entropy of words, too, as
`*_frontier.png` beside the tables; with `--featuriser` there is MAUVE. Sudoku: share
of puzzles solved, with a 95 % interval (Wilson), for each remasking rule and number of steps, and by clue count and
rating; with `--num_attempts` also how it grows when boards that break a rule are tried again in other symmetries, and
the number of function evaluations (nfe) that a puzzle takes then. Boards: few clues that leave many solutions,
completed at temperature 1: the shares of valid boards and of valid rows, columns and boxes, and how many differ.

Tables that the file of results has under other titles stay there; one of the same title is an error, before anything
is measured, unless `--overwrite` is given.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

from vmd_hf.arguments import argument_parser
from vmd_hf.evaluation.arguments import EvaluationArguments


def main(argv: list[str]) -> None:
    (args,) = argument_parser([EvaluationArguments]).parse_args_into_dataclasses(args=argv)
    if args.baseline is not None and args.task != "text":
        raise ValueError(f"baseline is for the task text, got {args.task}")

    import torch  # and what needs it, which --help does not

    from vmd_hf.evaluation.tables import print_table, tables_to_join, write_json
    from vmd_hf.evaluation.tasks import evaluate_task, titles_of
    from vmd_hf.evaluation.text import draw_frontier
    from vmd_hf.extras import import_extra
    from vmd_hf.hub import check_model, load_model

    for name in filter(None, (args.baseline, args.judge, args.featuriser)):
        check_model(name)
    if args.featuriser:
        import_extra("mauve", "mauve")

    output, titles = Path(args.output or Path(args.model) / "results.json"), titles_of(args)
    found = tables_to_join(output, titles, args.overwrite)
    model = load_model(args.model, args.device)
    with torch.autocast(model.device.type, torch.bfloat16) if args.bf16 else nullcontext():
        tables = dict(zip(titles, evaluate_task(model, args), strict=True))
    for title, rows in tables.items():
        print_table(title, rows)
    write_json(output, found | tables)
    if args.task == "text" and args.judge and args.temperatures:
        draw_frontier(tables[titles[-1]], output.with_name(f"{output.stem}_frontier.png"))


if __name__ == "__main__":
    main(sys.argv[1:])
