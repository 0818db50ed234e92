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
the forward passes that a puzzle takes then. Boards: few clues that leave many solutions, completed at temperature 1:
the shares of valid boards and of valid rows, columns and boxes, and how many boards differ.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest
from tqdm.auto import tqdm
from transformers import (
    AutoModelForMaskedLM,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from vmd_hf import CorpusBound, corpus_bound, metrics
from vmd_hf.data.sudoku import (
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
from vmd_hf.data.synthetic import joint_metrics, target_distribution
from vmd_hf.data.text import clean_text8, evenly_spaced, load_documents, spaced_indices, text_datasets
from vmd_hf.hub import load_tokenizer
from vmd_hf.likelihood import confidence_interval
from vmd_hf.schedule_vmd import most_revealed
from vmd_hf.training import active_units, moments

SAMPLERS = {
    "one z kept, argmax": {"resample_latents": False},
    "fresh z per step, argmax": {"resample_latents": True},
    "one z kept, sampled": {"resample_latents": False, "do_sample": True},
    "fresh z per step, sampled": {"resample_latents": True, "do_sample": True},
}
DIFFERENCE = ("difference", "difference_low", "difference_high")


@dataclass
class EvaluationArguments:
    """What to evaluate, and how."""

    model: str = field(default="outputs/d1", metadata={"help": "Folder or Hub id of the model."})
    task: Literal["synthetic", "text", "sudoku", "boards"] = "synthetic"
    setting: str = "d1"
    correlation: float | None = None
    source: str = "sotu"
    text_column: str = "text"
    where: list[str] = field(default_factory=list, metadata={"help": "Documents to select: president=Lincoln ..."})
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
        default_factory=lambda: [1], metadata={"help": "Draws of z under the logarithm of a bound."}
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
        default=None, metadata={"help": "Draw z at every step, or keep it (synthetic, boards); default: both."}
    )
    bf16: bool = field(default=False, metadata={"help": "Run the model in bfloat16 (autocast)."})
    remasking: list[str] = field(default_factory=lambda: ["top_prob", "top_prob_margin"])
    seed: int = 0
    output: str | None = field(default=None, metadata={"help": "JSON file; default: results.json in the model's."})


@torch.no_grad()
def draw_samples(
    model: PreTrainedModel, length: int, num_samples: int, seed: int, batch_size: int = 10_000, **settings: Any
) -> torch.Tensor:
    """(num_samples, length) int64 sequences from fully masked ones, positions revealed in random order."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.full((num_samples, length), model.config.mask_token_id).split(batch_size)
    batches = tqdm(masks, desc=str(settings.get("num_steps", "")), leave=False, disable=None)
    return torch.cat(
        [model.generate(batch, generator=generator, remasking="random", **settings).cpu() for batch in batches]
    )


def sampler_label(sampler: str, model: PreTrainedModel) -> str:
    return sampler if model.config.latent_size else sampler.replace("one z kept", "no z")


def samplers_of(model: PreTrainedModel, args: EvaluationArguments) -> dict[str, dict[str, bool]]:
    """Those of `SAMPLERS` that were asked for; without a latent all that differ."""
    wanted = {False, True} if args.resample_latents is None else {args.resample_latents}
    if model.config.latent_size == 0:
        wanted = {False}
    return {name: settings for name, settings in SAMPLERS.items() if settings["resample_latents"] in wanted}


def evaluate_synthetic(
    model: PreTrainedModel, args: EvaluationArguments
) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """One result and its samples for each number of steps and each sampler that differs from the others."""
    target = target_distribution(args.setting, args.correlation)
    model.eval()
    for num_steps in args.num_steps:
        for sampler, settings in samplers_of(model, args).items():
            if settings["resample_latents"] and num_steps == 1 and args.resample_latents is None:
                continue  # nothing to resample: the sampler is the one that keeps z
            settings = {**settings, "num_steps": num_steps}
            samples = draw_samples(model, target.dim(), args.num_samples, args.seed, args.batch_size, **settings)
            label = sampler_label(sampler, model)
            yield {"num_steps": num_steps, "sampler": label, **joint_metrics(samples, target)}, samples


def batches_of(rows: Dataset, num_rows: int, device: torch.device) -> list[torch.Tensor]:
    """Token ids of rows that are taken evenly, (at most 50, length) each."""
    return list(torch.as_tensor(evenly_spaced(rows, num_rows)[:]["input_ids"]).to(device).split(50))


def evaluate_objective(model: PreTrainedModel, batches: list[torch.Tensor]) -> dict[str, Any]:
    """The objective in nats a token (no perplexity if there is a latent; the noise is hashed, so it is the same number
    every time), and how many dimensions of z the posterior uses (see `VMDMetricsCallback`)."""
    with torch.no_grad():
        outputs = [model(input_ids=batch, labels=batch) for batch in tqdm(batches, desc="objective", disable=None)]
    weights = torch.tensor([float(len(batch)) for batch in batches])
    result: dict[str, Any] = {"objective": model.config.objective, "rows": int(weights.sum())}
    for name in ("loss", "reconstruction_loss", "kl"):
        result[name] = float((torch.stack([output[name] for output in outputs]) * weights).sum() / weights.sum())
    if model.config.latent_size:
        result["active_units"] = active_units(sum(moments(output.posterior_shift) for output in outputs))
    return result


def largest_step(width: int, num_steps: int) -> int:
    """Tokens that one of `num_steps` steps reveals at most, of `width`."""
    return int(most_revealed(torch.tensor(width), torch.tensor(num_steps)))


def corpus_bounds(
    model: PreTrainedModel, batches: list[torch.Tensor], args: EvaluationArguments
) -> dict[tuple[int, int], tuple[CorpusBound, float]]:
    """`corpus_bound` for each number of steps and draws, with the seconds that it took; of steps without a latent,
    which draw nothing, only once."""
    config, found = model.config, {}
    width = config.block_size or batches[0].shape[1]
    for num_steps in args.num_steps:
        has_latent = config.latent_size > 0 and largest_step(width, num_steps) >= config.latent_min_tokens
        for num_draws in args.num_draws if has_latent else [1]:
            start = time.perf_counter()
            bound = corpus_bound(
                model,
                [{"input_ids": batch} for batch in batches],
                bound=args.bound,
                num_steps=num_steps,
                num_samples=num_draws,
                generator=torch.Generator().manual_seed(args.seed),
                show_progress=sys.stderr.isatty(),
            )
            found[num_steps, num_draws] = bound, time.perf_counter() - start
    return found


def evaluate_bounds(
    model: PreTrainedModel,
    batches: list[torch.Tensor],
    args: EvaluationArguments,
    baseline: PreTrainedModel | None = None,
) -> list[dict[str, Any]]:
    """A line for each of `corpus_bounds`; with a baseline first its own, then the model's with their differences from
    it: at as many draws, or, of a model without a latent, from the baseline's bound with the most."""
    found = corpus_bounds(model, batches, args)
    lines = [bound_line(args.bound, *key, *value) for key, value in found.items()]
    if baseline is None:
        return lines
    others = corpus_bounds(baseline, batches, args)
    results = [
        {"model": "baseline", **bound_line(args.bound, *key, *value), **dict.fromkeys(DIFFERENCE)}
        for key, value in others.items()
    ]
    for line, (key, (bound, _)) in zip(lines, found.items(), strict=True):
        own, of_baseline = ([other for other in keys if other[0] == key[0]] for keys in (found, others))
        if min(len(own), len(of_baseline)) == 1:
            key = max(of_baseline)
        difference, error = bound.difference(others[key][0])
        values = difference, *confidence_interval(difference, error)
        results.append({"model": "this one", **line, **dict(zip(DIFFERENCE, values, strict=True))})
    return results


def bound_line(name: str, num_steps: int, num_draws: int, bound: CorpusBound, seconds: float) -> dict[str, Any]:
    low, high = bound.interval
    return {
        "bound": name,
        "num_steps": num_steps,
        "num_draws": num_draws,
        "bits_per_token": bound.bits_per_token,
        "low": low,
        "high": high,
        "kl_bits_per_token": bound.kl_bits_per_token,
        "num_tokens": bound.num_tokens,
        "seconds": seconds,
    }


def baseline_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: EvaluationArguments
) -> PreTrainedModel | None:
    name = args.baseline
    if name is None and find_adapter_config_file(args.model):
        name = PeftConfig.from_pretrained(args.model).base_model_name_or_path
    elif name is not None and load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"baseline must have the model's vocabulary, got {name} and {args.model}")
    return None if name is None else AutoModelForMaskedLM.from_pretrained(name).to(model.device).eval()


