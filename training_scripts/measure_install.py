"""What it takes to install and import the package, to a first text, and how training scales from one process to two.

    python training_scripts/measure_install.py
    python training_scripts/measure_install.py --parts scaling --train_arguments recipes/d1.yaml --max_steps 200

- install: for each of `--extras`, a fresh virtual environment from a fresh clone of `--source`: seconds, and megabytes
  on the disk, what torch brings (itself, triton, the nvidia packages) apart from the rest. In the first environment
  also the seconds from `git clone` to a text of a shipped model, and import times, `vmd_hf` beside a model file of
  transformers: medians of processes, in turns, after one of each that does not count.
- scaling: `train_vmd.py` under `accelerate launch` with one and with two processes on CPUs, one thread and the same
  batch each, in turns: medians of the Trainer's own train_samples_per_second. Efficiency is that of two over twice
  that of one.

Installing takes files from pip's cache where it can, and else depends on the network: `--no_cache` leaves the cache
out. Prints tables, and writes them with versions, cores and the machine's load to `--output`.
"""

import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import distributions, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import HfArgumentParser

SCRIPTS = Path(__file__).parent
OF_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
PARTS = ("install", "scaling")
MODULES = ("torch", "transformers.models.modernbert.modeling_modernbert", "vmd_hf")
FIRST_TEXT = """
import vmd_hf
from transformers import pipeline
print(pipeline("masked-diffusion", model={model!r})("3[MASK][MASK]6", num_steps=1, seed=0)["generated_text"])
"""
TIMED_IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


@dataclass
class Arguments:
    """What to measure."""

    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": "install, scaling, or both."})
    source: str = field(default=str(SCRIPTS.parent), metadata={"help": "Repository to clone: a folder or an address."})
    extras: list[str] = field(
        default_factory=lambda: ["", "text,scripts", "dev"],
        metadata={"help": "Extras of each environment, with commas between them; an empty string for none."},
    )
    torch: str = field(
        default=f"torch=={version('torch').split('+')[0]}", metadata={"help": "The torch to install, as pip takes it."}
    )
    no_cache: bool = field(default=False, metadata={"help": "Do not take files from pip's cache."})
    repeats: int = field(default=5, metadata={"help": "Processes of which an import time is the median."})
    train_arguments: str = field(
        default="recipes/sotu.yaml", metadata={"help": "Of train_vmd.py; a recipe is looked for beside the script."}
    )
    max_steps: int = field(default=50, metadata={"help": "Updates of each training."})
    train_repeats: int = field(default=3, metadata={"help": "Trainings of which a throughput is the median."})
    output: str = "outputs/install.json"


def call(*command: str | Path, **environment: str) -> str:
    """What a command prints.

    Raises:
        RuntimeError: if it fails, with what it wrote.
    """
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def megabytes(paths) -> float:
    """Of the files among these paths, in 10^6 bytes; of a file with several names once."""
    files = {(stat.st_dev, stat.st_ino): stat.st_size for path in paths if path.is_file() for stat in [path.lstat()]}
    return sum(files.values()) / 1e6


def torch_megabytes(site_packages: Path) -> float:
    """Of the files that torch and what it brings have installed."""
    brought = [
        distribution
        for distribution in distributions(path=[str(site_packages)])
        if OF_TORCH.fullmatch(distribution.metadata["Name"].lower())
    ]
    return megabytes([Path(file.locate()) for each in brought for file in each.files or ()])


def install(clone: Path, venv: Path, extras: str, args: Arguments) -> dict[str, Any]:
    """A fresh environment: its row of the table."""
    start = time.perf_counter()
    call(sys.executable, "-m", "venv", venv)
    (site_packages,) = venv.glob("lib/python*/site-packages")
    before = megabytes(site_packages.rglob("*"))
    package = f"{clone}[{extras}]" if extras else str(clone)
    options = ["--no-cache-dir"] if args.no_cache else []
    call(venv / "bin" / "python", "-m", "pip", "install", "-q", *options, args.torch, package)
    seconds = time.perf_counter() - start
    total, of_torch = megabytes(site_packages.rglob("*")) - before, torch_megabytes(site_packages)
    return {
        "extras": extras or "none",
        "seconds": seconds,
        "megabytes": total,
        "torch_megabytes": of_torch,
        "other_megabytes": total - of_torch,
    }


