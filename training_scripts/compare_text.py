"""Train autoregressive, masked diffusion, block diffusion and VMD models of text, and compare bounds on their bits.

    python training_scripts/compare_text.py
    python training_scripts/compare_text.py --rows block-4 vmd-4 --seeds 0 1 2

All models have the same size (a VMD also has its latent path), the same data in the same order and about the same
training time: the numbers of updates were chosen for that, and the time that a row took is reported. The bounds are
those of `vmd_hf.corpus_bound` on the test split, for samplers of 1, 2, 4 and 8 steps a block. Prints a table, writes
`results.json`, and draws bits a character over forward passes a character. A row that is there already is not trained
again, and one that was interrupted goes on from its last checkpoint. All other arguments are those of train_vmd.py,
and change every row.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from evaluate_vmd import (
    EvaluationArguments,
    draw_samples,
    evaluate_bounds,
    evaluate_objective,
    print_table,
    write_json,
)
from train_vmd import DataArguments, ModelArguments, parse, train
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from vmd_hf import VMDForMaskedDiffusion
from vmd_hf.data.text import text_datasets
from vmd_hf.training import last_whole_checkpoint

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FEW_STEPS = {"objective": "per_step", "objective_steps": [1, 2, 4]}
# Second half of a VMD's training: one step a block is what z is for, the others are not to be forgotten.
WITH_LATENT = {
    "latent_size": 16,
    "prior": "learned",
    "objective": "per_step",
    "objective_steps": [1, 1, 1, 1, 1, 1, 2, 4],
    "latent_min_tokens": 3,
    "learning_rate": 1e-3,
}
# How each row changes the recipe. The numbers of updates make the training times about equal. The last of a row's
# stages starts from the model of the one before: a denoiser that has learned what the context tells, before z does.
ROWS: dict[str, list[dict[str, Any]]] = {
    "autoregressive": [{"block_size": 1, "objective": "per_sample", "objective_steps": [1], "max_steps": 4100}],
    "mdm": [{"objective": "vmd", "max_steps": 10000}],
    "vmd": [{"latent_size": 16, "objective": "vmd", "max_steps": 7000}],
    "block-4": [{"block_size": 4, **FEW_STEPS, "max_steps": 4000}],
    "block-8": [{"block_size": 8, **FEW_STEPS, "max_steps": 4100}],
    "vmd-4": [{"block_size": 4, **FEW_STEPS, "max_steps": 2000}, {**WITH_LATENT, "max_steps": 1600}],
    "vmd-8": [{"block_size": 8, **FEW_STEPS, "max_steps": 2050}, {**WITH_LATENT, "max_steps": 1600}],
}


def run_row(
    row: str, seed: int, recipe_arguments: list[str], folder: Path, num_eval_rows: int, split: str
) -> dict[str, Any]:
    """Trains and evaluates one model, unless its results are there."""
    if (folder / "row.json").exists():
        return json.loads((folder / "row.json").read_text())
    recipe, *changes = recipe_arguments
    stages = []
    for number, stage in enumerate(ROWS[row]):
        stage_folder = folder / f"stage-{number}"
        settings = ["--latent_size", "0"]
        for name, value in stage.items():
            settings += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        if number:
            settings += ["--model_name_or_path", str(folder / f"stage-{number - 1}")]
        arguments = parse([recipe, *settings, *changes, f"--seed={seed}", f"--output_dir={stage_folder}"])
        stages.append(run_stage(arguments, stage_folder / "stage.json"))
    model = VMDForMaskedDiffusion.from_pretrained(stage_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(stage_folder)
    result = {
        "row": row,
        "seed": seed,
        "stages": stages,
        "training_seconds": sum(stage["seconds"] for stage in stages),
        "parameters": model.num_parameters(),
        **evaluate_row(model, tokenizer, arguments[1], num_eval_rows, split),
    }
    write_json(folder / "row.json", result)
    return result


def run_stage(arguments: tuple[ModelArguments, DataArguments, TrainingArguments], path: Path) -> dict[str, Any]:
    """Trains, unless that is done, and says how long it takes (whatever part of it was done before a stop)."""
    if path.exists():
        return json.loads(path.read_text())
    training_args = arguments[2]
    training_args.resume_from_checkpoint = "true"
    checkpoint = last_whole_checkpoint(training_args.output_dir)
    first = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    start = time.perf_counter()
    updates = train(*arguments).state.global_step
    seconds = (time.perf_counter() - start) * updates / max(updates - first, 1)
    tokens = training_args.per_device_train_batch_size * arguments[1].sequence_length
    result = {"updates": updates, "seconds": seconds, "tokens_per_second": updates * tokens / seconds}
    write_json(path, result)
    return result


def evaluate_row(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    num_eval_rows: int,
    split: str,
) -> dict[str, Any]:
    """Bounds at 1, 2, 4 and 8 steps a block and one token a step, what the posterior uses, and a sample."""
    model.eval()
    length = data_args.sequence_length
    width = model.config.block_size or length
    rows = text_datasets(data_args.source, tokenizer, length, text_column=data_args.text_column)[split]
    batches = torch.as_tensor(rows[:num_eval_rows]["input_ids"]).to(model.device).split(50)
    num_steps = sorted({number for number in (1, 2, 4, 8) if number < width} | {width})
    few, many = ([number for number in num_steps if (number > 8) == is_many] for is_many in (False, True))
    evaluations = [EvaluationArguments(num_steps=few, num_draws=[1, 8])]
    evaluations += [EvaluationArguments(num_steps=many)] if many else []
    samples = {
        str(number): tokenizer.decode(draw_samples(model, length, 1, 0, do_sample=True, num_steps=number)[0])
        for number in num_steps
    }
    return {
        "width": width,
        "length": length,
        "passes_for_prior": int(model.config.prior == "learned"),
        "objective": evaluate_objective(model, batches),
        "bounds": [bound for evaluation in evaluations for bound in evaluate_bounds(model, batches, evaluation)],
        "samples": samples,
    }


def lines_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each row, seed, number of steps and number of draws."""
    return [
        {
            "row": result["row"],
            "seed": result["seed"],
            "steps a block": bound["num_steps"],
            "passes a character": passes_per_character(result, bound),
            "draws": bound["num_draws"],
            "bits a character": bound["bits_per_token"],
            "low": bound["low"],
            "high": bound["high"],
            "of it KL": bound["kl_bits_per_token"],
            "active units": result["objective"].get("active_units"),
        }
        for result in results
        for bound in result["bounds"]
    ]


