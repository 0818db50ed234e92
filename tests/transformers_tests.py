"""transformers' own tests of any model and config, from the source distribution of the installed version."""

import importlib.util
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

# What the two files import beside transformers, but their source distribution leaves out; nothing here needs more.
MISSING = {
    "__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def unpack(archive: Path, folder: Path) -> None:
    """The two files of an archive, with what they import, as a package. It is there as a whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        for name, text in MISSING.items():
            path = Path(partial, "tests", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        with tarfile.open(archive) as tar:
            for name in ("test_modeling_common.py", "test_configuration_common.py"):
                member = tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/tests/{name}")
                Path(partial, "tests", name).write_bytes(member.read())
        Path(partial, "tests").rename(folder)


def fetch() -> Path:
    """The folder of the tests, kept beside pip's other temporary files for the runs to come.

    Raises:
        OSError: if they cannot be had.
    """
    name = f"transformers-{version('transformers')}"
    folder = Path(tempfile.gettempdir(), f"{name}-tests")
    with FileLock(f"{folder}.lock"):  # of several processes of one run
        if folder.exists():
            return folder
        options = ["--no-deps", "--no-binary=transformers", "--retries=0", "--timeout=20", "--quiet"]
        with tempfile.TemporaryDirectory(dir=folder.parent) as download:
            command = [sys.executable, "-m", "pip", "download", name.replace("-", "=="), *options, "--dest", download]
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            archive = Path(download, f"{name}.tar.gz")
            if done.returncode or not archive.exists():
                raise OSError(f"pip cannot download the source distribution of {name}: {done.stderr.strip()[-300:]}")
            unpack(archive, folder)
    return folder


def load(module: str) -> ModuleType:
    """A module of transformers' tests; without it, the file that asks for it is skipped."""
    pytest.importorskip("parameterized", reason="transformers' own tests need parameterized")
    package = "tests_of_transformers"
    if package not in sys.modules:
        try:
            folder = fetch()
        except (OSError, KeyError) as error:
            pytest.skip(f"transformers' own tests cannot be had: {error}", allow_module_level=True)
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.{module}")
