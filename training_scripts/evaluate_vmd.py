"""Evaluate a saved model: print tables, and write them as JSON, lists of rows under a title.

    python training_scripts/evaluate_vmd.py --model outputs/d1 --setting d1
    python training_scripts/evaluate_vmd.py --model outputs/sotu --task text --judge outputs/judge
    python training_scripts/evaluate_vmd.py --model outputs/sotu_latent --task text --baseline outputs/sotu
    python training_scripts/evaluate_vmd.py --model outputs/sotu_lora --task text \\
        --where president=Roosevelt party=Democratic
    python training_scripts/evaluate_vmd.py --model outputs/sudoku --task sudoku --puzzles sudoku.csv
    python training_scripts/evaluate_vmd.py --model outputs/boards --task boards --num_steps 5 10 20 40 81

Synthetic settings: accuracy (share of samples inside the support) and KL(target || samples) over the support in nats,
a support point that was never sampled counted as half a sample. Text: the objective on the test split; upper bounds
on the bits a token of the sampler of each number of steps, with their 95 % interval over rows, and beside a baseline
(of an adapter the model that it is for) the difference on the same rows with its own; and samples with the share of
their words that occur in the training text, and what a judge thinks of them and of as many test rows. Sudoku: share
of puzzles solved, with a 95 % interval (Wilson), for each remasking rule and number of steps, and by clue count and
rating; with `--num_attempts` also how it grows when boards that break a rule are tried again in other symmetries, and
the number of function evaluations (nfe) that a puzzle takes then. Boards: few clues that leave many solutions,
completed at temperature 1: the shares of valid boards and of valid rows, columns and boxes, and how many differ.

Tables that the file of results has under other titles stay there; one of the same title is an error, before anything
is measured, unless `--overwrite` is given.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from vmd_hf.data.text import clean_text8, evenly_spaced, has_text8_alphabet, load_documents, text_datasets
from vmd_hf.evaluation.sudoku import evaluate_boards, evaluate_sudoku, puzzles_to_solve
from vmd_hf.evaluation.synthetic import evaluate_synthetic
from vmd_hf.evaluation.tables import Row, print_table, tables_to_join, write_json
from vmd_hf.evaluation.text import (
    batches_of,
    evaluate_bounds,
    evaluate_objective,
    evaluate_samples,
    load_baseline,
    text_quality,
)
from vmd_hf.hub import default_device
from vmd_hf.recipes import argument_parser
from vmd_hf.tokenization import check_tokenizer, task_tokenizer


@dataclass
class EvaluationArguments:
    """What to evaluate, and how."""

    model: str = field(default="outputs/d1", metadata={"help": "Folder or Hub id of the model."})
    task: Literal["synthetic", "text", "sudoku", "boards"] = "synthetic"
    device: str | None = field(default=None, metadata={"help": "Default: the accelerator if there is one, else cpu."})
    setting: str = "d1"
    correlation: float | None = None
    source: str = field(
        default="sotu",
        metadata={
            "help": "Text as in training: reduced to 27 characters, a to z and the space, unless the model's "
            "tokenizer has others."
        },
    )
    text_column: str = "text"
    where: list[str] = field(
        default_factory=list,
        metadata={"help": "Documents to select: president=Lincoln ...; nothing behind it selects all."},
    )
    num_steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    num_samples: int = field(default=100_000, metadata={"help": "Samples of a synthetic setting."})
    batch_size: int = 10_000
    num_texts: int = field(default=32, metadata={"help": "Texts to sample."})
    baseline: str | None = field(
        default=None, metadata={"help": "Model to compare bounds with; default: the one that an adapter is for."}
    )
    judge: str | None = field(default=None, metadata={"help": "Autoregressive model that reads the samples."})
    bound: Literal["per_sample", "per_step"] = field(default="per_step", metadata={"help": "See vmd_hf.nelbo."})
    num_draws: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Importance samples of z in a bound (IWAE)."}
    )
    num_eval_rows: int = field(default=1000, metadata={"help": "Rows of text, taken evenly from the test split."})
    puzzles: str | None = field(default=None, metadata={"help": "File of Sudoku puzzles; default: new ones."})
    num_puzzles: int = field(default=1000, metadata={"help": "New puzzles to make, or taken evenly from the file."})
    min_clues: int = 31
    max_clues: int = 36
    num_clues: list[int] = field(
        default_factory=lambda: [0, 8, 16, 24], metadata={"help": "Clues of boards with many solutions."}
    )
    num_attempts: int = field(default=1, metadata={"help": "Attempts at a Sudoku whose board breaks a rule."})
    resample_latents: bool | None = field(
        default=None, metadata={"help": "A latent for each step, or a shared one (synthetic, boards); default: both."}
    )
    bf16: bool = field(default=False, metadata={"help": "Run the model in bfloat16 (autocast)."})
    remasking: list[str] = field(default_factory=lambda: ["top_prob", "top_prob_margin"])
    seed: int = 0
    output: str | None = field(
        default=None,
        metadata={
            "help": "JSON file; default: results.json in the model's folder. Tables that it has under other titles "
            "stay; one of the same title is an error without --overwrite."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace tables of the same title in the output."})


def titles_of(args: EvaluationArguments) -> list[str]:
    """Of the tables of the task."""
    if args.task == "synthetic":
        return [f"{args.setting}, {args.num_samples:,} samples"]
    if args.task == "sudoku":
        return [
            "Sudoku: share solved, with its 95 % interval",
            f"{args.remasking[-1]}, {args.num_steps[-1]} steps, by what is known of puzzles",
        ]
    if args.task == "boards":
        return [f"{args.num_puzzles} boards from few clues, sampled: share valid, with its 95 % interval"]
    texts = ", ".join([args.source, *args.where])
    titles = [
        f"{texts}: objective, nats a token (not a perplexity with a latent)",
        f"{texts}: upper bounds on the bits a token, with their 95 % interval",
        f"{texts}: {args.num_texts} sampled texts",
    ]
    return titles + ([f"{texts}: {args.num_texts} sampled texts by the judge {args.judge}"] if args.judge else [])


def text_tables(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: EvaluationArguments
) -> list[list[Row]]:
    """The objective, bounds and samples; and, with a judge, the quality of samples."""
    baseline = load_baseline(args.model, tokenizer, args.baseline)
    if baseline is not None:
        baseline.to(model.device)
    length, clean = model.config.max_position_embeddings, has_text8_alphabet(tokenizer)
    splits = text_datasets(args.source, tokenizer, length, clean=clean, text_column=args.text_column, where=args.where)
    rows = splits["test"]
    batches = batches_of(rows, args.num_eval_rows, model.device)
    documents = load_documents(args.source, text_column=args.text_column)["train"]
    known = {word for document in documents for word in (clean_text8(document) if clean else document).split()}
    samples, texts = evaluate_samples(model, tokenizer, length, known, args.num_steps, args.num_texts, args.seed)
    bounds = evaluate_bounds(model, batches, args.num_steps, args.num_draws, args.bound, args.seed, baseline)
    tables = [[evaluate_objective(model, batches)], bounds, samples]
    if args.judge:
        test_texts = tokenizer.batch_decode(evenly_spaced(rows, args.num_texts)[:]["input_ids"])
        judged = {"(test rows)": test_texts, **dict(zip(args.num_steps, texts, strict=True))}
        tables.append([{"num_steps": name, **text_quality(texts, args.judge)} for name, texts in judged.items()])
    return tables


def evaluate(model: PreTrainedModel, args: EvaluationArguments) -> list[list[Row]]:
    """The tables of the task, of which `titles_of` has the titles."""
    if args.task == "synthetic":
        check_tokenizer(task_tokenizer("synthetic"), model.config)
        results = evaluate_synthetic(
            model,
            args.setting,
            args.correlation,
            args.num_steps,
            args.num_samples,
            args.batch_size,
            args.resample_latents,
            args.seed,
        )
        return [[result for result, _ in results]]
    tokenizer = task_tokenizer("text" if args.task == "text" else "sudoku", args.model)
    check_tokenizer(tokenizer, model.config)
    if args.task == "text":
        return text_tables(model, tokenizer, args)
    common = {
        "num_steps": args.num_steps,
        "remasking": args.remasking,
        "seed": args.seed,
        "batch_size": args.batch_size,
    }
    if args.task == "sudoku":
        clues = args.min_clues, args.max_clues
        table = puzzles_to_solve(args.puzzles, args.num_puzzles, clues, args.seed)
        return list(evaluate_sudoku(model, tokenizer, table, num_attempts=args.num_attempts, **common))
    settings = {"num_boards": args.num_puzzles, "resample_latents": args.resample_latents, **common}
    return [list(evaluate_boards(model, tokenizer, args.num_clues, **settings))]


def main(argv: list[str]) -> None:
    (args,) = argument_parser([EvaluationArguments]).parse_args_into_dataclasses(args=argv)
    if args.baseline is not None and args.task != "text":
        raise ValueError(f"baseline is for the task text, got {args.task}")
    output, titles = args.output or Path(args.model) / "results.json", titles_of(args)
    found = tables_to_join(output, titles, args.overwrite)
    model = AutoModelForMaskedLM.from_pretrained(args.model).to(args.device or default_device()).eval()
    with torch.autocast(model.device.type, torch.bfloat16) if args.bf16 else nullcontext():
        tables = dict(zip(titles, evaluate(model, args), strict=True))
    for title, rows in tables.items():
        print_table(title, rows)
    write_json(output, found | tables)


if __name__ == "__main__":
    main(sys.argv[1:])
