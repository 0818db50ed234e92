"""Cells as HTML: panels of texts and of Sudoku boards, the legend and errors. Colours and sizes are in style.css."""

from bisect import bisect
from collections.abc import Sequence
from html import escape

from ..data.sudoku import DIGITS, parse_board, repeats
from .traces import Cell, Trace, cells_after
from .verdicts import SEQUENCES, Verdict, counted, in_support, sudoku_verdict

LEVELS = ("below 50 %", "50 to 90 %", "90 to 99 %", "99 % and more")  # of confidence
WITHOUT_LATENT = (
    "A model of vmd_hf with latent_size=0, since a puzzle with one solution leaves a latent nothing to encode."
)


def level_of(confidence: float) -> int:
    """The index in LEVELS of a probability."""
    return bisect((0.5, 0.9, 0.99), confidence)


def percent(confidence: float) -> str:
    """Whole per cent, rounded down as LEVELS are: 99 is at least 99 %, 100 is certain."""
    return str(int(100 * confidence))


def cell_html(cell: Cell, tag: str, classes: str = "") -> str:
    """One cell as an element `tag`. Beside the colour, confidence is a number (in the tooltip; where there is room,
    below the token, too) and a bar at the bottom; given, masked, new and changed differ in more than colour. A state
    of a chain takes the place of the number below the token."""
    if not cell.text:
        return f'<{tag} class="vmd-cell vmd-gap {classes}" title="masked"><b>&nbsp;</b></{tag}>'
    if cell.given:
        return f'<{tag} class="vmd-cell vmd-given {classes}" title="given"><b>{escape(cell.text)}</b></{tag}>'
    states = f"vmd-l{level_of(cell.confidence)}{' vmd-new' * cell.new}{' vmd-changed' * cell.changed}"
    number = percent(cell.confidence)
    title, note = f"confidence {number} %", number
    if cell.state >= 0:
        title, note = f"{title}, state {cell.state}", f"s{cell.state}"
    return (
        f'<{tag} class="vmd-cell {states} {classes}" title="{title}"><b>{escape(cell.text)}</b>'
        f'<small>{note}</small><i style="width:{number}%"></i></{tag}>'
    )


def text_html(traces: Sequence[Trace], step: int, setting: str | None = None) -> str:
    """Panels with the rows of each trace after `step` steps and, if a synthetic task is named, whether they belong to
    it."""
    panels = []
    for trace in traces:
        rows = cells_after(trace, step)
        verdict, marks = Verdict(None, ""), [""] * len(rows)
        if step < trace.num_steps:
            masked = sum(not cell.text for row in rows for cell in row)
            verdict = Verdict(None, f"{counted(masked, 'gap')} left")
        elif setting is not None:
            good = [in_support(row, setting) for row in trace.tokens]
            verdict = Verdict(all(good), f"{sum(good)} of {len(good)} are {SEQUENCES[setting]}")
            marks = [_mark(one) for one in good]
        changed = [sum(cell.changed for cell in row) for row in rows]
        notes = [
            "<br>".join(escape(part) for part in (latent, f"{count} changed" if count else "") if part)
            for latent, count in zip(trace.latents, changed, strict=True)
        ]
        dense = " vmd-dense" * (len(rows[0]) > 16)
        items = "".join(
            f'<li>{mark}<div class="vmd-tokens">{"".join(cell_html(cell, "span") for cell in row)}</div>'
            f"<em>{note}</em></li>"
            for row, note, mark in zip(rows, notes, marks, strict=True)
        )
        panels.append(_panel(trace, step, verdict, f'<ol class="vmd-rows{dense}">{items}</ol>'))
    return f'<div class="vmd-panels">{"".join(panels)}</div>'


def sudoku_html(traces: Sequence[Trace], step: int) -> str:
    """Panels with the board of each trace's first row after `step` steps, whether it keeps the rules and, where the
    model has no latent, why."""
    panels = []
    for trace in traces:
        cells = cells_after(trace, step)[0]
        board = [int(cell.text) if cell.text and cell.text in DIGITS else 0 for cell in cells]
        note = "" if any(trace.latents) else f"<p>{WITHOUT_LATENT}</p>"
        panels.append(_panel(trace, step, sudoku_verdict(board), board_html(cells, repeats(board)), note))
    return f'<div class="vmd-panels">{"".join(panels)}</div>'


def board_html(cells: Sequence[Cell], faults: Sequence[tuple[str, int, list[int]]] = ()) -> str:
    """81 cells as a table; those of `faults` are marked."""
    wrong = {cell for _, _, same in faults for cell in same}
    lines = (
        "".join(cell_html(cells[index], "td", "vmd-wrong" * (index in wrong)) for index in range(start, start + 9))
        for start in range(0, 81, 9)
    )
    return f'<table class="vmd-board"><tbody>{"".join(f"<tr>{line}</tr>" for line in lines)}</tbody></table>'


def error_html(error: ValueError, puzzle: str = "") -> str:
    """What is wrong and, if it is a puzzle with 81 cells that breaks a rule, its board with the cells marked."""
    board = ""
    try:
        clues = parse_board(puzzle).tolist()
    except ValueError:
        clues = []
    if faults := clues and repeats(clues):
        cells = [Cell(str(digit) if digit else "", digit > 0, 1.0, False, False) for digit in clues]
        board = f'<div class="vmd-panels"><section class="vmd-panel">{board_html(cells, faults)}</section></div>'
    text = str(error)
    return f'<p class="vmd-error" role="alert"><b>!</b> {escape(text[0].upper() + text[1:])}</p>{board}'


def legend_html() -> str:
    levels = "".join(
        f'<span class="vmd-key"><span class="vmd-cell vmd-l{index}"><b>a</b><i style="width:{width}%"></i></span>'
        f"{words}</span>"
        for index, (words, width) in enumerate(zip(LEVELS, (25, 70, 95, 100), strict=True))
    )
    others = "".join(
        f'<span class="vmd-key"><span class="vmd-cell {name}"><b>{text}</b></span>{words}</span>'
        for name, text, words in (
            ("vmd-given", "a", "given"),
            ("vmd-gap", "&nbsp;", "masked"),
            ("vmd-l2 vmd-new", "a", "new in this step"),
            ("vmd-l2 vmd-changed", "a", "changed since the last run"),
        )
    )
    return f'<div class="vmd-legend"><span>Confidence:</span>{levels}{others}</div>'


def _panel(trace: Trace, step: int, verdict: Verdict, body: str, note: str = "") -> str:
    kind = {True: "good", False: "bad", None: "open"}[verdict.good]
    return (
        f'<section class="vmd-panel" data-model="{escape(trace.name)}"><h3>{escape(trace.name)}</h3>'
        f"<p>{escape(trace.about)} · step {min(step, trace.num_steps)} of {trace.num_steps}</p>{note}"
        f'<p class="vmd-verdict vmd-{kind}">{"" if verdict.good is None else _mark(verdict.good)}'
        f"{escape(verdict.text) or '&nbsp;'}</p>{body}</section>"
    )


def _mark(good: bool) -> str:
    return f'<span class="vmd-mark vmd-{"good" if good else "bad"}">{"✓" if good else "✗"}</span>'
