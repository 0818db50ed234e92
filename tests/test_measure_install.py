"""The arithmetic of the measurement script; what it starts takes minutes, and is not started here."""

import os
import sys

import measure_install
import pytest


def write(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))


def test_sizes_are_those_of_files_and_those_of_torch_apart(tmp_path):
    for name, folder, size in (
        ("torch", "torch", 3_000_000),
        ("nvidia-cublas-cu12", "nvidia", 2_000_000),
        ("Triton", "triton", 500_000),
        ("torchmetrics", "torchmetrics", 700_000),
        ("numpy", "numpy", 1_000_000),
    ):
        write(tmp_path / folder / "code.bin", size)
        info = tmp_path / f"{folder}-1.0.dist-info"
        write(info / "METADATA", 0)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "RECORD").write_text(f"{folder}/code.bin,,{size}\n{folder}/not_there.bin,,1\n")
    assert measure_install.torch_megabytes(tmp_path) == 5.5
    folders = [path for path in tmp_path.iterdir() if not path.name.endswith("dist-info")]
    files = [file for folder in folders for file in folder.rglob("*")]
    assert measure_install.megabytes(files) == 7.2
    os.link(tmp_path / "numpy" / "code.bin", tmp_path / "numpy" / "again.bin")
    assert measure_install.megabytes([*files, tmp_path / "numpy" / "again.bin"]) == 7.2


def test_imports_are_timed_in_processes_of_their_own():
    rows = measure_install.measure_imports(sys.executable, ("math", "json"), repeats=2)
    assert [row["module"] for row in rows] == ["math", "json"]
    assert all(0 < row["least"] <= row["median_seconds"] <= row["most"] for row in rows)
    with pytest.raises(RuntimeError, match="No module named 'not_there'"):
        measure_install.measure_imports(sys.executable, ("not_there",), repeats=1)


def test_the_last_throughput_that_was_printed_counts():
    printed = "{'loss': '1.2'}\n{'train_runtime': '2', 'train_samples_per_second': '12.5', 'epoch': '1'}\n"
    assert measure_install.samples_per_second(printed) == 12.5
    assert measure_install.samples_per_second(printed + "{'train_samples_per_second': 1e3}") == 1000
    with pytest.raises(ValueError, match="must print train_samples_per_second"):
        measure_install.samples_per_second("nothing")


def test_efficiency_is_that_of_two_over_twice_that_of_one(monkeypatch):
    figures = iter([100.0, 170.0, 110.0, 165.0, 90.0, 10.0])  # one and two processes in turns
    order = []
    monkeypatch.setattr(measure_install, "train", lambda count, args: order.append(count) or next(figures))
    one, two = measure_install.measure_scaling(measure_install.Arguments(train_repeats=3))
    assert order == [1, 2, 1, 2, 1, 2]
    assert one["samples_per_second"] == 100 and one["efficiency"] == 1
    assert two["samples_per_second"] == 165 and two["efficiency"] == 0.825
    assert (two["least"], two["most"]) == (10, 170)


def test_an_unknown_part_is_an_error():
    with pytest.raises(ValueError, match=r"parts must be of \('install', 'scaling'\), got speed"):
        measure_install.main(["--parts", "speed", "install"])
