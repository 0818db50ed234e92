"""Model cards: a README.md with the Hub's metadata, from `card.yaml` and `results.json` in a model's folder."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

FIELDS = ("title", "summary", "usage", "training", "evaluation", "limits")
# Columns that measure, by the names that the Hub knows, and those that say under which settings.
METRICS = {"accuracy": "accuracy", "solved": "accuracy", "kl": "kl", "bits_per_token": "bits_per_token"}
SETTINGS = ("clues", "remasking", "num_steps", "num_attempts", "sampler", "num_draws")
TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}

## Use

{{ usage }}

## Training

{{ training }}

## Results

{{ evaluation }}

{% for table in tables %}{{ table }}

{% endfor %}## Limits and intended use

{{ limits }}

Made with vmd_hf, Variational Masked Diffusion ([arXiv 2510.23606](https://arxiv.org/abs/2510.23606)).
"""


def make_card(folder: Path) -> ModelCard:
    """The card of the model in a folder.

    Raises:
        ValueError: the folder lacks `card.yaml` or `results.json`, the first a field, or the second results.
    """
    for name in ("card.yaml", "results.json"):
        if not (folder / name).is_file():
            raise ValueError(f"folder must hold card.yaml and results.json, got {folder} without {name}")
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
    return ModelCard.from_template(data, template_str=TEMPLATE, **about, tables=list(map(markdown, tables.items())))


def write_card(folder: Path) -> Path:
    """Writes README.md; an interruption leaves the old one whole.

    Raises:
        ValueError: as in [`make_card`].
    """
    path, partial = folder / "README.md", folder / "README.partial"
    make_card(folder).save(partial)
    return partial.replace(path)


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


__all__ = ["FIELDS", "METRICS", "make_card", "markdown", "write_card"]
