"""Comparisons of models that are trained in stages: a folder of rows, each trained and measured once."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from ..hub import default_device
from ..recipes import DataArguments, ModelArguments, parse
from ..training import last_whole_checkpoint
from ..training_run import train
from .speed import flops_of_update, matmul_peak
from .tables import write_json

Rows = dict[str, list[dict[str, Any]]]  # how each row changes the recipe, in stages that start from one another


def parse_comparison(
    parser: argparse.ArgumentParser, argv: list[str], rows: Rows, recipe: Path, output_dir: str
) -> tuple[argparse.Namespace, str, list[str]]:
    """What all comparisons are asked, beside a parser's own arguments, which are settings of the folder (see `claim`).

    Returns:
        The options, the recipe (the first of what is left, if that is a YAML file), and changes of it.
    """
    own = [action.dest for action in parser._actions if action.dest != "help"]
    parser.add_argument("--rows", nargs="+", choices=list(rows), default=list(rows))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--eval_split", choices=["validation", "test"], default="test", help="validation: to tune on.")
    parser.add_argument("--output_dir", default=output_dir)
    parser.add_argument("--device", type=torch.device, default=default_device())
    options, changes = parser.parse_known_args(argv)
    is_named = changes and changes[0].endswith(".yaml")
    named = changes.pop(0) if is_named else str(recipe)
    settings = {"recipe": yaml.safe_load(Path(named).read_text()), "arguments": changes}
    settings |= {name: getattr(options, name) for name in (*own, "eval_split")}
    claim(Path(options.output_dir), settings, rows)
    return options, named, changes


def claim(folder: Path, settings: dict[str, Any], rows: Rows) -> None:
    """Writes down what the folder's rows have in common, and how each is trained, so that no others get among them.
    Rows that the folder does not know are added.

    Raises:
        ValueError: if it holds rows of other settings.
    """
    path = folder / "settings.json"
    found = json.loads(path.read_text()) if path.exists() else settings | {"stages": {}}
    for name, value in settings.items():
        if found[name] != value:
            raise ValueError(
                f"output_dir must hold rows of the same {name}, got {path} with {found[name]}, not {value}"
            )
    for row, stages in rows.items():
        if found["stages"].setdefault(row, stages) != stages:
            raise ValueError(
                f"output_dir must hold rows of the same stages, got {path} with {found['stages'][row]} of {row}, "
                f"not {stages}"
            )
    write_json(path, found)


def train_row(
    rows: Rows,
    row: str,
    seed: int,
    recipe: str,
    changes: list[str],
    output_dir: Path,
    device: torch.device,
    start: Path | None = None,
) -> tuple[Path, DataArguments, list[dict[str, Any]]]:
    """Trains the stages of a row that are not there yet, the first one from the model in `start`, if given.

    Returns:
        The folder of the last stage, what it was trained on, and how long each took (see `train_stage`).
    """
    trained, folder = [], start
    for number, stage in enumerate(rows[row]):
        settings = ["--latent_size", "0"] + (["--use_cpu=true"] if device.type == "cpu" else [])
        for name, value in stage.items():
            settings += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        if folder:
            settings += ["--model_name_or_path", str(folder)]
        folder = output_dir / f"{first_row_that_begins_as(rows, row, number)}-{seed}" / f"stage-{number}"
        arguments = parse([recipe, *settings, *changes, f"--seed={seed}", f"--output_dir={folder}"])
        trained.append(train_stage(arguments, folder / "training.json"))
    return folder, arguments[1], trained


def first_row_that_begins_as(rows: Rows, row: str, number: int) -> str:
    """A stage that rows have in common, with all before it, is trained once, in the folder of the first of them."""
    return next(other for other in rows if rows[other][: number + 1] == rows[row][: number + 1])


def train_stage(arguments: tuple[ModelArguments, DataArguments, TrainingArguments], path: Path) -> dict[str, Any]:
    """Trains, unless that is done; returns how long it takes (whatever part was done before a stop), also in CPU time,
    which other work on the machine changes less, and how fast it is beside a matrix product in the same type."""
    if path.exists():
        return json.loads(path.read_text())
    _, _, training_args = arguments
    training_args.resume_from_checkpoint = "true"
    checkpoint = last_whole_checkpoint(training_args.output_dir)
    first = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    start, start_of_process = time.perf_counter(), time.process_time()
    trainer = train(*arguments)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_of_process
    for record in trainer.state.log_history:  # without setting up
        seconds = record.get("train_runtime", seconds)
    updates = trainer.state.global_step
    per_update = seconds / max(updates - first, 1)
    batch = next(iter(trainer.get_train_dataloader()))
    peak = matmul_peak(trainer.model.device, dtype=torch.bfloat16 if training_args.bf16 else torch.float32)
    result = {
        "updates": updates,
        "seconds": updates * per_update,
        "cpu_seconds": updates / max(updates - first, 1) * cpu_seconds,
        "tokens_per_second": batch["input_ids"].numel() / per_update,
        "share_of_matmul_peak": flops_of_update(trainer.model, batch) / per_update / peak,
    }
    write_json(path, result)
    return result


def run_rows(
    rows: Rows, options: argparse.Namespace, run_row: Callable[[str, int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The results of all rows in the output folder, which are written there, too. `run_row` (row, seed) gives those of
    a row that is asked for and not there yet."""
    folder = Path(options.output_dir)
    for seed in options.seeds:
        for row in options.rows:
            path = folder / f"{row}-{seed}" / "row.json"
            if not path.exists():
                write_json(path, {"row": row, "seed": seed, **run_row(row, seed)})
    write_json(folder / "results.json", results := results_in(folder, rows))
    return results


def lowest_bounds(bounds: list[dict[str, Any]], name: str) -> dict[int, dict[str, Any]]:
    """Of bounds, the one whose value of this name is the lowest, for each number of steps."""
    return {bound["num_steps"]: bound for bound in sorted(bounds, key=lambda bound: -bound[name])}


def results_in(folder: Path, rows: Rows) -> list[dict[str, Any]]:
    """The `row.json` of all rows that are there, whenever they were trained."""
    results = [json.loads(path.read_text()) for path in folder.glob("*/row.json")]
    return sorted(results, key=lambda result: (result["seed"], list(rows).index(result["row"])))


def training_lines(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each stage of each row."""
    names = ("row", "seed", "parameters")
    return [{name: result[name] for name in names} | stage for result in results for stage in result["training"]]


__all__ = [
    "Rows",
    "claim",
    "first_row_that_begins_as",
    "lowest_bounds",
    "parse_comparison",
    "results_in",
    "run_rows",
    "train_row",
    "train_stage",
    "training_lines",
]