def evaluate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: EvaluationArguments
) -> tuple[list[dict[str, Any]], ...]:
    """The objective, bounds and samples; and, with a judge, the quality of samples, else no rows."""
    model.eval()
    baseline = baseline_of(model, tokenizer, args)
    length = model.config.max_position_embeddings
    rows = text_datasets(args.source, tokenizer, length, text_column=args.text_column, where=args.where)["test"]
    batches = batches_of(rows, args.num_eval_rows, model.device)
    documents = load_documents(args.source, text_column=args.text_column)["train"]
    known = {word for document in documents for word in clean_text8(document).split()}
    samples, quality = [], []
    if args.judge:
        test_texts = tokenizer.batch_decode(evenly_spaced(rows, args.num_texts)[:]["input_ids"])
        quality.append({"num_steps": "(test rows)", **quality_of(test_texts, args.judge)})
    for num_steps in args.num_steps:
        start = time.perf_counter()
        ids = draw_samples(model, length, args.num_texts, args.seed, do_sample=True, num_steps=num_steps)
        seconds = time.perf_counter() - start
        texts = tokenizer.batch_decode(ids)
        words = [word for text in texts for word in text.split()[1:-1]]  # the first and last may be cut
        share = sum(word in known for word in words) / max(len(words), 1)
        samples.append(
            {"num_steps": num_steps, "known_words": share, "num_words": len(words), "seconds": seconds}
            | {"sample": texts[0]}
        )
        if args.judge:
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            quality.append({"num_steps": num_steps, **quality_of(texts, args.judge)})
    bounds = evaluate_bounds(model, batches, args, baseline)
    return [evaluate_objective(model, batches)], bounds, samples, quality