def measure_install(args: Arguments) -> dict[str, list[dict[str, Any]]]:
    tables: dict[str, list[dict[str, Any]]] = {"install": []}
    with TemporaryDirectory() as folder:
        clone = Path(folder, "clone")
        start = time.perf_counter()
        call("git", "clone", "-q", args.source, clone)
        cloned = time.perf_counter() - start
        for index, extras in enumerate(args.extras):
            venv = Path(folder, f"venv-{index}")
            tables["install"].append(install(clone, venv, extras, args))
            if index == 0:
                python = venv / "bin" / "python"
                start = time.perf_counter()
                text = call(python, "-c", FIRST_TEXT.format(model=str(clone / "model_cards" / "vmd-d1"))).strip()
                generated = time.perf_counter() - start
                seconds = {"git clone": cloned, "install": tables["install"][0]["seconds"], f"text {text}": generated}
                seconds["together"] = sum(seconds.values())
                tables["first text"] = [{"what": what, "seconds": each} for what, each in seconds.items()]
                tables["import"] = measure_imports(python, MODULES, args.repeats)
            shutil.rmtree(venv)
    return tables


def measure_imports(python: Path | str, modules: tuple[str, ...], repeats: int) -> list[dict[str, Any]]:
    """Median seconds of importing each module in a process of its own."""
    times: dict[str, list[float]] = {module: [] for module in modules}
    for repeat in range(repeats + 1):
        for module, record in times.items():
            seconds = float(call(python, "-c", TIMED_IMPORT.format(module)))
            if repeat:
                record.append(seconds)
    return [
        {"module": module, "median_seconds": statistics.median(record), "least": min(record), "most": max(record)}
        for module, record in times.items()
    ]


def samples_per_second(printed: str) -> float:
    """The Trainer's own figure in what a training printed.

    Raises:
        ValueError: if it is not there.
    """
    found = re.findall(r"'train_samples_per_second': '?([0-9.e+-]+)", printed)
    if not found:
        raise ValueError(f"the training must print train_samples_per_second, got {printed[-500:]!r}")
    return float(found[-1])


def train(num_processes: int, args: Arguments) -> float:
    """Samples a second of one training."""
    first, *rest = shlex.split(args.train_arguments)
    if not Path(first).exists() and (SCRIPTS / first).exists():
        first = str(SCRIPTS / first)
    with TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "accelerate.commands.launch"]
        launch += ["--config_file", SCRIPTS / "accelerate_configs" / "cpu_2.yaml", "--num_processes", num_processes]
        launch += ["--main_process_port", 0, SCRIPTS / "train_vmd.py", first, *rest, f"--output_dir={folder}"]
        launch += [f"--max_steps={args.max_steps}", "--eval_strategy=no", "--save_strategy=no", "--report_to=none"]
        launch += ["--disable_tqdm=true", "--use_cpu=true"]
        return samples_per_second(call(*launch, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"))


def measure_scaling(args: Arguments) -> list[dict[str, Any]]:
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.train_repeats):
        for num_processes, record in rates.items():
            record.append(train(num_processes, args))
    medians = {num_processes: statistics.median(record) for num_processes, record in rates.items()}
    return [
        {
            "processes": num_processes,
            "samples_per_second": medians[num_processes],
            "least": min(record),
            "most": max(record),
            "efficiency": medians[num_processes] / (num_processes * medians[1]),
        }
        for num_processes, record in rates.items()
    ]


def main(argv: list[str]) -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(args=argv)
    if unknown := sorted(set(args.parts) - set(PARTS)):
        raise ValueError(f"parts must be of {PARTS}, got {', '.join(unknown)}")

    from vmd_hf.evaluation.tables import (  # torch, too, which the processes below need not share
        print_table,
        write_json,
    )

    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    machine |= {name: version(name) for name in ("torch", "transformers", "accelerate")}
    tables = measure_install(args) if "install" in args.parts else {}
    if "scaling" in args.parts:
        tables["scaling"] = measure_scaling(args)
    for title, rows in tables.items():
        print_table(title, rows)
    write_json(args.output, {"machine": machine, "arguments": vars(args), **tables})


if __name__ == "__main__":
    main(sys.argv[1:])
