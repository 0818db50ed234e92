"""The tables of each task."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.characters import clean_text8, has_text8_alphabet
from ..data.text import evenly_spaced, load_documents, stream_documents, text_datasets
from ..hub import check_tokenizer
from ..tokenization import task_tokenizer, text_tokenizer
from .arguments import EvaluationArguments
from .sudoku import evaluate_boards, evaluate_sudoku, puzzles_to_solve
from .synthetic import evaluate_synthetic
from .tables import Row
from .text import (
    batches_of,
    evaluate_bounds,
    evaluate_objective,
    evaluate_quality,
    evaluate_samples,
    load_baseline,
    num_bytes,
)


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
    first = [f"first {args.num_documents:,} documents"] if args.streaming else []
    texts = ", ".join([args.source, *first, *args.where])
    titles = [
        f"{texts}: objective, nats a token (not a perplexity with a latent)",
        f"{texts}: upper bounds on the bits a token, with their 95 % interval",
        f"{texts}: {args.num_texts} sampled texts",
    ]
    readers = {"judge": args.judge, "featuriser": args.featuriser}
    by = " and ".join(f"the {kind} {name}" for kind, name in readers.items() if name)
    return titles + ([f"{texts}: {args.num_texts} sampled texts by {by}"] if by else [])


def read_documents(args: EvaluationArguments) -> tuple[dict[str, list[str]], list[str]]:
    """The documents of each split, and those of the test split that are selected.

    Raises:
        ValueError: for a `where` with streaming.
    """
    settings = {"text_column": args.text_column, "config_name": args.config_name}
    if args.streaming:
        if args.where:
            raise ValueError(f"where must be empty with streaming, got {args.where}")
        streams = stream_documents(args.source, held_out=("test", "validation"), **settings)
        train, test = (
            [row["text"] for row in streams[name].take(args.num_documents) if row["text"]]
            for name in ("train", "validation")
        )
        return {"train": train, "test": test}, test
    splits = load_documents(args.source, **settings)
    selected = load_documents(args.source, where=args.where, **settings) if args.where else splits
    return splits, selected["test"]


def text_tables(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: EvaluationArguments
) -> list[list[Row]]:
    """The objective, bounds and samples; and, with a judge, the quality of samples."""
    baseline = load_baseline(args.model, tokenizer, args.baseline, model.device)
    length, clean = model.config.max_position_embeddings, has_text8_alphabet(tokenizer)
    documents, selected = read_documents(args)
    rows = text_datasets({"test": selected}, tokenizer, length, args.documents)["test"]
    batches = batches_of(rows, args.num_eval_rows, model)
    known = {
        word for document in documents["train"] for word in (clean_text8(document) if clean else document).split()
    }
    samples, texts = evaluate_samples(
        model, tokenizer, length, known, args.num_steps, args.num_texts, args.seed, args.temperatures
    )
    bounds = evaluate_bounds(
        model, batches, args.num_steps, args.num_draws, args.bound, args.order, args.seed, baseline
    )
    size = num_bytes(batches, tokenizer)
    bounds = [row | {"bits_per_byte": row["bits_per_token"] * row["num_tokens"] / size} for row in bounds]
    tables = [[evaluate_objective(model, batches)], bounds, samples]
    if args.judge or args.featuriser:
        chosen = list(evenly_spaced(rows, args.num_texts)["input_ids"])
        real = tokenizer.batch_decode(chosen, skip_special_tokens=True)
        names = [{"num_steps": "(test rows)", "temperature": None}]
        names += [{name: row[name] for name in names[0]} for row in samples]
        quality = evaluate_quality(real, texts, args.judge, args.featuriser, known)
        tables.append([name | row for name, row in zip(names, quality, strict=True)])
    return tables


def evaluate_task(model: PreTrainedModel, args: EvaluationArguments) -> list[list[Row]]:
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
    tokenizer = text_tokenizer(args.model) if args.task == "text" else task_tokenizer("sudoku", args.model)
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


__all__ = ["evaluate_task", "titles_of"]
