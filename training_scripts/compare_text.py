"""Train autoregressive, masked diffusion, block diffusion and VMD models of text, and compare bounds on their bits.

    python training_scripts/compare_text.py
    python training_scripts/compare_text.py --rows block-4 vmd-4 --seeds 0 1 2

All models have the same size (a VMD also has its latent path), the same data in the same order and about the same
training time: the numbers of updates were chosen for that, and the time that a row took is reported. Each stage reads
the rows from the start. The bounds are those of `vmd_hf.corpus_bound` (`per_step`) on the test split, for samplers of
1, 2, 4 and 8 steps a block, of 32 for whole rows, and of one token a step, in random order and (without a Gaussian
latent: exactly) from left to right. Prints a table, and one of the differences from the model without a latent on the
same rows, writes `results.json`, and draws bits a character, in the better order, over function evaluations (NFE) and
time a character, of all rows in the output folder. A row or
a stage that is there already is not trained again, and one that was interrupted goes on from its last checkpoint; so a
folder is of one recipe and of the same arguments. All other arguments are those of train_vmd.py, and change every row.
Models are trained and evaluated on the accelerator if there is one; `--device cpu` leaves it alone.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vmd_hf.data.text import load_documents, text_datasets
from vmd_hf.evaluation.comparison import (
    Rows,
    lowest_bounds,
    parse_comparison,
    run_rows,
    train_row,
    training_lines,
)
from vmd_hf.evaluation.sampling import draw_samples
from vmd_hf.evaluation.speed import sampling_seconds
from vmd_hf.evaluation.tables import print_table
from vmd_hf.evaluation.text import batches_of, bound_row, corpus_bounds, evaluate_objective, largest_step
from vmd_hf.hub import load_model, load_tokenizer
from vmd_hf.likelihood import confidence_interval, ratio_of_sums
from vmd_hf.recipes import DataArguments

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECIPES = Path(__file__).parent / "recipes"


def settings_of(recipe: str, *names: str) -> dict[str, Any]:
    """These arguments of a recipe."""
    settings = yaml.safe_load((RECIPES / recipe).read_text())
    return {name: settings[name] for name in names}


# Of models with blocks: one step a block is what z is for, so most of the training is for it (5 of 8 rows without a
# latent, 3 of 5 with one).
PER_STEP = settings_of("sotu.yaml", "objective", "objective_steps")
PER_STEP_OF_8 = PER_STEP | {"objective_steps": [1, 1, 1, 1, 2, 2, 4, 8]}
PER_STEP_OF_16 = PER_STEP | {"objective_steps": [1, 1, 1, 1, 1, 2, 2, 4, 8, 16]}
# The second stage of a VMD with blocks: it learns to use the context before it gets a latent.
WITH_LATENT = settings_of(
    "sotu_latent.yaml",
    "latent_size",
    "latent_input",
    "prior",
    "objective",
    "objective_steps",
    "latent_min_tokens",
    "kl_warmup_ratio",
    "learning_rate",
) | {"max_steps": 1400}
WITH_LATENT_OF_8 = WITH_LATENT | {"objective_steps": [1, 1, 1, 2, 4, 8], "kl_warmup_ratio": 0.5, "max_steps": 1300}
CAUSAL = {"causal_head_size": 128}  # the rival of the chain (see causal_vmd.py)
# What a chain gains in one step leaves room for the others: fewer rows are trained for one.
CHAIN = settings_of("sotu_chain.yaml", "latent_type", "latent_size", "conditioning_size", "objective")
# The first stage of all but the autoregressive model, in which the learning rate does not fall yet.
FIRST_STAGE = {"lr_scheduler_type": "constant_with_warmup"}
BLOCKS_OF_4 = {"block_size": 4, **PER_STEP, **FIRST_STAGE, "max_steps": 1900}
BLOCKS_OF_8 = {"block_size": 8, **PER_STEP_OF_8, **FIRST_STAGE, "max_steps": 1850}
BLOCKS_OF_16 = {"block_size": 16, **PER_STEP_OF_16, **FIRST_STAGE, "max_steps": 1850}
# The usual objective of masked diffusion: as many steps as a block has tokens, each of which reveals one.
ONE_OF_4, ONE_OF_8, ONE_OF_16 = ({"objective_steps": [size]} for size in (4, 8, 16))
WHOLE_ROWS = {"objective": "vmd", **FIRST_STAGE, "max_steps": 4400}
# How each row changes the recipe, in stages that start from one another. The numbers of updates make the training
# times about equal, ten to thirteen minutes on two CPU cores.
ROWS: Rows = {
    "autoregressive": [{"block_size": 1, "objective": "per_sample", "objective_steps": [1], "max_steps": 3700}],
    "mdm": [WHOLE_ROWS, {"objective": "vmd", "max_steps": 4400}],
    "vmd": [WHOLE_ROWS, {"latent_size": 16, "objective": "vmd", "learning_rate": 1e-3, "max_steps": 3250}],
    "block-4": [BLOCKS_OF_4, {**PER_STEP, "max_steps": 1900}],
    "block-8": [BLOCKS_OF_8, {**PER_STEP_OF_8, "max_steps": 1850}],
    "vmd-4": [BLOCKS_OF_4, WITH_LATENT],
    "vmd-4-standard-prior": [BLOCKS_OF_4, WITH_LATENT | {"prior": "standard"}],
    "vmd-8": [BLOCKS_OF_8, WITH_LATENT_OF_8],
    "chain-4": [BLOCKS_OF_4, {**CHAIN, "objective_steps": [1, 1, 2, 4, 4], "max_steps": 1650}],
    "chain-8": [BLOCKS_OF_8, {**CHAIN, "objective_steps": [1, 1, 2, 4, 8, 8], "max_steps": 1600}],
    "causal-4": [BLOCKS_OF_4, {**PER_STEP, **CAUSAL, "max_steps": 1750}],
    "causal-8": [BLOCKS_OF_8, {**PER_STEP_OF_8, **CAUSAL, "max_steps": 1550}],
    "block-4-usual": [BLOCKS_OF_4 | ONE_OF_4, {**PER_STEP, **ONE_OF_4, "max_steps": 1900}],
    "block-8-usual": [BLOCKS_OF_8 | ONE_OF_8, {**PER_STEP_OF_8, **ONE_OF_8, "max_steps": 1850}],
    "block-16": [BLOCKS_OF_16, {**PER_STEP_OF_16, "max_steps": 1850}],
    "chain-16": [BLOCKS_OF_16, {**CHAIN, "objective_steps": [1, 1, 2, 4, 8, 16, 16], "max_steps": 1600}],
    "causal-16": [BLOCKS_OF_16, {**PER_STEP_OF_16, **CAUSAL, "max_steps": 1400}],
    "block-16-usual": [BLOCKS_OF_16 | ONE_OF_16, {**PER_STEP_OF_16, **ONE_OF_16, "max_steps": 1850}],
}


def run_row(
    row: str,
    seed: int,
    recipe: str,
    changes: list[str],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Trains and evaluates one model."""
    folder, data_args, stages = train_row(ROWS, row, seed, recipe, changes, Path(options.output_dir), options.device)
    model = load_model(folder, options.device)
    return {
        "parameters": model.num_parameters(),
        "training": stages,
        **evaluate_row(model, load_tokenizer(folder), data_args, options.num_eval_rows, options.eval_split),
    }


