"""Modules for the `evaluate` library: `evaluate.load(path)` of a file here, or [`load`] by name."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluate import EvaluationModule

PAPER_CITATION = """@article{zhang2025variational,
  title={Variational Masked Diffusion Models}, author={Zhang, Schwing, Zhao}, journal={arXiv:2510.23606}, year={2025}
}"""
NAMES = ("joint_distribution", "likelihood_bound", "sudoku_validity", "text_quality")


def load(name: str, **kwargs) -> "EvaluationModule":
    """`evaluate.load` of one of this package's metrics.

    Raises:
        ValueError: for a name that is none of them.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {NAMES}, got {name!r}")
    import evaluate

    return evaluate.load(str(Path(__file__).with_name(f"{name}.py")), **kwargs)


__all__ = ["NAMES", "PAPER_CITATION", "load"]
