"""A streamer for `generate` that shows one sequence in the terminal after every denoising step."""

import time

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text


class LiveView:
    """Draws what `render` makes of the sequence. `live` is `None` where there is no terminal to draw in."""

    def __init__(self, console: Console, seconds_per_step: float):
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
