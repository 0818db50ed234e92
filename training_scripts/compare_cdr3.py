"""Train models of T-cell receptor sequences, whose distribution is known, and report their bits above the truth.

    python training_scripts/compare_cdr3.py
    python training_scripts/compare_cdr3.py --rows mdm chain --max_steps 6000 --output_dir outputs/cdr3_long

Needs olga (pip install vmd_hf[olga], GPL-3), which draws the sequences and knows their exact probabilities. All models
have the same size (a VMD also has its latent path), the same data in the same order and about the same training time.
Of 1,000 test sequences it reports the bits a sequence, exact or a bound, of samplers of 1, 2, 4, 8 and 28 steps less
the true ones, paired; and of 1,000 samples of each how many are possible, and their true probabilities beside those of
real sequences. Prints tables, draws bits over forward passes and writes `results.json`. A row that is there already is
not trained or evaluated again, and one that was interrupted goes on from its last checkpoint; so a folder is of one
recipe and of the same arguments. All other arguments are those of train_vmd.py, and change every row.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib

from vmd_hf.data.receptors import ROW_LENGTH, SPLIT_SEEDS, log2_probabilities, receptor_sequences
from vmd_hf.evaluation.comparison import (
    Rows,
    lowest_bounds,
    parse_comparison,
    run_rows,
    train_row,
    training_lines,
)
from vmd_hf.evaluation.receptors import evaluate_receptor_bounds, evaluate_receptor_samples, mean_and_error
from vmd_hf.evaluation.tables import print_table
from vmd_hf.hub import load_model

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECIPES = Path(__file__).parent / "recipes"
NUM_STEPS = (1, 2, 4, 8, ROW_LENGTH)

FEW_STEPS = {"objective": "per_step", "objective_steps": [1, 1, 2, 4, 8, ROW_LENGTH]}
# How each row changes the recipe, in stages that start from one another (here one). The numbers of updates make the
# training times about equal, six to seven minutes of one CPU core.
ROWS: Rows = {
    "mdm": [{**FEW_STEPS, "max_steps": 4100}],
    "mdm-one-a-step": [{"objective": "per_step", "objective_steps": [ROW_LENGTH], "max_steps": 4100}],
    "gaussian": [
        {
            **FEW_STEPS,
            "latent_size": 16,
            "latent_input": "layers_and_positions",
            "latent_min_tokens": 3,
            "kl_warmup_ratio": 0.3,
            "max_steps": 2650,
        }
    ],
    "chain": [
        {
            "objective": "per_step",
            "objective_steps": [1, 2, 4, 8, ROW_LENGTH, ROW_LENGTH],
            "latent_type": "chain",
            "latent_size": 32,
            "conditioning_size": 64,
            "max_steps": 2500,
        }
    ],
    "causal": [{**FEW_STEPS, "causal_head_size": 128, "max_steps": 2900}],
}


def run_row(
    row: str,
    seed: int,
    recipe: str,
    changes: list[str],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Trains and evaluates one model."""
    folder, _, stages = train_row(ROWS, row, seed, recipe, changes, Path(options.output_dir), options.device)
    model = load_model(folder, options.device)
    sequences = receptor_sequences(options.num_sequences, SPLIT_SEEDS[options.eval_split])
    return {
        "parameters": model.num_parameters(),
        "training": stages,
        "bounds": evaluate_receptor_bounds(model, sequences, NUM_STEPS, options.num_orders),
        "samples": evaluate_receptor_samples(model, sequences, NUM_STEPS, len(sequences)),
    }


def bound_lines(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bits above the truth of each row, order and number of importance samples: a column for each number of steps,
    with the 95 % interval. What one step gives has no order."""
    lines = []
    for result in results:
        found = {(bound["num_steps"], bound["order"], bound["num_draws"]): bound for bound in result["bounds"]}
        for order, draws in sorted({(order, draws) for _, order, draws in found if order}, reverse=True):
            line = {"row": result["row"], "seed": result["seed"], "order": order, "draws": draws}
            for steps in NUM_STEPS:
                key = (steps, order if steps > 1 else None)
                bound = found.get((*key, draws)) or found[(*key, 1)]  # where no latent is drawn
                line[f"T = {steps}"] = f"{bound['above']:.2f} [{bound['low']:.2f}, {bound['high']:.2f}]"
            lines.append(line)
    return lines


def sample_lines(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each row and number of steps."""
    names = ("num_steps", "possible", "distinct", "sampled bits", "sampled error", "real bits", "seconds")
    return [
        {"row": result["row"], "seed": result["seed"], **{name: sample[name] for name in names}}
        for result in results
        for sample in result["samples"]
    ]


def draw_frontier(results: list[dict[str, Any]], path: Path) -> None:
    """Bits above the truth over forward passes, a line for each row (and seed), in random order."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for result in results:
        lowest = lowest_bounds([each for each in result["bounds"] if each["order"] in (None, "random")], "above")
        steps = sorted(lowest)
        above = [lowest[number]["above"] for number in steps]
        errors = [lowest[number]["high"] - lowest[number]["above"] for number in steps]
        colour = f"C{list(ROWS).index(result['row'])}"
        axis.errorbar(steps, above, errors, marker="o", capsize=3, color=colour, label=result["row"])
    axis.set(xscale="log", yscale="log", xlabel="forward passes a sequence", ylabel="bits a sequence above the truth")
    axis.set_xticks(NUM_STEPS, [str(number) for number in NUM_STEPS])
    axis.set_yticks([0.5, 1, 2, 3, 5, 10, 20], ["0.5", "1", "2", "3", "5", "10", "20"])
    axis.minorticks_off()
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_sequences", type=int, default=1000, help="Of the split, and samples.")
    parser.add_argument("--num_orders", type=int, default=2, help="Random orders that are averaged.")
    default = RECIPES / "cdr3_comparison.yaml"
    options, recipe, changes = parse_comparison(parser, argv, ROWS, default, "outputs/cdr3_comparison")
    results = run_rows(ROWS, options, lambda row, seed: run_row(row, seed, recipe, changes, options))
    truth = -log2_probabilities(receptor_sequences(options.num_sequences, SPLIT_SEEDS[options.eval_split]))
    entropy, error = mean_and_error(truth)
    print_table(
        f"Bits a sequence above the true {entropy:.2f} +- {error:.2f} (standard error), with their 95 % interval",
        bound_lines(results),
    )
    print_table("Samples: the share that is possible, distinct ones among these, true -log2 p", sample_lines(results))
    print_table("Training", training_lines(results))
    draw_frontier(results, figure := Path(options.output_dir) / "frontier.png")
    print(f"frontier: {figure}; results: {options.output_dir}/results.json")


if __name__ == "__main__":
    main(sys.argv[1:])
