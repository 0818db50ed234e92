"""Optional dependencies."""

import importlib
from types import ModuleType


def import_extra(name: str, extra: str) -> ModuleType:
    """The module, or an error that names the extra of this package that it comes with.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed: pip install vmd_hf[{extra}]") from error
