"""The demo: gaps in a text, or a Sudoku, filled step by step before one's eyes, by several models side by side.

`build` makes the Gradio app, `launch` serves it and `write_space` writes a folder that runs as a Space. What is shown
is worked out by plain functions: `run_model` turns one call of `generate` into a `Trace`, `cells_after` a trace and a
step into cells, and `text_html` and `sudoku_html` cells into HTML. Gradio is needed for the app alone:
pip install vmd_hf[demo].
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.metadata import requires
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any, Literal, NamedTuple

import torch
from packaging.requirements import Requirement
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from .data.sudoku import CELLS_OF_UNIT, DIGITS, UNIT_NAMES, parse_board
from .data.synthetic import target_distribution
from .generation_configuration_vmd import REMASKING_RULES
from .hub import load_tokenizer
from .modeling_vmd import VMDForMaskedDiffusion

GAP = "_"  # how a mask token is typed
PUZZLES = {
    "30 clues": "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79",
    "17 clues": "4.....8.5.3..........7......2.....6.....8.4......1.......6.3.7.5..2.....1.4......",
    "no clue": "." * 81,
}
SEQUENCES = {  # what `setting` may name (see `target_distribution`), modulo 10
    "two_token_deterministic": "k, k+1",
    "two_token_nonuniform": "k, k+1",
    "d1": "k, k+1, k+2, k+3",
    "d2": "k, k+1, l, l+1",
}

TokenChoice = Literal["auto", "likeliest", "drawn"]
LatentChoice = Literal["new", "held", "step"]

# From which confidence on, the colour under dark text, and its words. Orange to blue: told apart by colour-blind eyes.
TEXT_COLOUR = "#14202b"
LEVELS = (
    (0.0, "#f7b27a", "below 50 %"),
    (0.5, "#fbe3c0", "50 to 90 %"),
    (0.9, "#d3e5f5", "90 to 99 %"),
    (0.99, "#8ec3ec", "99 % and more"),
)


# --- What a model does -------------------------------------------------------------------------------------------


class ShownModel(NamedTuple):
    """A model with its tokenizer and the name that the demo shows."""

    name: str
    model: VMDForMaskedDiffusion
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, model: str | os.PathLike) -> "ShownModel":
        """From a folder or an id on the Hub.

        Raises:
            OSError: if there is no such model.
            ValueError: if it has no tokenizer, or is none of this package.
        """
        loaded = AutoModelForMaskedLM.from_pretrained(model).eval()
        if not isinstance(loaded, VMDForMaskedDiffusion):
            raise ValueError(f"model must be a VMDForMaskedDiffusion, got {model}, a {type(loaded).__name__}")
        return cls(Path(model).name, loaded, load_tokenizer(model))

    @property
    def has_latent(self) -> bool:
        return self.model.config.latent_size > 0


@dataclass(frozen=True)
class Settings:
    """How to fill.

    Attributes:
        num_steps, remasking: As in [`VMDGenerationConfig`].
        tokens: `"likeliest"`, `"drawn"`, or `"auto"`: the likeliest where a latent carries the randomness, drawn by a
            model without one.
        latents: `"new"`: one z for each row, kept for all its steps; `"held"`: the same z for all rows; `"step"`: a
            fresh one in each step.
        latent_seed, token_seed: Row i draws z by `latent_seed + i` and everything else by `token_seed + i`.
        num_rows: Samples, at least 1.
    """

    num_steps: int = 1
    remasking: str = "top_prob"
    tokens: TokenChoice = "auto"
    latents: LatentChoice = "new"
    latent_seed: int = 0
    token_seed: int = 0
    num_rows: int = 1

    def __post_init__(self):
        for name, least in (("latent_seed", 0), ("token_seed", 0), ("num_rows", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


class Trace(NamedTuple):
    """What one model did, in plain lists of shape (rows, tokens) unless it says otherwise.

    Attributes:
        name: Of the model.
        about: A few words on it.
        tokens: The text of each token at the end.
        revealed_at: The step that revealed it, from 1; 0: it was given.
        confidences: The probability that it had then; 1 where it was given.
        changed: Whether it differs from what the previous trace has there.
        latents: (rows,) what to say about z.
        num_steps: Forward passes of the longest row.
    """

    name: str
    about: str
    tokens: list[list[str]]
    revealed_at: list[list[int]]
    confidences: list[list[float]]
    changed: list[list[bool]]
    latents: list[str]
    num_steps: int


class Cell(NamedTuple):
    """One token as it is shown after some step: empty text while it is masked."""

    text: str
    given: bool
    confidence: float
    new: bool
    changed: bool


def read_text(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """A text with gaps as ids: (tokens,) int64. `_`, or the mask token spelled out, is a gap of one token.

    Raises:
        ValueError: if there is no gap, or a character that the tokenizer does not know.
    """
    masked = text.replace(GAP, tokenizer.mask_token)
    if tokenizer.mask_token not in masked:
        raise ValueError(f"text must have a gap, typed as {GAP}, got {text!r}")
    return _encode(masked, tokenizer)


def read_puzzle(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """A Sudoku as ids: (81,) int64, masks for empty cells.

    Raises:
        ValueError: for anything but 81 cells, a digit that its row, column or box has already, a board without an
            empty cell, or a tokenizer that has not one token a cell. The message names cells and rule.
    """
    try:
        board = parse_board(text).tolist()
    except ValueError as error:
        raise ValueError(str(error).replace("`text`", "the puzzle")) from error
    if faults := repeats(board):
        raise ValueError(f"the clues must not repeat a digit in a row, column or box, but {describe(faults[0])}")
    if 0 not in board:
        raise ValueError("the puzzle must have an empty cell, got 81 clues")
    ids = _encode("".join(str(digit) if digit else tokenizer.mask_token for digit in board), tokenizer)
    if len(ids) != 81:
        raise ValueError(f"the model's tokenizer must have one token for each of 81 cells, got {len(ids)}")
    return ids


def latents_for(model: VMDForMaskedDiffusion, input_ids: torch.Tensor, settings: Settings) -> torch.Tensor | None:
    """What to pass to `generate` as `latents` for rows of the same `input_ids` (tokens,).

    Returns:
        (rows, latent_size), with blocks (rows, blocks with a gap, latent_size); `None` where `generate` is to draw
        them, or the model has none.

    Raises:
        ValueError: if z is to be held but comes from a learned prior, which only `generate` can draw from.
    """
    config = model.config
    learned = config.prior == "learned"
    if settings.latents == "held" and learned:
        raise ValueError("z can be held only with prior='standard', got a model with prior='learned'")
    if config.latent_size == 0 or settings.latents == "step" or learned:
        return None
    shape = (config.latent_size,)
    if config.block_size is not None:
        gaps = (input_ids == config.mask_token_id).nonzero().flatten()
        shape = (len((gaps // config.block_size).unique()), config.latent_size)
    rows = [0] * settings.num_rows if settings.latents == "held" else range(settings.num_rows)
    return torch.stack([torch.randn(shape, generator=_seeded(settings.latent_seed + row)) for row in rows])


def run_model(shown: ShownModel, input_ids: torch.Tensor, settings: Settings, previous: Trace | None = None) -> Trace:
    """Fills `num_rows` copies of `input_ids` (tokens,) and notes what happened; special tokens that were given, which
    nobody typed, are left out.

    Raises:
        ValueError: as `generate` does, and `latents_for`.
    """
    model, tokenizer = shown.model, shown.tokenizer
    rows = range(settings.num_rows)
    latents = latents_for(model, input_ids, settings)
    seeds = [settings.token_seed + row for row in rows]
    extra: dict[str, Any] = {}
    if shown.has_latent:
        extra = {"latents": latents, "resample_latents": settings.latents == "step"}
        if latents is None:  # z comes from the same generators
            seeds = [seed + 1_000_003 * settings.latent_seed for seed in seeds]
    batch = input_ids.repeat(settings.num_rows, 1)
    output = model.generate(
        batch.to(model.device),
        num_steps=settings.num_steps,
        remasking=settings.remasking,
        do_sample=settings.tokens == "drawn" or (settings.tokens == "auto" and not shown.has_latent),
        generator=[_seeded(seed) for seed in seeds],
        return_dict_in_generate=True,
        output_history=True,
        output_confidences=True,
        **extra,
    )
    revealed_at = steps_of(torch.stack([batch, *(state.cpu() for state in output.history)]), tokenizer.mask_token_id)
    special = torch.tensor(tokenizer.all_special_ids)
    keep = (input_ids == tokenizer.mask_token_id) | ~torch.isin(input_ids, special)
    tokens = [[token_text(index, tokenizer) for index in row] for row in output.sequences[:, keep].tolist()]
    revealed_at = revealed_at[:, keep].tolist()
    return Trace(
        name=shown.name,
        about=_about(shown),
        tokens=tokens,
        revealed_at=revealed_at,
        confidences=output.confidences[:, keep].tolist(),
        changed=changes(tokens, revealed_at, previous),
        latents=[_about_latent(shown, latents, settings, row) for row in rows],
        num_steps=int(output.num_forward_passes.max()),
    )


def steps_of(history: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """The step that revealed each token, 0 for those given: (steps + 1, rows, tokens) states, the first before any
    step, to (rows, tokens) int64. (A token is revealed after as many states as had a mask there.)"""
    return (history == mask_token_id).sum(0)


def changes(tokens: list[list[str]], revealed_at: list[list[int]], previous: Trace | None) -> list[list[bool]]:
    """Which filled tokens differ from those of the previous trace: lists of shape (rows, tokens). Nothing has changed
    if that trace filled other gaps, or another number of rows."""
    gaps = _gaps(revealed_at)
    if previous is None or _gaps(previous.revealed_at) != gaps:
        return [[False] * len(row) for row in tokens]
    return [
        [gap and one != other for one, other, gap in zip(*rows, strict=True)]
        for rows in zip(tokens, previous.tokens, gaps, strict=True)
    ]


def token_text(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token as one can see it: white space as a sign, special tokens by name."""
    if token in tokenizer.all_special_ids:
        return tokenizer.convert_ids_to_tokens(token)
    text = tokenizer.decode([token]) or tokenizer.convert_ids_to_tokens(token)
    return text.replace("\n", "⏎") if text.strip() else text.replace(" ", "␣").replace("\n", "⏎")


