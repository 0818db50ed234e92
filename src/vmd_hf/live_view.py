"""Streamers for `generate` that show one sequence in the terminal after every denoising step (extra `scripts`)."""

import time

import numpy as np
import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerBase


class LiveView:
    """Draws what `render` makes of the sequence. `live` is `None` where there is no terminal to draw in."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console, seconds_per_step: float):
        self.tokenizer = tokenizer
        self.console = console
        self.seconds_per_step = seconds_per_step
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        if self.live is not None:
            self.live.start()

    def render(self, ids: torch.Tensor) -> Text:
        """The sequence (length,) as text."""
        raise NotImplementedError

    def print_plain(self, text: Text) -> None:
        """What happens to a step where there is no terminal: nothing."""

    def put(self, value: torch.Tensor) -> None:
        """Final tokens: the draft has shown them already."""

    def put_draft(self, value: torch.Tensor) -> None:
        text = self.render(value[0])
        if self.live is None:
            self.print_plain(text)
            return
        self.live.update(text, refresh=True)
        time.sleep(self.seconds_per_step)

    def end(self) -> None:
        if self.live is not None:
            self.live.stop()


class TextView(LiveView):
    """Text: masks as dots, new tokens bold; without a terminal one line a step."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console, seconds_per_step: float):
        super().__init__(tokenizer, console, seconds_per_step)
        self.before: list[int] | None = None
        self.step = 0

    def render(self, ids: torch.Tensor) -> Text:
        text, tokens = Text(), ids.tolist()
        for token, old in zip(tokens, self.before or [-1] * len(tokens), strict=True):
            if token == self.tokenizer.mask_token_id:
                text.append("·", style="dim")
            elif token != self.tokenizer.pad_token_id:
                text.append(self.tokenizer.decode([token]), style="bold green" if token != old else "")
        self.before = tokens
        return text

    def print_plain(self, text: Text) -> None:
        self.step += 1
        self.console.print(f"{self.step:4d} ", text, sep="", soft_wrap=True, highlight=False)


class BoardView(LiveView):
    """A Sudoku: clues bold, masks as dots.

    Args:
        puzzle: (81,) integers, 0 where there is no clue.
    """

    def __init__(self, puzzle: np.ndarray, tokenizer: PreTrainedTokenizerBase, console: Console, pause: float):
        super().__init__(tokenizer, console, pause)
        self.puzzle = puzzle

    def render(self, ids: torch.Tensor) -> Text:
        text = Text()
        for cell, token in enumerate(ids.tolist()):
            row, column = divmod(cell, 9)
            if column == 0 and row in (3, 6):
                text.append("------+-------+------\n", style="dim")
            if token == self.tokenizer.mask_token_id:
                text.append("·", style="dim")
            else:
                text.append(self.tokenizer.decode([token]), style="bold" if self.puzzle[cell] else "green")
            text.append("\n" if column == 8 else " | " if column in (2, 5) else " ")
        return text


__all__ = ["BoardView", "LiveView", "TextView"]
