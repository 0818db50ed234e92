"""Train autoregressive, masked diffusion, block diffusion and VMD models of text, and compare bounds on their bits.

    python training_scripts/compare_text.py
    python training_scripts/compare_text.py --rows block-4 vmd-4 --seeds 0 1 2

All models have the same size (a VMD also has its latent path), the same data in the same order and about the same
training time: the numbers of updates were chosen for that, and the time that a row took is reported. Each stage reads
the rows from the start. The bounds are those of `vmd_hf.corpus_bound` (`per_step`) on the test split, for samplers of
1, 2, 4 and 8 steps a block, of 32 for whole rows, and of one token a step. Prints a table, writes `results.json`, and
draws bits a character over function evaluations (NFE) a character, of all rows in the output folder. A row or a stage
that is there already is not trained again, and one that was interrupted goes on from its last checkpoint; so a folder
is of one recipe and of the same arguments. All other arguments are those of train_vmd.py, and change every row. Models
are trained and evaluated on the accelerator if there is one; `--device cpu` leaves it alone.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from vmd_hf.data.text import load_documents, text_datasets
from vmd_hf.evaluation.sampling import draw_samples
from vmd_hf.evaluation.speed import flops_of_update, matmul_peak
from vmd_hf.evaluation.tables import print_table, write_json
from vmd_hf.evaluation.text import batches_of, evaluate_bounds, evaluate_objective, largest_step
from vmd_hf.hub import default_device, load_model, load_tokenizer
from vmd_hf.recipes import DataArguments, ModelArguments, parse
from vmd_hf.training import last_whole_checkpoint
from vmd_hf.training_run import train

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
CHAIN = settings_of("sotu_chain.yaml", "latent_type", "latent_size", "conditioning_size")
# The first stage of all but the autoregressive model, in which the learning rate does not fall yet.
FIRST_STAGE = {"lr_scheduler_type": "constant_with_warmup"}
BLOCKS_OF_4 = {"block_size": 4, **PER_STEP, **FIRST_STAGE, "max_steps": 1900}
BLOCKS_OF_8 = {"block_size": 8, **PER_STEP_OF_8, **FIRST_STAGE, "max_steps": 1850}
WHOLE_ROWS = {"objective": "vmd", **FIRST_STAGE, "max_steps": 4400}
# How each row changes the recipe, in stages that start from one another. The numbers of updates make the training
# times about equal, ten to thirteen minutes on two CPU cores.
ROWS: dict[str, list[dict[str, Any]]] = {
    "autoregressive": [{"block_size": 1, "objective": "per_sample", "objective_steps": [1], "max_steps": 3700}],
    "mdm": [WHOLE_ROWS, {"objective": "vmd", "max_steps": 4400}],
    "vmd": [WHOLE_ROWS, {"latent_size": 16, "objective": "vmd", "learning_rate": 1e-3, "max_steps": 3250}],
    "block-4": [BLOCKS_OF_4, {**PER_STEP, "max_steps": 1900}],
    "block-8": [BLOCKS_OF_8, {**PER_STEP_OF_8, "max_steps": 1850}],
    "vmd-4": [BLOCKS_OF_4, WITH_LATENT],
    "vmd-4-standard-prior": [BLOCKS_OF_4, WITH_LATENT | {"prior": "standard"}],
    "vmd-8": [BLOCKS_OF_8, WITH_LATENT_OF_8],
    "chain-4": [BLOCKS_OF_4, {**PER_STEP, **CHAIN, "max_steps": 1350}],
    "chain-8": [BLOCKS_OF_8, {**PER_STEP_OF_8, **CHAIN, "max_steps": 1300}],
}


def run_row(
    row: str,
    seed: int,
    recipe: str,
    changes: list[str],
    output_dir: Path,
    num_eval_rows: int,
    split: str,
    device: torch.device,
) -> None:
    """Trains and evaluates one model, unless its results are there."""
    path = output_dir / f"{row}-{seed}" / "row.json"
    if path.exists():
        return
    stages, stage_folder = [], None
    for number, stage in enumerate(ROWS[row]):
        settings = ["--latent_size", "0"] + (["--use_cpu=true"] if device.type == "cpu" else [])
        for name, value in stage.items():
            settings += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        if stage_folder:
            settings += ["--model_name_or_path", str(stage_folder)]
        stage_folder = output_dir / f"{first_row_that_begins_as(row, number)}-{seed}" / f"stage-{number}"
        arguments = parse([recipe, *settings, *changes, f"--seed={seed}", f"--output_dir={stage_folder}"])
        stages.append(train_stage(arguments, stage_folder / "training.json"))
    model = load_model(stage_folder, device)
    tokenizer = load_tokenizer(stage_folder)
    result = {
        "row": row,
        "seed": seed,
        "parameters": model.num_parameters(),
        "training": stages,
        **evaluate_row(model, tokenizer, arguments[1], num_eval_rows, split),
    }
    write_json(path, result)


def first_row_that_begins_as(row: str, number: int) -> str:
    """A stage that rows have in common, with all before it, is trained once, in the folder of the first of them."""
    return next(other for other in ROWS if ROWS[other][: number + 1] == ROWS[row][: number + 1])


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Writes down what the folder's rows have in common, so that no others get among them.

    Raises:
        ValueError: if it holds rows of other settings.
    """
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, settings)
        return
    found = json.loads(path.read_text())
    for name, value in settings.items():
        if found[name] != value:
            raise ValueError(
                f"output_dir must hold rows of the same {name}, got {path} with {found[name]}, not {value}"
            )


