"""The command `vmd-hf`: the scripts under one name, with their own options, one-line errors and exit codes.

Exit codes: 0 for success, 1 for a job that failed, 2 for wrong usage.

It stands beside the package, not in it: `import vmd_hf` makes transformers' Auto classes know the model, which takes
torch and seconds. A command imports that when it runs; `--help` and completion do not (see [`without_torch`]).
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

PACKAGE = Path(__file__).with_name("vmd_hf")
# Installed, the scripts are part of the package; in a checkout they stand beside src.
SCRIPTS = next(
    folder
    for folder in (PACKAGE / "training_scripts", PACKAGE.parents[1] / "training_scripts")
    if (folder / "train_vmd.py").exists()
)
MODEL_CARDS = PACKAGE.parents[1] / "model_cards"  # of a checkout
RECIPES = sorted(path.stem for path in (SCRIPTS / "recipes").glob("*.yaml"))
# Scripts that read their arguments before they import what computes.
PARSE_FIRST = ("generate_vmd", "make_card", "push_to_hub", "solve_sudoku")

app = typer.Typer(
    name="vmd-hf",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="""Variational masked diffusion: train, sample, evaluate and share.

    vmd-hf train d1                      a first model, in some minutes on a laptop

    vmd-hf evaluate --model outputs/d1 --setting d1

    vmd-hf generate --model outputs/d1 --watch

    vmd-hf demo                          watch MDM and VMD fill gaps, in the browser

    vmd-hf push outputs/d1 exported/vmd-d1 --repo_id me/vmd-d1

    Each command lists its options with --help. Set VMD_HF_DEBUG=1 to see where an error comes from.""",
)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
_HELP = {"-h", "--help"}
Arguments = Annotated[list[str] | None, typer.Argument(help="Options of the script; --help lists them.")]


def _complete_recipe(incomplete: str) -> list[str]:
    return [name for name in RECIPES if name.startswith(incomplete)]


@contextmanager
def one_line_errors(extra: str) -> Iterator[None]:
    """Errors become one line and exit code 1, or 2 for wrong usage; for a missing package it names the extra."""
    try:
        yield
    except Exception as error:
        if os.environ.get("VMD_HF_DEBUG"):
            raise
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            hint = f": pip install vmd_hf[{extra}]"
        message = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"vmd-hf: {message}{hint}", err=True)
        wrong_usage = message.startswith("Some specified arguments are not used")  # HfArgumentParser's ValueError
        raise typer.Exit(2 if wrong_usage else 1) from error


def without_torch() -> None:
    """Makes what `--help` needs quick to import; nothing else can be done in this process afterwards.

    transformers, which finds no torch then, defines its TrainingArguments in less than a second instead of five (only
    the default of `--optim` is another one); and modules of vmd_hf are imported without `vmd_hf/__init__.py`.
    """
    if "torch" not in sys.modules:
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # of transformers, that there is no torch
        sys.modules["torch"] = None
        sys.modules["vmd_hf"] = package = ModuleType("vmd_hf")
        package.__path__ = [str(PACKAGE)]


def run_script(command: Callable, name: str, argv: list[str]) -> None:
    """Calls a script's `main`; its errors become one line and exit code 1, or 2 from its argument parser."""
    sys.path.insert(0, str(SCRIPTS))
    sys.argv[0] = f"vmd-hf {command.__name__}"  # what the argument parser calls itself
    if _HELP & set(argv):
        typer.echo(f"{command.__doc__}\n")
        if name in PARSE_FIRST:
            without_torch()
    try:
        with one_line_errors("scripts"):
            code = importlib.import_module(name).main(argv)
    finally:
        sys.path.remove(str(SCRIPTS))
    if code:
        raise typer.Exit(code)


@app.command(context_settings=_PASS_ON, add_help_option=False)
def train(
    recipe: Annotated[str | None, typer.Argument(autocompletion=_complete_recipe)] = None, options: Arguments = None
) -> None:
    """Train a model by a recipe: a name that comes with the package (d1, d2, sotu, sudoku, ...) or a YAML file; what
    stands on the command line wins. Example: vmd-hf train d1 --max_steps 1000 --output_dir outputs/d1"""
    argv = [] if recipe is None else [recipe]
    if recipe in RECIPES:
        argv = [str(SCRIPTS / "recipes" / f"{recipe}.yaml")]
    elif recipe is not None and not recipe.startswith("-") and not Path(recipe).is_file():
        typer.echo(f"vmd-hf: recipe must be a YAML file or one of {', '.join(RECIPES)}, got {recipe!r}", err=True)
        raise typer.Exit(2)
    run_script(train, "train_vmd", argv + (options or []))


