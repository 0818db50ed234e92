"""Train MDM and VMD side by side on a synthetic joint distribution, and compare them with each other and the paper.

    python training_scripts/quick_start.py
    python training_scripts/quick_start.py training_scripts/recipes/d2.yaml --variants mdm vmd per_sample per_step
    python training_scripts/quick_start.py training_scripts/recipes/d1.yaml --seeds 0 1 2 --output_dir outputs/d1-seeds

Prints accuracy and KL of every sampler beside the figures of the paper (arXiv 2510.23606), draws heat maps of the
joint distribution, writes `results.json`, then loads the last model again through `AutoModelForMaskedLM` and samples
from it. All other arguments are those of train_vmd.py. Models are trained and sampled on the accelerator if there is
one; `--device cpu` leaves it alone.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from vmd_hf.data.synthetic import independent_accuracy, independent_marginals_kl, joint_counts, target_distribution
from vmd_hf.evaluation.synthetic import evaluate_synthetic
from vmd_hf.evaluation.tables import print_table, write_json
from vmd_hf.hub import default_device
from vmd_hf.recipes import parse
from vmd_hf.training_run import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Each variant: how the recipe changes; the denoiser and the number of updates stay as they are.
VARIANTS = {
    "mdm": {"latent_size": 0},
    "vmd": {"objective": "vmd"},
    "per_sample": {"objective": "per_sample"},
    "per_step": {"objective": "per_step"},
    "chain": {"objective": "per_step", "latent_type": "chain", "latent_size": 16},
}
SAMPLED = ("mdm", "chain")  # whose distribution is that of tokens that are drawn

# Accuracy in percent and KL in nats, from the tables of arXiv 2510.23606: one block of four tokens, or two of two, by
# setting, tokens a block, variant and steps a block.
PAPER = {
    ("d1", 4, "mdm", 1): "0.1 %, 9.42",
    ("d1", 4, "mdm", 4): "99.3 %, 0.010",
    ("d1", 4, "vmd", 1): "87.3 %, 0.165",
    ("d1", 4, "vmd", 4): "100 %, 0.033",
    ("d2", 4, "mdm", 1): "1.1 %, 7.49",
    ("d2", 4, "mdm", 4): "99.1 %, 0.015",
    ("d2", 4, "vmd", 1): "80.0 %, 0.268",
    ("d2", 4, "vmd", 4): "100 %, 0.475",
    ("d1", 2, "mdm", 1): "10.1 %, 2.298",
    ("d1", 2, "mdm", 2): "99.4 %, 0.007",
    ("d1", 2, "vmd", 1): "94.2 %, 0.068",
    ("d1", 2, "vmd", 2): "100 %, 0.012",
    ("d2", 2, "mdm", 1): "1.1 %, 7.656",
    ("d2", 2, "mdm", 2): "99.3 %, 0.018",
    ("d2", 2, "vmd", 1): "88.6 %, 0.148",
    ("d2", 2, "vmd", 2): "100 %, 0.018",
}


def run_variant(
    variant: str, seed: int, recipe_arguments: list[str], output_dir: str, num_samples: int, device: torch.device
) -> tuple[list[dict[str, Any]], dict[int, torch.Tensor]]:
    """Trains and evaluates one model: results, and for the heat maps the better of its samples in one step."""
    settings = [f"--{name}={value}" for name, value in VARIANTS[variant].items()]
    folder = f"{output_dir}/{variant}-{seed}"
    model_args, data_args, training_args = parse(
        [*recipe_arguments, *settings, f"--seed={seed}", f"--output_dir={folder}"]
    )
    start = time.perf_counter()
    trainer = train(model_args, data_args, training_args)
    seconds = time.perf_counter() - start

    width = model_args.block_size or target_distribution(data_args.setting, data_args.correlation).dim()
    model, num_steps = trainer.model.to(device), [n for n in (1, 2, 4) if n <= width]
    evaluation = evaluate_synthetic(model, data_args.setting, data_args.correlation, num_steps, num_samples)
    identity = {"variant": variant, "seed": seed, "tokens_per_block": width}
    results, one_step, lowest = [], None, math.inf
    for result, samples in evaluation:
        if variant in SAMPLED and not result["sampler"].endswith("sampled"):
            continue
        results.append({**identity, **result, "training_seconds": round(seconds, 1)})
        if result["num_steps"] == 1 and result["kl"] < lowest:
            one_step, lowest = samples, result["kl"]
    return results, one_step


def summarise(setting: str, results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One line for each variant, step count and sampler: mean over seeds, spread (half the range), the paper's."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        key = tuple(result[name] for name in ("tokens_per_block", "variant", "num_steps", "sampler"))
        groups.setdefault(key, []).append(result)
    lines = []
    for (width, variant, num_steps, sampler), group in groups.items():
        accuracies = [100 * result["accuracy"] for result in group]
        kls = [result["kl"] for result in group]
        papers_pairing = variant == "mdm" or (variant == "vmd" and sampler == "shared latent, argmax")
        lines.append(
            {
                "model": variant,
                "steps a block": str(num_steps),
                "sampler": sampler,
                "accuracy %": _mean_and_spread(accuracies, 2),
                "KL": _mean_and_spread(kls, 4),
                "paper": PAPER.get((setting, width, variant, num_steps), "") if papers_pairing else "",
            }
        )
    return lines


def _mean_and_spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def draw_heat_maps(title: str, target: torch.Tensor, samples: dict[str, torch.Tensor], path: Path) -> None:
    """Joint distribution of neighbouring tokens: the truth, then each model's one-step samples."""
    joints = {"truth": target}
    joints |= {f"{name}, one step": joint_counts(ids).double() / len(ids) for name, ids in samples.items()}
    pairs = [(first, first + 1) for first in range(target.dim() - 1)]
    figure, axes = plt.subplots(
        len(pairs), len(joints), figsize=(3 * len(joints), 3 * len(pairs) + 0.4), squeeze=False, layout="constrained"
    )
    for row, pair in zip(axes, pairs, strict=True):
        others = [axis for axis in range(target.dim()) if axis not in pair]
        tables = [joint.sum(others) if others else joint for joint in joints.values()]
        for axis, name, table in zip(row, joints, tables, strict=True):
            image = axis.imshow(table, vmin=0, vmax=float(tables[0].max()), cmap="viridis")
            axis.set(title=name, xlabel=f"token {pair[1] + 1}", ylabel=f"token {pair[0] + 1}")
            axis.set(xticks=range(0, 10, 3), yticks=range(0, 10, 3))
        figure.colorbar(image, ax=row, label="probability")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show_reloaded(folder: str, device: torch.device) -> None:
    """What a user does with the saved model."""
    model = AutoModelForMaskedLM.from_pretrained(folder).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = model.config.max_position_embeddings
    masks = torch.full((8, length), tokenizer.mask_token_id, device=device)
    ids = model.generate(masks, num_steps=1, generator=torch.Generator().manual_seed(0))
    print(f"loaded from {folder}; eight samples in one step: {' '.join(tokenizer.batch_decode(ids))}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["mdm", "vmd"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num_samples", type=int, default=100_000)
    parser.add_argument("--output_dir", default="outputs/quick_start")
    parser.add_argument("--device", type=torch.device, default=default_device())
    options, recipe_arguments = parser.parse_known_args(argv)
    if not (recipe_arguments and recipe_arguments[0].endswith(".yaml")):
        recipe_arguments = [str(Path(__file__).parent / "recipes" / "d1.yaml"), *recipe_arguments]

    if options.device.type == "cpu":
        recipe_arguments.append("--use_cpu=true")

    data_args = parse(recipe_arguments)[1]
    target = target_distribution(data_args.setting, data_args.correlation)
    results, maps = [], {}
    for seed in options.seeds:
        for variant in options.variants:
            new, one_step = run_variant(
                variant, seed, recipe_arguments, options.output_dir, options.num_samples, options.device
            )
            results += new
            maps.setdefault(variant.upper() if variant in ("mdm", "vmd") else variant, one_step)
            write_json(f"{options.output_dir}/results.json", results)

    name = data_args.setting if data_args.correlation is None else f"{data_args.setting}, p = {data_args.correlation}"
    print_table(
        f"{name}: {options.num_samples:,} samples, seeds {options.seeds}", summarise(data_args.setting, results)
    )
    print(
        "Tokens drawn independently of each other from the true marginals: accuracy "
        f"{100 * independent_accuracy(data_args.setting, data_args.correlation):.2f} %, KL "
        f"{independent_marginals_kl(data_args.setting, data_args.correlation):.3f}: what one step of an MDM can reach."
    )
    draw_heat_maps(name, target, maps, figure := Path(options.output_dir) / "heat_maps.png")
    print(f"heat maps: {figure}; results: {options.output_dir}/results.json")
    show_reloaded(f"{options.output_dir}/{options.variants[-1]}-{options.seeds[-1]}", options.device)


if __name__ == "__main__":
    main(sys.argv[1:])