def train_stage(arguments: tuple[ModelArguments, DataArguments, TrainingArguments], path: Path) -> dict[str, Any]:
    """Trains, unless that is done; returns how long it takes (whatever part was done before a stop) and how fast it
    is beside a matrix product in the same type."""
    if path.exists():
        return json.loads(path.read_text())
    _, data_args, training_args = arguments
    training_args.resume_from_checkpoint = "true"
    checkpoint = last_whole_checkpoint(training_args.output_dir)
    first = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    start = time.perf_counter()
    trainer = train(*arguments)
    seconds = time.perf_counter() - start
    for record in trainer.state.log_history:  # without setting up
        seconds = record.get("train_runtime", seconds)
    updates = trainer.state.global_step
    per_update = seconds / max(updates - first, 1)
    shape = training_args.per_device_train_batch_size, data_args.sequence_length
    peak = matmul_peak(trainer.model.device, dtype=torch.bfloat16 if training_args.bf16 else torch.float32)
    result = {
        "updates": updates,
        "seconds": updates * per_update,
        "tokens_per_second": math.prod(shape) / per_update,
        "share_of_matmul_peak": flops_of_update(trainer.model, shape) / per_update / peak,
    }
    write_json(path, result)
    return result


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
    few, many = ([number for number in num_steps if (number > 8) == is_many] for is_many in (False, True))
    bounds = evaluate_bounds(model, batches, few, num_draws=[1, 16])
    bounds += evaluate_bounds(model, batches, many) if many else []
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
        "samples": samples,
    }


def lines_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each row, seed, number of steps and number of draws."""
    return [
        {
            "row": result["row"],
            "seed": result["seed"],
            "bound": bound["bound"],
            "steps a block": bound["num_steps"],
            "NFE a character": nfe_per_character(result, bound),
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


def nfe_per_character(result: dict[str, Any], bound: dict[str, Any]) -> float:
    """A learned prior takes one more for a block, where a step reveals enough tokens for a latent."""
    fewest, width, num_steps = result["latent_min_tokens"], result["width"], bound["num_steps"]
    return (num_steps + (fewest is not None and largest_step(width, num_steps) >= fewest)) / width


def draw_frontier(results: list[dict[str, Any]], path: Path) -> None:
    """Bits a character over NFE a character, a line for each row and seed (the lowest of its bounds)."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    colours = {row: f"C{number}" for number, row in enumerate(ROWS)}
    labelled = set()
    for result in results:
        lowest: dict[float, tuple[float, float]] = {}
        for bound in sorted(result["bounds"], key=lambda bound: -bound["bits_per_token"]):
            error = bound["high"] - bound["bits_per_token"]
            lowest[nfe_per_character(result, bound)] = (bound["bits_per_token"], error)
        evaluations = sorted(lowest)
        bits, errors = zip(*(lowest[x] for x in evaluations), strict=True)
        label = None if result["row"] in labelled else result["row"]
        labelled.add(result["row"])
        axis.errorbar(evaluations, bits, errors, marker="o", capsize=3, color=colours[result["row"]], label=label)
    axis.set(xscale="log", xlabel="NFE a character", ylabel="bits a character (upper bound, 95 % interval)")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def results_in(folder: Path) -> list[dict[str, Any]]:
    """Of all rows that are there, whenever they were trained."""
    results = [json.loads(path.read_text()) for path in folder.glob("*/row.json")]
    return sorted(results, key=lambda result: (result["seed"], list(ROWS).index(result["row"])))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num_eval_rows", type=int, default=300, help="Rows, taken evenly from the split.")
    parser.add_argument("--eval_split", choices=["validation", "test"], default="test", help="validation: to tune on.")
    parser.add_argument("--output_dir", default="outputs/text_comparison")
    parser.add_argument("--device", type=torch.device, default=default_device())
    options, changes = parser.parse_known_args(argv)
    is_named = changes and changes[0].endswith(".yaml")
    recipe = changes.pop(0) if is_named else str(RECIPES / "text_comparison.yaml")
    output_dir = Path(options.output_dir)
    settings = {"recipe": yaml.safe_load(Path(recipe).read_text()), "arguments": changes, "stages": ROWS}
    claim(output_dir, settings | {"num_eval_rows": options.num_eval_rows, "eval_split": options.eval_split})
    for seed in options.seeds:
        for row in options.rows:
            run_row(row, seed, recipe, changes, output_dir, options.num_eval_rows, options.eval_split, options.device)
    results = results_in(output_dir)
    print_table("Upper bounds on the bits a character, with their 95 % interval", lines_of(results))
    names = ("row", "seed", "parameters")
    lines = [{name: result[name] for name in names} | stage for result in results for stage in result["training"]]
    print_table("Training", lines)
    write_json(output_dir / "results.json", results)
    draw_frontier(results, figure := output_dir / "frontier.png")
    print(f"frontier: {figure}; results: {output_dir}/results.json")


if __name__ == "__main__":
    main(sys.argv[1:])
