"""The Gradio app: a tab for texts with gaps, a tab for Sudokus."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..data.synthetic import target_distribution
from ..generation_configuration_vmd import REMASKING_RULES
from .inputs import GAP, read_puzzle, read_text
from .panels import error_html, legend_html, sudoku_html, text_html
from .traces import Settings, ShownModel, Trace, run_model
from .verdicts import SEQUENCES

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("the demo needs the package gradio: pip install vmd_hf[demo]") from error

STYLE = Path(__file__).with_name("style.css")
INTRO = """# Variational Masked Diffusion
A masked diffusion model (MDM) fills several gaps in one step, each on its own, so that they contradict one another.
A VMD first draws a latent variable z, and all gaps agree on it: keep z, and the tokens stay; redraw it, and related
tokens change together. The z of a chain is a state for each token, shown below it (s17)."""
PUZZLES = {
    "30 clues": "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79",
    "17 clues": "4.....8.5.3..........7......2.....6.....8.4......1.......6.3.7.5..2.....1.4......",
    "no clue": "." * 81,
}

Read = Callable[[str, PreTrainedTokenizerBase], torch.Tensor]
Render = Callable[[Sequence[Trace], int], str]


def launch(
    models: Sequence[str | os.PathLike],
    sudoku_models: Sequence[str | os.PathLike] = (),
    setting: str | None = None,
    port: int | None = None,
    share: bool = False,
    device: str | torch.device | None = None,
) -> None:
    """Builds the app (see `build`) and serves it until it is interrupted. The page asks nobody else for anything.

    Args:
        port: Default: the environment's GRADIO_SERVER_PORT, or the first free one from 7860 on.
        share: Open a public link through Gradio's server, too.

    Raises:
        OSError: if the port is taken; else as `build`.
    """
    app = build(models, sudoku_models, setting, device)
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600")
    app.launch(server_port=port, share=share, ssr_mode=False, theme=theme, css_paths=STYLE, footer_links=[])


def build(
    models: Sequence[str | os.PathLike],
    sudoku_models: Sequence[str | os.PathLike] = (),
    setting: str | None = None,
    device: str | torch.device | None = None,
) -> gr.Blocks:
    """The app.

    Args:
        models: Folders or Hub ids, to fill gaps in texts side by side.
        sudoku_models: The same for Sudokus.
        setting: A synthetic task, one of SEQUENCES, that the samples are checked against.
        device: Where the models run. Default: the accelerator where there is one, else the CPU.

    Raises:
        OSError, ValueError: for a model that cannot be loaded, none at all, or an unknown setting.
    """
    if not models and not sudoku_models:
        raise ValueError("models must name at least one model, got none")
    if setting is not None and setting not in SEQUENCES:
        raise ValueError(f"setting must be one of {', '.join(SEQUENCES)}, got {setting!r}")
    shown = [ShownModel.load(model, device) for model in models]
    solvers = [ShownModel.load(model, device) for model in sudoku_models]
    for solver in solvers:
        if solver.model.config.max_position_embeddings < 81:
            length = solver.model.config.max_position_embeddings
            raise ValueError(f"sudoku_models must be made for 81 tokens, got {solver.name} for {length}")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # what the argument leaves: reports of errors
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


def play(
    models: Sequence[ShownModel], read: Read, text: str, settings: Settings, previous: Sequence[Trace]
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


def _text_tab(app: gr.Blocks, models: list[ShownModel], setting: str | None) -> None:
    length = min(shown.model.config.max_position_embeddings for shown in models)
    if setting is not None:
        length = target_distribution(setting).dim()
    info = f"{GAP} is a gap" + (f"; the data: {SEQUENCES[setting]} (mod 10)" if setting else "")
    text = gr.Textbox(GAP * min(length, 32), label="Text", info=info, lines=1, render=False)
    examples = {text: text for text in (GAP * 4, "3__6", "__0_")} if setting == "d1" else {}
    _tab(app, models, text, examples, read_text, lambda traces, step: text_html(traces, step, setting), length)


def _sudoku_tab(app: gr.Blocks, models: list[ShownModel]) -> None:
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


def _tab(
    app: gr.Blocks,
    models: list[ShownModel],
    text: gr.Textbox,
    examples: dict[str, str],
    read: Read,
    render: Render,
    length: int,
    sudoku: bool = False,
) -> None:
    """Input, settings and result. All of one event, so that two runs never write at the same time."""
    latent = any(shown.has_latent for shown in models)
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
            controls = _controls(models, latent, length, sudoku)
        with gr.Column(elem_classes="vmd-result", min_width=280):
            result = gr.HTML(apply_default_css=False)
            step = gr.Slider(0, 1, 0, step=1, label="Step", info="drag to go back and forth")
            gr.HTML(legend_html(), apply_default_css=False)
    traces = gr.State([])

    def fill(event: gr.EventData, text: str, before: list[Trace], *values):
        chosen = dict(zip(controls, values, strict=True))
        latent_seed, token_seed = chosen["latent_seed"], chosen["token_seed"]
        try:
            settings = Settings(**chosen)
            if event.target is redraw_latent:
                settings = replace(settings, latent_seed=latent_seed + settings.num_rows)
            elif event.target is redraw_tokens:
                settings = replace(settings, token_seed=token_seed + settings.num_rows)
            now = play(models, read, text, settings, before)
        except ValueError as error:
            yield latent_seed, token_seed, before, gr.skip(), error_html(error, text if sudoku else "")
            return
        last = max(trace.num_steps for trace in now)
        for number in frames(now):
            slider = gr.update(maximum=last, value=number)
            yield settings.latent_seed, settings.token_seed, now, slider, render(now, number)

    gr.on(
        [run.click, redraw_latent.click, redraw_tokens.click, text.submit, app.load],
        fill,
        [text, traces, *controls.values()],
        [controls["latent_seed"], controls["token_seed"], traces, step, result],
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


def _controls(models: list[ShownModel], latent: bool, length: int, sudoku: bool) -> dict[str, gr.components.Component]:
    """The components that set each field of `Settings`."""
    per_step = any(shown.model.generation_config.resample_latents for shown in models)
    controls = {
        "num_steps": gr.Slider(1, length, 20 if sudoku else 1, step=1, label="Steps", info="forward passes"),
        "remasking": gr.Dropdown(
            list(REMASKING_RULES),
            value="top_prob_margin" if sudoku else "top_prob",
            label="Remasking",
            info="which predictions a step keeps",
        ),
        "latents": gr.Radio(
            [("one per sample", "per_sample"), ("the same for all", "same"), ("one per step", "per_step")],
            value="per_step" if per_step else "per_sample",
            label="z",
            visible=latent,
        ),
    }
    with gr.Row():
        controls["latent_seed"] = gr.Number(
            0, label="Seed of z", precision=0, minimum=0, min_width=120, visible=latent
        )
        controls["token_seed"] = gr.Number(0, label="Seed of tokens", precision=0, minimum=0, min_width=120)
    controls["tokens"] = gr.Radio(
        [("argmax; sampled without z", "auto"), ("argmax", "argmax"), ("sampled", "sampled")][sudoku:],
        value="argmax" if sudoku else "auto",
        label="Tokens",
        info="argmax leaves nothing to redraw",
    )
    samples = 6 if not sudoku and length <= 16 else 1
    controls["num_rows"] = gr.Slider(1, 8, samples, step=1, label="Samples", visible=not sudoku)
    return controls