def quality_of(texts: list[str], judge: str) -> dict[str, float]:
    return metrics.load("text_quality").compute(predictions=texts, judge=judge)


def puzzles_to_solve(args: EvaluationArguments) -> PuzzleTable:
    """Puzzles of the given file, or new ones from a seed that training does not use."""
    if args.puzzles is None:
        puzzles, solutions = generate_puzzles(
            args.num_puzzles, (args.min_clues, args.max_clues), seed=10**6 + args.seed
        )
        return PuzzleTable(puzzles, solutions, {})
    table = read_puzzles(args.puzzles)
    chosen = spaced_indices(len(table.puzzles), args.num_puzzles)  # files may be sorted
    solutions = solve_puzzles(table.puzzles[chosen])[1] if table.solutions is None else table.solutions[chosen]
    extras = {name: values[chosen] for name, values in table.extras.items()}
    return PuzzleTable(table.puzzles[chosen], solutions, extras)


def share(solved: np.ndarray) -> dict[str, float]:
    """Share of True, with its 95 % interval (Wilson)."""
    interval = binomtest(int(solved.sum()), len(solved)).proportion_ci(method="wilson")
    return {"puzzles": len(solved), "solved": float(solved.mean()), "low": interval.low, "high": interval.high}


def fill_boards(model: PreTrainedModel, ids: torch.Tensor, args: EvaluationArguments, **settings: Any) -> torch.Tensor:
    """(n, 81) int64 tokens without masks, in batches, from the seed."""
    generator = torch.Generator().manual_seed(args.seed)
    title = f"{settings['remasking']}, {settings['num_steps']}"
    batches = tqdm(ids.split(args.batch_size), desc=title, leave=False, disable=None)
    return torch.cat([model.generate(batch, generator=generator, **settings) for batch in batches])