@app.command(context_settings=_PASS_ON, add_help_option=False)
def generate(options: Arguments = None) -> None:
    """Continue a prompt, fill its masks, or start from nothing. Example: vmd-hf generate --model DIR --watch"""
    run_script(generate, "generate_vmd", options or [])


@app.command(context_settings=_PASS_ON, add_help_option=False)
def evaluate(options: Arguments = None) -> None:
    """Measure a model: tables, JSON, bounds. Example: vmd-hf evaluate --model DIR --task text --num_steps 1 4"""
    run_script(evaluate, "evaluate_vmd", options or [])


@app.command(context_settings=_PASS_ON, add_help_option=False)
def solve(options: Arguments = None) -> None:
    """Solve a Sudoku, and show the board as it fills. Example: vmd-hf solve "53..7....6..1..." --model DIR"""
    run_script(solve, "solve_sudoku", options or [])


@app.command(context_settings=_PASS_ON, add_help_option=False)
def card(options: Arguments = None) -> None:
    """Write a model's card, README.md, from card.yaml and results.json in its folder. Example: vmd-hf card DIR"""
    run_script(card, "make_card", options or [])


@app.command(context_settings=_PASS_ON, add_help_option=False)
def push(options: Arguments = None) -> None:
    """Export a model with its code and card, and upload it. Example: vmd-hf push outputs/d1 exported/d1 --repo_id
    me/vmd-d1"""
    run_script(push, "push_to_hub", options or [])


@app.command("lm-eval", context_settings=_PASS_ON, add_help_option=False)
def lm_eval(options: Arguments = None) -> None:
    """The command of lm-evaluation-harness, to which the model vmd is known. Example: vmd-hf lm-eval --model vmd
    --model_args pretrained=DIR,num_steps=4 --tasks NAME --include_path FOLDER"""
    argv = options or []
    sys.argv[:] = ["vmd-hf lm-eval", *argv]
    with one_line_errors("eval"):
        if _HELP & set(argv):
            typer.echo(f"{lm_eval.__doc__}\n")
        else:
            import vmd_hf.harness  # noqa: F401, makes the harness know the model
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()


@app.command()
def demo(
    models: Annotated[
        list[str] | None, typer.Argument(help="Folders or Hub ids, to fill gaps in texts side by side.")
    ] = None,
    sudoku: Annotated[list[str] | None, typer.Option(help="The same for Sudokus; may be given again.")] = None,
    setting: Annotated[
        str | None, typer.Option(help="Synthetic task to check samples against: d1, d2, two_token_deterministic, ...")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Open a public link through Gradio's server, too.")] = False,
    space: Annotated[
        Path | None, typer.Option(help="Write a folder that runs as a Space instead of serving.", file_okay=False)
    ] = None,
) -> None:
    """Type text with gaps, or a Sudoku, and watch models fill it side by side, in the browser. Without models:
    those in model_cards. Example: vmd-hf demo outputs/d1/mdm-0 outputs/d1/vmd-0 --setting d1"""
    if not models and not sudoku:
        cards = MODEL_CARDS if MODEL_CARDS.is_dir() else Path("model_cards")
        if not cards.is_dir():
            typer.echo("vmd-hf: models must be given where there is no folder model_cards, got none", err=True)
            raise typer.Exit(2)
        models, sudoku, setting = [str(cards / "mdm-d1"), str(cards / "vmd-d1")], [str(cards / "vmd-sudoku")], "d1"
    with one_line_errors("demo"):
        from vmd_hf.demo import launch, write_space
        from vmd_hf.hub import check_model

        for model in [*(models or []), *(sudoku or [])]:
            check_model(model)
        if space is None:
            launch(models or [], sudoku or [], setting, port, share)
        else:
            write_space(space, models or [], sudoku or [], setting)
            typer.echo(f"try: cd {space} && python app.py; upload: hf upload USER/NAME {space} --repo-type space")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