def cells_after(trace: Trace, step: int) -> list[list[Cell]]:
    """The cells of each row after `step` steps, 0 to `num_steps`; what has changed since the previous trace is marked
    after the last one."""
    return [
        [
            Cell(
                text="" if when > step else text,
                given=when == 0,
                confidence=confidence,
                new=when == step > 0,
                changed=changed and step >= trace.num_steps,
            )
            for text, when, confidence, changed in zip(*row, strict=True)
        ]
        for row in zip(trace.tokens, trace.revealed_at, trace.confidences, trace.changed, strict=True)
    ]


# --- Verdicts ----------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """`good` is None while it is open."""

    good: bool | None
    text: str


def in_support(tokens: Sequence[str], setting: str) -> bool:
    """Whether tokens are a sequence of a synthetic task (one of SEQUENCES)."""
    target = target_distribution(setting)
    if len(tokens) != target.dim() or not all(token in set("0123456789") for token in tokens):
        return False
    return bool(target[tuple(int(token) for token in tokens)] > 0)


def repeats(board: Sequence[int]) -> list[tuple[str, int, list[int]]]:
    """Every digit that a row, column or box of 81 numbers (0: empty) holds more than once: the unit's name, the digit
    and its cells, rows first."""
    found = []
    for name, cells in zip(UNIT_NAMES, CELLS_OF_UNIT.tolist(), strict=True):
        for digit in range(1, 10):
            same = [cell for cell in cells if board[cell] == digit]
            if len(same) > 1:
                found.append((name, digit, same))
    return found


