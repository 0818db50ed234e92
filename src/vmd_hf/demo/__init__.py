"""The demo: gaps in a text, or a Sudoku, filled step by step before one's eyes, by several models side by side.

`build` makes the Gradio app, `launch` serves it and `write_space` writes a folder that runs as a Space. The way from
text to page: `inputs` (text to ids), `traces` (one call of `generate` to what each step revealed), `verdicts` (is it
right?), `panels` (to HTML, with style.css) and `app`. It needs Gradio: pip install vmd_hf[demo].
"""

from .app import build, launch
from .space import write_space

__all__ = ["build", "launch", "write_space"]