def evaluate_row(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    num_eval_rows: int,
    split: str,
) -> dict[str, Any]:
    """Bounds at 1, 2, 4, 8 and 32 steps a block and one token a step, what the posterior uses, and a sample."""
    model.eval()
    length = data_args.sequence_length
    width = model.config.block_size or length
    documents = {split: load_documents(data_args.source, text_column=data_args.text_column)[split]}
    rows = text_datasets(documents, tokenizer, length)[split]
    batches = batches_of(rows, num_eval_rows, model)
    num_steps = sorted({number for number in (1, 2, 4, 8, 32) if number < width} | {width})
    found = {}
    for order in ("random", "left_to_right") if model.config.gaussian_size == 0 else ("random",):
        for number in num_steps if order == "random" else num_steps[1:]:  # one step has no order
            draws = [1, 16] if number <= 8 else [1]
            of_number = corpus_bounds(model, batches, [number], draws, order=order)
            found |= {(order, *key): value for key, value in of_number.items()}
    bounds = [
        {**bound_row("per_step", *key, *value), "row_bits": [round(bits, 4) for bits in value[0].row_bits.tolist()]}
        for key, value in found.items()
    ]
    samples = {
        str(number): tokenizer.decode(draw_samples(model, length, 1, 0, do_sample=True, num_steps=number)[0])
        for number in num_steps
    }
    return {
        "width": width,
        "length": length,
        "latent_min_tokens": model.config.latent_min_tokens if model.config.prior == "learned" else None,
        "objective": evaluate_objective(model, batches),
        "bounds": bounds,
        "seconds": {str(number): sampling_seconds(model, length, number) for number in num_steps},
        "samples": samples,
    }


