"""A folder that runs as a Hugging Face Space."""

import os
from collections.abc import Sequence
from importlib.metadata import requires
from pathlib import Path
from shutil import copytree, ignore_patterns

import gradio as gr
from packaging.requirements import Requirement

from .app import build
from .traces import ShownModel

PACKAGE = Path(__file__).parents[1]


def write_space(
    folder: str | os.PathLike,
    models: Sequence[str | os.PathLike],
    sudoku_models: Sequence[str | os.PathLike] = (),
    setting: str | None = None,
) -> None:
    """Writes a Space: app.py, README.md, requirements.txt, this package, and models that are folders here; ids on the
    Hub stay what they are. Other files in the folder stay.

    Raises:
        OSError, ValueError: for a model that cannot be loaded, two folders of one name, none at all, or an unknown
            setting.
    """
    build(models, sudoku_models, setting, "cpu")  # whatever is wrong shows here and not on the Hub
    local = [Path(model) for model in [*models, *sudoku_models] if Path(model).is_dir()]
    names = [path.resolve().name for path in local]
    if len(set(names)) < len(names):
        raise ValueError(f"models must have folders of different names, got {names}")
    folder = Path(folder)
    copytree(
        PACKAGE,
        folder / "vmd_hf",
        ignore=ignore_patterns("__pycache__", "training_scripts"),
        dirs_exist_ok=True,
    )
    for path, name in zip(local, names, strict=True):
        shown = ShownModel.load(path, "cpu")
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
