"""Tables: rows with the same keys under a title, printed and kept as JSON."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..extras import import_extra

Row = dict[str, Any]


def print_table(title: str, rows: list[Row]) -> None:
    """Rows with the same keys as one table."""
    import_extra("rich", "scripts")
    from rich.console import Console
    from rich.table import Table

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


def tables_to_join(path: str | os.PathLike, titles: Collection[str], overwrite: bool) -> dict[str, list[Row]]:
    """The tables of a file that those of these titles are to join, or to replace; none if there is no file.

    Raises:
        ValueError: without `overwrite`, if the file has one of these titles; if it holds no tables.
    """
    if not Path(path).exists():
        return {}
    tables = json.loads(Path(path).read_text())
    if not isinstance(tables, dict):
        raise ValueError(f"output must be a file of tables, lists of rows under a title, got {path}")
    if not overwrite and (taken := [title for title in titles if title in tables]):
        raise ValueError(
            f"output must not hold what is to be measured, got {path} with {taken[0]!r}: --overwrite replaces it, and "
            "--output names another file"
        )
    return tables


__all__ = ["Row", "print_table", "tables_to_join", "write_json"]
