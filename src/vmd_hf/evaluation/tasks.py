"""The tables of each task."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.characters import clean_text8, has_text8_alphabet
from ..data.text import evenly_spaced, load_documents, text_datasets
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
    evaluate_samples,
    load_baseline,
    num_bytes,
    text_quality,
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
    baseline = load_baseline(args.model, tokenizer, args.baseline, model.device)
    length, clean = model.config.max_position_embeddings, has_text8_alphabet(tokenizer)
    settings = {"text_column": args.text_column, "config_name": args.config_name}
    documents = load_documents(args.source, **settings)
    selected = load_documents(args.source, where=args.where, **settings) if args.where else documents
    rows = text_datasets({"test": selected["test"]}, tokenizer, length, args.documents)["test"]
    batches = batches_of(rows, args.num_eval_rows, model)
    known = {
        word for document in documents["train"] for word in (clean_text8(document) if clean else document).split()
    }
    samples, texts = evaluate_samples(model, tokenizer, length, known, args.num_steps, args.num_texts, args.seed)
    bounds = evaluate_bounds(
        model, batches, args.num_steps, args.num_draws, args.bound, args.order, args.seed, baseline
    )
    size = num_bytes(batches, tokenizer)
    bounds = [row | {"bits_per_byte": row["bits_per_token"] * row["num_tokens"] / size} for row in bounds]
    tables = [[evaluate_objective(model, batches)], bounds, samples]
    if args.judge:
        chosen = list(evenly_spaced(rows, args.num_texts)["input_ids"])
        test_texts = tokenizer.batch_decode(chosen, skip_special_tokens=True)
        judged = {"(test rows)": test_texts, **dict(zip(args.num_steps, texts, strict=True))}
        tables.append([{"num_steps": name, **text_quality(texts, args.judge)} for name, texts in judged.items()])
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
