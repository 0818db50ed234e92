"""Write a model's card, README.md, from `card.yaml` and `results.json` in its folder.

    python training_scripts/make_card.py model_cards/vmd-d1

`card.yaml` says what cannot be measured: title, summary, usage, training, evaluation, limits, and metadata.
`results.json` holds what was measured: tables as `evaluate_vmd.py` writes them, lists of rows under a title. So no
number is typed by hand.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("model_card_template.md")
FIELDS = ("title", "summary", "usage", "training", "evaluation", "limits")
# Columns that measure, by the names that the Hub knows, and those that say under which settings.
METRICS = {"accuracy": "accuracy", "solved": "accuracy", "kl": "kl", "bits_per_token": "bits_per_token"}
SETTINGS = ("clues", "remasking", "num_steps", "num_attempts", "sampler", "num_draws")


def make_card(folder: Path) -> ModelCard:
    """The card of the model in a folder.

    Raises:
        ValueError: `card.yaml` lacks a field, or there are no results.
    """
    about = {
        name: value.strip() if isinstance(value, str) else value
        for name, value in yaml.safe_load((folder / "card.yaml").read_text()).items()
    }
    if missing := [name for name in FIELDS if not about.get(name)]:
        raise ValueError(f"card.yaml must have {', '.join(FIELDS)}, got none of {', '.join(missing)}")
    tables = json.loads((folder / "results.json").read_text())
    if not tables:
        raise ValueError(f"{folder / 'results.json'} must have results, got none")
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=["masked-diffusion", "vmd", *about.get("tags", ())],
        datasets=about.get("datasets"),  # those on the Hub
        metrics=sorted({METRICS[name] for rows in tables.values() for name in rows[0] if name in METRICS}),
        model_name=folder.name,
        eval_results=evaluation_results(tables),
    )
    return ModelCard.from_template(
        data, template_path=str(TEMPLATE), **about, tables=list(map(markdown, tables.items()))
    )


def evaluation_results(tables: dict[str, list[dict[str, Any]]]) -> list[EvalResult]:
    """One for each metric of each row."""
    return [
        EvalResult(
            task_type="fill-mask",
            dataset_type="generated" if "accuracy" in row or "solved" in row else "text",
            dataset_name=title,
            metric_type=metric,
            metric_name=", ".join(f"{setting}={row[setting]}" for setting in SETTINGS if setting in row) or metric,
            metric_value=row[name],
        )
        for title, rows in tables.items()
        for row in rows
        for name, metric in METRICS.items()
        if name in row
    ]


def markdown(table: tuple[str, list[dict[str, Any]]]) -> str:
    """A title and rows, as a Markdown table under a heading."""
    title, rows = table
    lines = [f"### {title}", "", "| " + " | ".join(rows[0]) + " |", "| --- " * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    if value is None:  # not measured
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Of the model, with card.yaml and results.json.")
    folder = parser.parse_args(argv).folder
    partial = folder / "README.partial"
    make_card(folder).save(partial)
    partial.replace(folder / "README.md")


if __name__ == "__main__":
    main(sys.argv[1:])
