"""Fill the CDR3 loops of antibodies by a pretrained BERT, in one or a few passes, with a latent and without.

    pip install vmd_hf[olga] && pip install --no-deps antiberty==0.1.3
    python training_scripts/compare_antibodies.py
    python training_scripts/compare_antibodies.py --rows bert chain --num_sequences 1000

The BERT is AntiBERTy (26 million weights, in the package antiberty, of which nothing else is used), or any folder of a
BERT with its tokens (`--backbone`). It is given a heavy chain, but for a loop of known length; loops are drawn by olga
(GPL-3), which knows the exact probability of each. Rows: the BERT as it is; with a Gaussian latent or a chain, trained
alone with the BERT frozen; adapted by LoRA without a latent, and with a chain that was begun on the frozen BERT. All
that is trained is trained for about the same time.

Of test loops it reports the bits less the true ones, paired, of samplers of 1, 2, 4 and 16 steps (as many as the
longest loop has residues, so one at a time), each in random order: exact in one step without a Gaussian latent, else
upper bounds. Of a loop that each row generates in the place of each test loop: how many are possible, their true
probabilities, and how varied they are, beside the real ones. Prints tables, draws bits and probabilities over forward
passes, and writes `results.json`. A row that is there already is not trained or evaluated again, and one that was
interrupted goes on from its last checkpoint; so a folder is of one recipe and of the same arguments. All other
arguments are those of train_vmd.py, and change every row.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from transformers import AutoModelForMaskedLM

from vmd_hf import VMDForMaskedDiffusion
from vmd_hf.data.antibodies import (
    LONGEST_LOOP,
    antiberty_folder,
    antibody_tokenizer,
    loop_log2_probabilities,
    loop_sequences,
)
from vmd_hf.data.receptors import SPLIT_SEEDS
from vmd_hf.evaluation.antibodies import evaluate_loop_bounds, evaluate_loop_samples
from vmd_hf.evaluation.comparison import (
    Rows,
    lowest_bounds,
    parse_comparison,
    run_rows,
    train_row,
    training_lines,
)
from vmd_hf.evaluation.receptors import mean_and_error
from vmd_hf.evaluation.tables import print_table
from vmd_hf.hub import load_model
from vmd_hf.recipes import parse

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECIPES = Path(__file__).parent / "recipes"
NUM_STEPS = (1, 2, 4, LONGEST_LOOP)

FROZEN_CHAIN = {"freeze_backbone": True, "latent_type": "chain", "latent_size": 64, "conditioning_size": 64}
FROZEN_GAUSSIAN = {"freeze_backbone": True, "latent_size": 16, "latent_min_tokens": 3, "kl_warmup_ratio": 0.3}
LORA = {"lora_r": 8, "learning_rate": 1e-3}
# How each row changes the recipe, in stages that start from one another. The numbers of updates make the training
# times about equal, eight minutes of one thread of a CPU.
ROWS: Rows = {
    "bert": [],
    "gaussian": [{**FROZEN_GAUSSIAN, "max_steps": 240}],
    "chain": [{**FROZEN_CHAIN, "max_steps": 600}],
    "lora": [{**LORA, "max_steps": 270}],
    "lora-chain": [{**FROZEN_CHAIN, "max_steps": 300}, {**LORA, "max_steps": 130}],
}


def prepare_backbone(folder: Path, recipe: str, changes: list[str], source: str | None) -> None:
    """What all rows begin with: the BERT as a masked diffusion model without a latent, and its tokenizer. (It has no
    dropout: what is trained is small, and the BERT gives it the same numbers in training as later.)"""
    if (folder / "config.json").exists():  # which is written last
        return
    settings, *_ = parse([recipe, *changes])
    tokenizer = antibody_tokenizer()
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = AutoModelForMaskedLM.from_pretrained(source or antiberty_folder(), **dropout)
    model = VMDForMaskedDiffusion.from_masked_lm(
        bert,
        latent_size=0,
        mask_token_id=tokenizer.mask_token_id,
        objective=settings.objective,
        objective_steps=settings.objective_steps,
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def run_row(row: str, seed: int, recipe: str, changes: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Trains and evaluates one model."""
    output_dir = Path(options.output_dir)
    folder, stages = output_dir / "backbone", []
    prepare_backbone(folder, recipe, changes, options.backbone)
    if ROWS[row]:
        folder, _, stages = train_row(ROWS, row, seed, recipe, changes, output_dir, options.device, folder)
    model = load_model(folder, options.device)
    loops = loop_sequences(options.num_sequences, SPLIT_SEEDS[options.eval_split])
    result: dict[str, Any] = {"parameters": model.num_parameters(), "training": stages}
    with torch.autocast(options.device.type, torch.bfloat16):  # as in training; twice as fast on CPUs that have it
        result["bounds"] = evaluate_loop_bounds(model, loops, NUM_STEPS, options.num_orders, options.num_draws)
        result["samples"] = evaluate_loop_samples(model, loops, NUM_STEPS)
    return result