def passes_per_character(result: dict[str, Any], bound: dict[str, Any]) -> float:
    return (bound["num_steps"] + result["passes_for_prior"]) / result["width"]


def draw_frontier(results: list[dict[str, Any]], path: Path) -> None:
    """Bits a character over forward passes a character, a line for each row (the lowest of its bounds)."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for result in results:
        lowest: dict[float, tuple[float, float]] = {}
        for bound in sorted(result["bounds"], key=lambda bound: -bound["bits_per_token"]):
            error = bound["high"] - bound["bits_per_token"]
            lowest[passes_per_character(result, bound)] = (bound["bits_per_token"], error)
        passes = sorted(lowest)
        bits, errors = zip(*(lowest[x] for x in passes), strict=True)
        axis.errorbar(passes, bits, errors, marker="o", capsize=3, label=f"{result['row']}, seed {result['seed']}")
    axis.set(xscale="log", xlabel="forward passes a character", ylabel="bits a character (upper bound, 95 % interval)")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num_eval_rows", type=int, default=300, help="Rows to evaluate on.")
    parser.add_argument("--eval_split", choices=["validation", "test"], default="test", help="validation: to tune on.")
    parser.add_argument("--output_dir", default="outputs/text_comparison")
    options, recipe_arguments = parser.parse_known_args(argv)
    if not (recipe_arguments and recipe_arguments[0].endswith(".yaml")):
        recipe_arguments = [str(Path(__file__).parent / "recipes" / "text_comparison.yaml"), *recipe_arguments]
    output_dir = Path(options.output_dir)
    results = [
        run_row(row, seed, recipe_arguments, output_dir / f"{row}-{seed}", options.num_eval_rows, options.eval_split)
        for seed in options.seeds
        for row in options.rows
    ]
    print_table("Upper bounds on the bits a character, with their 95 % interval", lines_of(results))
    write_json(output_dir / "results.json", results)
    draw_frontier(results, figure := output_dir / "frontier.png")
    print(f"frontier: {figure}; results: {output_dir}/results.json")


if __name__ == "__main__":
    main(sys.argv[1:])