def describe(repeat: tuple[str, int, list[int]]) -> str:
    name, digit, cells = repeat
    count = "twice" if len(cells) == 2 else f"{len(cells)} times"
    return f"{name} has {digit} {count} ({', '.join(f'r{cell // 9 + 1}c{cell % 9 + 1}' for cell in cells)})"


def sudoku_verdict(board: Sequence[int]) -> Verdict:
    """Of 81 numbers, 0 for an empty cell."""
    if faults := repeats(board):
        more = f", and {_count(len(faults) - 1, 'more repeat')}" if len(faults) > 1 else ""
        return Verdict(False, f"Not valid: {describe(faults[0])}{more}")
    empty = sum(digit == 0 for digit in board)
    if empty:
        return Verdict(None, f"{empty} empty, no rule broken so far")
    return Verdict(True, "Valid: every row, column and box has 1 to 9 once")


# --- HTML --------------------------------------------------------------------------------------------------------


def level_of(confidence: float) -> int:
    """The index in LEVELS of a probability."""
    return max(index for index, (least, _, _) in enumerate(LEVELS) if confidence >= least)


def percent(confidence: float) -> str:
    """Whole per cent, rounded down as LEVELS are: 99 is at least 99 %, 100 is certain."""
    return str(int(100 * confidence))