def bound_lines(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bits above the truth of each row and number of importance samples: a column for each number of steps, with the
    95 % interval."""
    lines = []
    for result in results:
        found = {(bound["num_steps"], bound["num_draws"]): bound for bound in result["bounds"]}
        for draws in sorted({draws for _, draws in found}):
            line = {"row": result["row"], "seed": result["seed"], "draws": draws}
            for steps in NUM_STEPS:
                bound = found.get((steps, draws)) or found[steps, 1]  # where no latent is drawn
                line[f"T = {steps}"] = f"{bound['above']:.2f} [{bound['low']:.2f}, {bound['high']:.2f}]"
            lines.append(line)
    return lines


def sample_lines(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each row and number of steps, and one of the real loops."""
    lines = []
    for result in results:
        for sample in result["samples"]:
            line = {name: result[name] for name in ("row", "seed")}
            line |= {name: sample[name] for name in ("num_steps", "possible", "distinct")}
            line |= {"bits": sample["sampled bits"], "error": sample["sampled error"]}
            line |= {f"{share} %": sample[f"sampled {share} %"] for share in (10, 50, 90)}
            lines.append(line | {"identity": sample["sampled identity"], "seconds": sample["seconds"]})
    real = {"row": "real", "seed": "", "num_steps": "", "possible": 1.0, "distinct": sample["real distinct"]}
    real |= {"bits": sample["real bits"], "error": sample["real error"]}
    real |= {f"{share} %": sample[f"real {share} %"] for share in (10, 50, 90)}
    return [*lines, real | {"identity": sample["real identity"], "seconds": ""}]


def draw_frontier(results: list[dict[str, Any]], path: Path) -> None:
    """Bits above the truth, and true -log2 p of what is generated, over forward passes, a line for each row."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for result in results:
        colour = f"C{list(ROWS).index(result['row'])}"
        lowest = lowest_bounds(result["bounds"], "above")
        above = [lowest[steps]["above"] for steps in NUM_STEPS]
        errors = [lowest[steps]["high"] - lowest[steps]["above"] for steps in NUM_STEPS]
        axes[0].errorbar(NUM_STEPS, above, errors, marker="o", capsize=3, color=colour, label=result["row"])
        bits = [sample["sampled bits"] for sample in result["samples"]]
        errors = [1.96 * sample["sampled error"] for sample in result["samples"]]
        axes[1].errorbar(NUM_STEPS, bits, errors, marker="o", capsize=3, color=colour, label=result["row"])
    axes[1].axhline(results[0]["samples"][0]["real bits"], color="black", linestyle=":", label="real loops")
    axes[0].set(ylabel="bits a loop above the truth")
    axes[1].set(ylabel="true $-\\log_2 p$ of generated loops")
    for axis in axes:
        axis.set(xscale="log", xlabel="forward passes a loop")
        axis.set_xticks(NUM_STEPS, [str(number) for number in NUM_STEPS])
        axis.minorticks_off()
    axes[1].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_sequences", type=int, default=200, help="Of the split, and samples.")
    parser.add_argument("--num_orders", type=int, default=1, help="Random orders that are averaged.")
    parser.add_argument("--num_draws", type=int, default=4, help="Importance samples of a Gaussian latent.")
    parser.add_argument("--backbone", help="Folder of a BERT of amino acids. Default: AntiBERTy.")
    default = RECIPES / "antibody_comparison.yaml"
    options, recipe, changes = parse_comparison(parser, argv, ROWS, default, "outputs/antibody_comparison")
    results = run_rows(ROWS, options, lambda row, seed: run_row(row, seed, recipe, changes, options))
    truth = -loop_log2_probabilities(loop_sequences(options.num_sequences, SPLIT_SEEDS[options.eval_split]))
    entropy, error = mean_and_error(truth)
    print_table(
        f"Bits a loop above the true {entropy:.2f} +- {error:.2f} (standard error), with their 95 % interval",
        bound_lines(results),
    )
    print_table(
        "Generated loops: the share that is possible, distinct ones among these, their true -log2 p (mean, standard "
        "error, quantiles), identity of pairs, seconds",
        sample_lines(results),
    )
    if training := training_lines(results):
        print_table("Training", training)
    draw_frontier(results, figure := Path(options.output_dir) / "frontier.png")
    print(f"frontier: {figure}; results: {options.output_dir}/results.json")


if __name__ == "__main__":
    main(sys.argv[1:])