def lines_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each row, seed, number of steps and number of draws."""
    return [
        {
            "row": result["row"],
            "seed": result["seed"],
            "order": bound["order"],
            "steps a block": bound["num_steps"],
            "NFE a character": nfe_per_character(result, bound),
            "ms a character": milliseconds_per_character(result, bound),
            "importance samples": bound["num_draws"],
            "bits a character": bound["bits_per_token"],
            "low": bound["low"],
            "high": bound["high"],
            "of it KL": bound["kl_bits_per_token"],
            "active units": result["objective"].get("active_units"),
        }
        for result in results
        for bound in result["bounds"]
    ]


def differences_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with blocks less the one without a latent, of the same blocks and seed, for each number of steps: their
    lowest bounds, on the same rows of text, with a paired 95 % interval."""
    found = {(result["row"], result["seed"]): result for result in results}
    lines = []
    for (row, seed), result in found.items():
        without = found.get((f"block-{result['width']}", seed))
        if without is None or without is result:
            continue
        others = lowest_bounds(without["bounds"], "bits_per_token")
        for steps, bound in sorted(lowest_bounds(result["bounds"], "bits_per_token").items()):
            other = others[steps]
            bits = torch.tensor([bound["row_bits"], other["row_bits"]], dtype=torch.float64)
            mean, error = ratio_of_sums(bits[0] - bits[1], torch.full_like(bits[0], result["length"]))
            low, high = confidence_interval(mean, error)
            relative = 100 * mean / other["bits_per_token"]
            line = {"row": row, "seed": seed, "steps a block": steps, "bits": bound["bits_per_token"]}
            line |= {"order": bound["order"], "without": other["bits_per_token"], "its order": other["order"]}
            lines.append(line | {"difference": mean, "low": low, "high": high, "%": relative})
    return lines


def nfe_per_character(result: dict[str, Any], bound: dict[str, Any]) -> float:
    """A learned prior takes one more for a block, where a step reveals enough tokens for a latent."""
    fewest, width, num_steps = result["latent_min_tokens"], result["width"], bound["num_steps"]
    return (num_steps + (fewest is not None and largest_step(width, num_steps) >= fewest)) / width


def milliseconds_per_character(result: dict[str, Any], bound: dict[str, Any]) -> float:
    """Of sampling 16 texts at once."""
    return 1000 * result["seconds"][str(bound["num_steps"])]


def draw_frontier(results: list[dict[str, Any]], path: Path) -> None:
    """Bits a character over NFE, and over milliseconds, a character, a line for each row and seed."""
    figure, axes = plt.subplots(1, 2, figsize=(14, 5), layout="constrained", sharey=True)
    colours = {row: plt.get_cmap("tab20")(number % 20) for number, row in enumerate(ROWS)}
    for axis, cost in zip(axes, (nfe_per_character, milliseconds_per_character), strict=True):
        labelled = set()
        for result in results:
            found = lowest_bounds(result["bounds"], "bits_per_token")
            lowest = sorted(found.values(), key=lambda bound: cost(result, bound))
            costs = [cost(result, bound) for bound in lowest]
            bits = [bound["bits_per_token"] for bound in lowest]
            errors = [bound["high"] - bound["bits_per_token"] for bound in lowest]
            label = None if result["row"] in labelled else result["row"]
            labelled.add(result["row"])
            axis.errorbar(costs, bits, errors, marker="o", capsize=3, color=colours[result["row"]], label=label)
        axis.set_xscale("log")
    axes[0].set(xlabel="NFE a character", ylabel="bits a character (upper bound, 95 % interval)")
    axes[1].set(xlabel="milliseconds a character, 16 texts at once")
    axes[1].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_eval_rows", type=int, default=300, help="Rows, taken evenly from the split.")
    default = RECIPES / "text_comparison.yaml"
    options, recipe, changes = parse_comparison(parser, argv, ROWS, default, "outputs/text_comparison")
    results = run_rows(ROWS, options, lambda row, seed: run_row(row, seed, recipe, changes, options))
    print_table("Upper bounds on the bits a character, with their 95 % interval", lines_of(results))
    print_table("Less the model without a latent, on the same rows", differences_of(results))
    print_table("Training", training_lines(results))
    draw_frontier(results, figure := Path(options.output_dir) / "frontier.png")
    print(f"frontier: {figure}; results: {options.output_dir}/results.json")


if __name__ == "__main__":
    main(sys.argv[1:])