def evaluate_sudoku(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: EvaluationArguments
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Shares of puzzles solved for each rule, number of steps and number of attempts (1, 2, 4, ...); and, of the last
    of these, by what is known of the puzzles."""
    table = puzzles_to_solve(args)
    model.eval()
    results = []
    for remasking in args.remasking:
        for num_steps in args.num_steps:

            def fill(puzzles: np.ndarray, num_steps=num_steps, remasking=remasking) -> np.ndarray:
                ids = board_ids(puzzles, tokenizer)
                return boards_of(fill_boards(model, ids, args, num_steps=num_steps, remasking=remasking), tokenizer)

            start = time.perf_counter()
            boards, attempts = fill_by_attempts(fill, table.puzzles, args.num_attempts, args.seed)
            seconds = time.perf_counter() - start
            right = (boards == table.solutions).all(-1)
            for limit in (2**power for power in range(args.num_attempts.bit_length())):
                made = np.where(attempts, attempts, limit).clip(max=limit)
                solved = right & (0 < attempts) & (attempts <= limit)
                effort = {"boards_per_second": len(boards) / seconds}
                if args.num_attempts > 1:
                    effort = {"num_attempts": limit, "passes": float(num_steps * made.mean())}
                results.append({"remasking": remasking, "num_steps": num_steps, **share(solved)} | effort)
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
        boards = random_boards(num_puzzles, seed=10**6 + seed, start=len(found))
        clues = random.random(boards.shape).argsort(axis=1) < num_clues
        puzzles = np.where(clues, boards, 0).astype(np.uint8)
        found = np.concatenate([found, puzzles[solve_puzzles(puzzles, limit=at_least)[0] == at_least]])
    return found[:num_puzzles]


def evaluate_boards(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: EvaluationArguments, tries: int = 10
) -> Iterator[dict[str, Any]]:
    """Boards sampled at temperature 1, `tries` for each set of clues (without clues there is but one)."""
    model.eval()
    for num_clues in args.num_clues:
        puzzles = puzzles_with_many_solutions(max(args.num_puzzles // tries, 1), num_clues, args.seed).repeat(tries, 0)
        masks = board_ids(puzzles, tokenizer)
        for remasking in args.remasking:
            for num_steps in args.num_steps:
                for sampler, settings in samplers_of(model, args).items():
                    if "argmax" in sampler:
                        continue
                    ids = fill_boards(model, masks, args, num_steps=num_steps, remasking=remasking, **settings)
                    boards = boards_of(ids, tokenizer)
                    valid = valid_boards(boards)
                    yield {
                        "clues": num_clues,
                        "remasking": remasking,
                        "num_steps": num_steps,
                        "sampler": sampler_label(sampler, model),
                        **share(valid),
                        "valid_units": float(group_validity(boards).mean()),
                        "distinct": len(np.unique(boards, axis=0)),
                        "distinct_valid": len(np.unique(boards[valid], axis=0)),
                    }


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows with the same keys as one table."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Written beside the file first, so that an interruption leaves the old one whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def evaluate(model: PreTrainedModel, args: EvaluationArguments) -> dict[str, list[dict[str, Any]]]:
    """The tables of the task under their titles."""
    if args.task == "synthetic":
        title = f"{args.setting}, {args.num_samples:,} samples"
        return {title: [result for result, _ in evaluate_synthetic(model, args)]}
    tokenizer = load_tokenizer(args.model)
    if args.task == "sudoku":
        results, parts = evaluate_sudoku(model, tokenizer, args)
        last = f"{results[-1]['remasking']}, {results[-1]['num_steps']} steps"
        return {
            "Sudoku: share solved, with its 95 % interval": results,
            f"{last}, by what is known of puzzles": parts,
        }
    if args.task == "boards":
        results = list(evaluate_boards(model, tokenizer, args))
        return {f"{args.num_puzzles} boards from few clues, sampled: share valid, with its 95 % interval": results}
    objective, bounds, samples, quality = evaluate_text(model, tokenizer, args)
    texts = ", ".join([args.source, *args.where])
    tables = {
        f"{texts}: objective, nats a token (not a perplexity with a latent)": objective,
        f"{texts}: upper bounds on the bits a token, with their 95 % interval": bounds,
        f"{texts}: {args.num_texts} sampled texts": samples,
    }
    if quality:
        tables[f"{texts}: {args.num_texts} sampled texts by the judge {args.judge}"] = quality
    return tables


def main(argv: list[str]) -> None:
    (args,) = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses(args=argv)
    if args.baseline is not None and args.task != "text":
        raise ValueError(f"baseline is for the task text, got {args.task}")
    model = AutoModelForMaskedLM.from_pretrained(args.model)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
        tables = evaluate(model, args)
    for title, rows in tables.items():
        print_table(title, rows)
    write_json(args.output or Path(args.model) / "results.json", tables)


if __name__ == "__main__":
    main(sys.argv[1:])