def cell_html(cell: Cell, tag: str, classes: str = "") -> str:
    """One cell as an element `tag`. Beside the colour, confidence is a number (in the tooltip; where there is room,
    below the token, too) and a bar at the bottom; given, masked, new and changed differ in more than colour."""
    if not cell.text:
        return f'<{tag} class="vmd-cell vmd-gap {classes}" title="masked"><b>&nbsp;</b></{tag}>'
    if cell.given:
        return f'<{tag} class="vmd-cell vmd-given {classes}" title="given"><b>{escape(cell.text)}</b></{tag}>'
    states = f"vmd-l{level_of(cell.confidence)}{' vmd-new' * cell.new}{' vmd-changed' * cell.changed}"
    number = percent(cell.confidence)
    return (
        f'<{tag} class="vmd-cell {states} {classes}" title="{number} % sure"><b>{escape(cell.text)}</b>'
        f'<small>{number}</small><i style="width:{number}%"></i></{tag}>'
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
            verdict = Verdict(None, f"{_count(masked, 'gap')} left")
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
    """Panels with the board of each trace's first row after `step` steps, and whether it keeps the rules."""
    panels = []
    for trace in traces:
        cells = cells_after(trace, step)[0]
        board = [int(cell.text) if cell.text and cell.text in DIGITS else 0 for cell in cells]
        panels.append(_panel(trace, step, sudoku_verdict(board), board_html(cells, repeats(board))))
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
        for index, ((_, _, words), width) in enumerate(zip(LEVELS, (25, 70, 95, 100), strict=True))
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
    return f'<div class="vmd-legend"><span>How sure the model was:</span>{levels}{others}</div>'


def _panel(trace: Trace, step: int, verdict: Verdict, body: str) -> str:
    kind = {True: "good", False: "bad", None: "open"}[verdict.good]
    return (
        f'<section class="vmd-panel" data-model="{escape(trace.name)}"><h3>{escape(trace.name)}</h3>'
        f"<p>{escape(trace.about)} · step {min(step, trace.num_steps)} of {trace.num_steps}</p>"
        f'<p class="vmd-verdict vmd-{kind}">{"" if verdict.good is None else _mark(verdict.good)}'
        f"{escape(verdict.text) or '&nbsp;'}</p>{body}</section>"
    )


def _mark(good: bool) -> str:
    return f'<span class="vmd-mark vmd-{"good" if good else "bad"}">{"✓" if good else "✗"}</span>'


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _about(shown: ShownModel) -> str:
    kind = f"VMD, z of {_count(shown.model.config.latent_size, 'number')}" if shown.has_latent else "MDM, no z"
    return kind if shown.model.config.block_size is None else f"{kind}, blocks of {shown.model.config.block_size}"


def _about_latent(shown: ShownModel, latents: torch.Tensor | None, settings: Settings, row: int) -> str:
    if not shown.has_latent:
        return ""
    if settings.latents == "step":
        return "a new z each step"
    if latents is not None and latents[row].numel() <= 2:
        return f"z = {', '.join(f'{value:.2f}' for value in latents[row].flatten().tolist())}"
    return f"z no. {settings.latent_seed + (0 if settings.latents == 'held' else row)}"


def _gaps(revealed_at: list[list[int]]) -> list[list[bool]]:
    return [[when > 0 for when in row] for row in revealed_at]


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(tokens,) int64; a ValueError names the symbol that the tokenizer does not know."""
    try:
        return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
    except Exception as error:  # the tokenizers library raises nothing more special
        symbols = [*text.replace(tokenizer.mask_token, "")]
        if len(symbols) == 1:
            raise ValueError(f"text must consist of what the model's tokenizer knows, got {symbols[0]!r}") from error
        for symbol in symbols:
            _encode(symbol, tokenizer)
        raise


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CSS = (
    "".join(f".vmd-l{index} {{ background: {colour} !important; }}\n" for index, (_, colour, _) in enumerate(LEVELS))
    + f".vmd-cell {{ --vmd-ink: {TEXT_COLOUR}; }}"
    + """
.gradio-container { max-width: 1280px !important; }
.vmd-layout { display: grid !important; gap: 1rem 1.25rem; align-items: start;
  grid-template: "input result" auto "settings result" 1fr / 21rem minmax(0, 1fr); }
.vmd-input { grid-area: input; }
.vmd-settings { grid-area: settings; }
.vmd-result { grid-area: result; }
@media (max-width: 760px) {
  .vmd-layout { grid-template: "input" "result" "settings" / minmax(0, 1fr); }
  .vmd-rows:not(.vmd-dense) .vmd-cell { min-width: 2.3rem; }
}
.vmd-result .html-container { padding: 0 !important; }
.vmd-puzzle textarea { font-family: var(--font-mono); letter-spacing: .15em; }
.vmd-cell { position: relative; display: inline-flex; flex-direction: column; align-items: center;
  justify-content: center; box-sizing: border-box; min-width: 2.6rem; height: 2.9rem; padding: 0 .3rem .25rem;
  border: 1px solid transparent; border-radius: 6px; color: var(--vmd-ink); line-height: 1.15; overflow: hidden; }
.vmd-cell b { font-size: 1.15rem; font-weight: 500; color: inherit; }
.vmd-cell small { font-size: .7rem; color: inherit; }
.vmd-cell i { position: absolute; left: 0; bottom: 0; height: 4px; background: #1f5f99; }
.vmd-l0 i, .vmd-l1 i { background: #a34a00; }
.vmd-cell.vmd-given { color: var(--body-text-color); background: rgba(128, 138, 150, .2);
  border: 1px solid var(--body-text-color-subdued); }
.vmd-cell.vmd-given b { font-weight: 800; }
.vmd-cell.vmd-gap { border: 1.5px dashed var(--body-text-color-subdued); }
.vmd-cell.vmd-new { box-shadow: inset 0 0 0 2px #14202b; }
.vmd-cell.vmd-changed::after { content: ""; position: absolute; top: 0; right: 0; border-style: solid;
  border-width: 0 11px 11px 0; border-color: transparent #8a1c6b transparent transparent; }
.vmd-panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
.vmd-panel { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: .9rem 1rem 1rem;
  background: var(--block-background-fill); min-width: 0; container-type: inline-size; }
.vmd-panel h3 { margin: 0; font-size: 1.15rem; font-weight: 700; color: var(--body-text-color); }
.vmd-panel p { margin: .1rem 0 .5rem; color: var(--body-text-color-subdued); font-size: .9rem; }
.vmd-panel p.vmd-verdict { color: var(--body-text-color); font-size: 1rem; font-weight: 600; }
.vmd-mark { display: inline-block; width: 1.4em; font-weight: 800; }
.vmd-mark.vmd-good { color: #14713d; }
.vmd-mark.vmd-bad { color: #b3261e; }
.dark .vmd-mark.vmd-good { color: #6fd398; }
.dark .vmd-mark.vmd-bad { color: #ff9c94; }
.vmd-rows { list-style: none; margin: 0; padding: 0; }
.vmd-rows li { display: flex; align-items: center; flex-wrap: wrap; gap: .2rem .5rem; margin: 0 0 .45rem; }
.vmd-rows:not(.vmd-dense) li { flex-wrap: nowrap; }
.vmd-tokens { display: flex; flex-wrap: wrap; gap: 4px; }
.vmd-rows em { font-style: normal; font-size: .8rem; line-height: 1.3; color: var(--body-text-color-subdued);
  white-space: nowrap; }
.vmd-dense .vmd-tokens { gap: 2px; }
.vmd-dense .vmd-cell { min-width: 1.15rem; height: 1.75rem; padding: 0 .1rem .2rem; border-radius: 3px; }
.vmd-dense .vmd-cell b { font-size: 1rem; }
.vmd-dense .vmd-cell small, .vmd-board .vmd-cell small { display: none; }
.vmd-board { width: 100%; max-width: 30rem; margin: .3rem auto 0; border-collapse: collapse; table-layout: fixed;
  border: 3px solid var(--body-text-color); }
.vmd-board tr { border: 0; }
.vmd-board td.vmd-cell { display: table-cell; min-width: 0; height: min(3.3rem, 11cqw); padding: 0;
  text-align: center; vertical-align: middle; border: 1px solid var(--body-text-color-subdued); border-radius: 0; }
.vmd-board td:nth-child(3n) { border-right: 3px solid var(--body-text-color); }
.vmd-board tr:nth-child(3n) td { border-bottom: 3px solid var(--body-text-color); }
.vmd-board td.vmd-wrong { box-shadow: inset 0 0 0 3px #b3261e; }
.vmd-board td.vmd-wrong b { text-decoration: underline wavy #b3261e 2px; text-underline-offset: 3px; }
.vmd-legend { display: flex; flex-wrap: wrap; align-items: center; gap: .35rem .9rem; font-size: .85rem;
  color: var(--body-text-color); }
.vmd-key { display: inline-flex; align-items: center; gap: .35rem; }
.vmd-key .vmd-cell { min-width: 1.5rem; height: 1.6rem; border-radius: 4px; }
.vmd-key .vmd-cell b { font-size: .85rem; }
.vmd-error { border: 2px solid #b3261e; border-radius: 8px; padding: .7rem .9rem; margin: 0 0 1rem;
  color: var(--body-text-color); background: var(--block-background-fill); }
.vmd-error b { color: #fff; background: #b3261e; border-radius: 50%; padding: .05em .5em; margin-right: .3em; }
"""
)


# --- The app -----------------------------------------------------------------------------------------------------

INTRO = """# Variational Masked Diffusion
A masked diffusion model (MDM) fills several gaps in one step, each on its own, so that they contradict one another.
A VMD first draws a latent variable z, and all gaps agree on it: hold z, and the tokens stay; redraw it, and related
tokens change together."""


def play(
    models: Sequence[ShownModel],
    read: Callable[[str, PreTrainedTokenizerBase], torch.Tensor],
    text: str,
    settings: Settings,
    previous: Sequence[Trace],
) -> list[Trace]:
    """Lets every model fill `text`, as `read` turns it into ids; `previous`: what the last run gave."""
    before = previous or [None] * len(models)
    return [
        run_model(shown, read(text, shown.tokenizer), settings, trace)
        for shown, trace in zip(models, before, strict=True)
    ]


def frames(traces: Sequence[Trace], seconds: float = 2.0) -> Iterator[int]:
    """The steps to show one after the other, from 0 to the last, in about so many seconds."""
    last = max(trace.num_steps for trace in traces)
    for step in range(last + 1):
        yield step
        if step < last:
            time.sleep(min(seconds / last, 0.4))


def build(
    models: Sequence[str | os.PathLike], sudoku_models: Sequence[str | os.PathLike] = (), setting: str | None = None
) -> Any:
    """The app, a `gradio.Blocks`.

    Args:
        models: Folders or Hub ids, to fill gaps in texts side by side.
        sudoku_models: The same for Sudokus.
        setting: A synthetic task, one of SEQUENCES, that the samples are checked against.

    Raises:
        ImportError: without gradio.
        OSError, ValueError: for a model that cannot be loaded, none at all, or an unknown setting.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    if not models and not sudoku_models:
        raise ValueError("models must name at least one model, got none")
    if setting is not None and setting not in SEQUENCES:
        raise ValueError(f"setting must be one of {', '.join(SEQUENCES)}, got {setting!r}")
    shown = [ShownModel.load(model) for model in models]
    solvers = [ShownModel.load(model) for model in sudoku_models]
    for solver in solvers:
        if solver.model.config.max_position_embeddings < 81:
            length = solver.model.config.max_position_embeddings
            raise ValueError(f"sudoku_models must be made for 81 tokens, got {solver.name} for {length}")
    with gr.Blocks(title="Variational Masked Diffusion", analytics_enabled=False) as app:
        gr.Markdown(INTRO)
        with gr.Tabs():
            if shown:
                with gr.Tab("Text with gaps"):
                    _text_tab(app, shown, setting)
            if solvers:
                with gr.Tab("Sudoku"):
                    _sudoku_tab(app, solvers)
    return app


def _text_tab(app, models: list[ShownModel], setting: str | None) -> None:
    import gradio as gr

    length = min(shown.model.config.max_position_embeddings for shown in models)
    if setting is not None:
        length = target_distribution(setting).dim()
    info = f"{GAP} is a gap" + (f"; the data: {SEQUENCES[setting]} (mod 10)" if setting else "")
    text = gr.Textbox(GAP * min(length, 32), label="Text", info=info, lines=1, render=False)
    examples = {text: text for text in (GAP * 4, "3__6", "__0_")} if setting == "d1" else {}
    _tab(app, models, text, examples, read_text, lambda traces, step: text_html(traces, step, setting), length)


def _sudoku_tab(app, models: list[ShownModel]) -> None:
    import gradio as gr

    examples = {
        name: "\n".join(puzzle[start : start + 9] for start in range(0, 81, 9)) for name, puzzle in PUZZLES.items()
    }
    puzzle = gr.Textbox(
        examples["30 clues"],
        label="Puzzle",
        info="81 cells, row by row; an empty one is . or 0",
        lines=9,
        max_lines=9,
        elem_classes="vmd-puzzle",
        render=False,
    )
    _tab(app, models, puzzle, examples, read_puzzle, sudoku_html, 81, sudoku=True)


def _tab(app, models, text, examples, read, render, length: int, sudoku: bool = False) -> None:
    """Input, settings and result. All of one event, so that two runs never write at the same time."""
    import gradio as gr

    latent = any(shown.has_latent for shown in models)
    per_step = any(shown.model.generation_config.resample_latents for shown in models)
    with gr.Row(elem_classes="vmd-layout"):
        with gr.Column(elem_classes="vmd-input", min_width=280):
            text.render()
            if examples:
                gr.Examples([[text] for text in examples.values()], text, label="Try", example_labels=list(examples))
            run = gr.Button("Fill", variant="primary")
            with gr.Row():
                redraw_latent = gr.Button("Redraw z", size="md", min_width=120, visible=latent)
                redraw_tokens = gr.Button("Redraw tokens", size="md", min_width=120)
        with gr.Column(elem_classes="vmd-settings", min_width=280):
            num_steps = gr.Slider(1, length, 20 if sudoku else 1, step=1, label="Steps", info="forward passes")
            remasking = gr.Dropdown(
                list(REMASKING_RULES),
                value="top_prob_margin" if sudoku else "top_prob",
                label="Rule",
                info="which predictions a step keeps",
            )
            latents = gr.Radio(
                [("new for each sample", "new"), ("held for all", "held"), ("new at every step", "step")],
                value="step" if per_step else "new",
                label="z",
                visible=latent,
            )
            with gr.Row():
                latent_seed = gr.Number(0, label="Seed of z", precision=0, minimum=0, min_width=120, visible=latent)
                token_seed = gr.Number(0, label="Seed of tokens", precision=0, minimum=0, min_width=120)
            tokens = gr.Radio(
                [("likeliest; without z drawn", "auto"), ("likeliest", "likeliest"), ("drawn", "drawn")][sudoku:],
                value="likeliest" if sudoku else "auto",
                label="Tokens",
                info="the likeliest leave nothing to redraw",
            )
            samples = 6 if not sudoku and length <= 16 else 1
            num_rows = gr.Slider(1, 8, samples, step=1, label="Samples", visible=not sudoku)
        with gr.Column(elem_classes="vmd-result", min_width=280):
            result = gr.HTML(apply_default_css=False)
            step = gr.Slider(0, 1, 0, step=1, label="Step", info="drag to go back and forth")
            gr.HTML(legend_html(), apply_default_css=False)
    traces = gr.State([])

    def fill(
        text, num_steps, remasking, tokens, latents, latent_seed, token_seed, num_rows, before, event: gr.EventData
    ):
        try:
            settings = Settings(num_steps, remasking, tokens, latents, latent_seed, token_seed, num_rows)
            if event.target is redraw_latent:
                settings = replace(settings, latent_seed=latent_seed + num_rows)
            elif event.target is redraw_tokens:
                settings = replace(settings, token_seed=token_seed + num_rows)
            now = play(models, read, text, settings, before)
        except ValueError as error:
            yield latent_seed, token_seed, before, gr.update(), error_html(error, text if sudoku else "")
            return
        last = max(trace.num_steps for trace in now)
        for number in frames(now):
            slider = gr.update(maximum=last, value=number)
            yield settings.latent_seed, settings.token_seed, now, slider, render(now, number)

    gr.on(
        [run.click, redraw_latent.click, redraw_tokens.click, text.submit, app.load],
        fill,
        [text, num_steps, remasking, tokens, latents, latent_seed, token_seed, num_rows, traces],
        [latent_seed, token_seed, traces, step, result],
        trigger_mode="always_last",
        show_progress="hidden",
    )
    step.input(
        lambda traces, step: render(traces, step) if traces else gr.skip(),
        [traces, step],
        result,
        trigger_mode="always_last",
        show_progress="hidden",
    )


def launch(
    models: Sequence[str | os.PathLike],
    sudoku_models: Sequence[str | os.PathLike] = (),
    setting: str | None = None,
    port: int | None = None,
    share: bool = False,
) -> None:
    """Builds the app (see `build`) and serves it until it is interrupted. The page asks nobody else for anything.

    Args:
        port: Default: the environment's GRADIO_SERVER_PORT, or the first free one from 7860 on.
        share: Open a public link through Gradio's server, too.

    Raises:
        OSError: if the port is taken; else as `build`.
    """
    app = build(models, sudoku_models, setting)
    import gradio as gr

    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600")
    app.launch(server_port=port, share=share, ssr_mode=False, theme=theme, css=CSS, footer_links=[])


def write_space(
    folder: str | os.PathLike,
    models: Sequence[str | os.PathLike],
    sudoku_models: Sequence[str | os.PathLike] = (),
    setting: str | None = None,
) -> None:
    """Writes a Space: app.py, README.md, requirements.txt, this package, and models that are folders here; ids on the
    Hub stay what they are. Other files in the folder stay.

    Raises:
        ImportError: without gradio.
        OSError, ValueError: for a model that cannot be loaded, two folders of one name, none at all, or an unknown
            setting.
    """
    build(models, sudoku_models, setting)  # whatever is wrong shows here and not on the Hub
    import gradio as gr

    local = [Path(model) for model in [*models, *sudoku_models] if Path(model).is_dir()]
    names = [path.resolve().name for path in local]
    if len(set(names)) < len(names):
        raise ValueError(f"models must have folders of different names, got {names}")
    folder = Path(folder)
    package = Path(__file__).parent
    copytree(
        package,
        folder / "vmd_hf",
        ignore=ignore_patterns("__pycache__", "training_scripts", "cli.py"),
        dirs_exist_ok=True,
    )
    for path, name in zip(local, names, strict=True):
        shown = ShownModel.load(path)
        shown.model.save_pretrained(folder / "models" / name)
        shown.tokenizer.save_pretrained(folder / "models" / name)
    places = [
        [f"models/{Path(model).resolve().name}" if Path(model).is_dir() else str(model) for model in some]
        for some in (models, sudoku_models)
    ]
    needed = [Requirement(line) for line in requires("vmd-hf") or []]
    (folder / "requirements.txt").write_text("".join(f"{one}\n" for one in needed if one.marker is None))
    (folder / "app.py").write_text(
        "from vmd_hf.demo import launch\n\n"
        f"launch(models={places[0]!r}, sudoku_models={places[1]!r}, setting={setting!r})\n"
    )
    (folder / "README.md").write_text(
        "---\ntitle: Variational Masked Diffusion\nemoji: 🎭\ncolorFrom: blue\ncolorTo: yellow\nsdk: gradio\n"
        f"sdk_version: {gr.__version__}\napp_file: app.py\nlicense: apache-2.0\n---\n\n"
        "Gaps in a text, or a Sudoku, filled step by step by Variational Masked Diffusion\n"
        "([arXiv 2510.23606](https://arxiv.org/abs/2510.23606)). It runs elsewhere, too:\n\n"
        "    pip install gradio -r requirements.txt && python app.py\n"
    )


__all__ = ["build", "launch", "write_space"]
