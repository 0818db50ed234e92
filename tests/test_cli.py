import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_hub import small_model
from typer.testing import CliRunner

from vmd_hf import cli
from vmd_hf.data.synthetic import synthetic_tokenizer
from vmd_hf.data.text import character_tokenizer

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


def run(*argv):
    return CliRunner().invoke(cli.app, [str(part) for part in argv])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    small_model().save_pretrained(folder)
    synthetic_tokenizer().save_pretrained(folder)
    return folder


def test_help_teaches_and_lists_the_options_of_the_scripts():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("train", "generate", "evaluate", "solve", "push", "demo"):
        assert command in result.output
    assert "vmd-hf train d1" in result.output and "VMD_HF_DEBUG" in result.output
    result = run("train", "--help")
    assert result.exit_code == 0
    assert "vmd-hf train d1 --max_steps 1000" in result.output  # the lesson
    assert "--latent_size" in result.output and "--learning_rate" in result.output  # the options
    assert "usage: vmd-hf train" in result.output


def test_a_model_is_trained_evaluated_sampled_and_exported(tmp_path):
    small = ["--hidden_size=16", "--num_hidden_layers=1", "--report_to=none", "--disable_tqdm=true"]
    result = run("train", "d1", "--max_steps", 2, f"--output_dir={tmp_path / 'd1'}", "--num_train_rows=300", *small)
    assert result.exit_code == 0, result.output
    result = run("evaluate", "--model", tmp_path / "d1", "--setting=d1", "--num_samples=50", "--num_steps", "1", "2")
    assert result.exit_code == 0, result.output
    (rows,) = json.loads((tmp_path / "d1" / "results.json").read_text()).values()
    steps = {row["num_steps"] for row in rows}
    assert steps == {1, 2}
    result = run("generate", "--model", tmp_path / "d1", "--prompt=12", "--max_new_tokens=2")
    assert result.exit_code == 0 and result.stdout.startswith("12")
    result = run("push", tmp_path / "d1", tmp_path / "exported")
    assert result.exit_code == 0 and (tmp_path / "exported" / "modeling_vmd.py").exists()


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["train", "d11"], 2, "recipe must be a YAML file or one of boards, d1, "),
        (["train", "d1", "--max_stepz=3"], 2, "max_stepz"),
        (
            ["train", "d1", "--latent_size=-1", "--report_to=none"],
            1,
            "latent_size must be 0 (no latent) or more, got -1",
        ),
        (
            ["generate", "--model", "SAVED", "--prompt=1", "--max_new_tokens=99"],
            1,
            "at most max_position_embeddings = 8",
        ),
        (["generate", "--model", "nowhere/at/all/there"], 1, None),
        (["solve", "--model", "SAVED", PUZZLE[:80]], 1, "81"),
        (["bake"], 2, "bake"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(saved, argv, code, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = run(*(saved if part == "SAVED" else part for part in argv))
    assert result.exit_code == code
    assert "Traceback" not in result.output
    if message is not None:
        assert message in result.output
    if code == 1:
        assert len([line for line in result.stderr.splitlines() if line.startswith("vmd-hf: ")]) == 1


def test_an_unsolved_puzzle_is_a_failed_job(saved, tmp_path):
    torch.manual_seed(0)
    tokenizer = character_tokenizer("123456789", eos_token=None)
    model = small_model(tokenizer, max_position_embeddings=81)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = run("solve", f"--model={tmp_path}", "--num_steps=1", PUZZLE.replace(".", "1"))
    assert result.exit_code == 1


def test_errors_show_where_they_come_from_on_request(saved, monkeypatch):
    monkeypatch.setenv("VMD_HF_DEBUG", "1")
    result = run("generate", "--model", saved, "--prompt=1", "--max_new_tokens=99")
    assert isinstance(result.exception, ValueError)


def test_the_command_itself_and_its_completion():
    process = subprocess.run(
        [sys.executable, "-m", "vmd_hf.cli", "train", "nothing"], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 2 and process.stderr.startswith("vmd-hf: recipe must be a YAML file or one of")
    assert cli._complete_recipe("d2") == ["d2", "d2_blocks"]


def test_bash_completes_commands_with_the_script_that_the_command_prints():
    command = Path(sys.executable).with_name("vmd-hf")
    if shutil.which("bash") is None or not command.exists():
        pytest.skip("bash or the installed command vmd-hf is not there")
    script = """
        eval "$(vmd-hf --show-completion)"
        complete -p vmd-hf
        COMP_WORDS=(vmd-hf e); COMP_CWORD=1; _vmd_hf_completion vmd-hf
        echo "${COMPREPLY[@]}"
    """
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}"}
    process = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=300, env=environment, check=True
    )
    assert process.stdout.split() == [*"complete -o default -F _vmd_hf_completion vmd-hf".split(), "evaluate"]


@pytest.mark.parametrize(
    ("shell", "words", "expected"),
    [
        ("bash", {"COMP_WORDS": "vmd-hf train d2", "COMP_CWORD": "2"}, ["d2", "d2_blocks"]),
        (
            "bash",
            {"COMP_WORDS": "vmd-hf demo --s", "COMP_CWORD": "2"},
            ["--sudoku", "--setting", "--share", "--space"],
        ),
        ("fish", {"_TYPER_COMPLETE_ARGS": "vmd-hf pu", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}, ["push"]),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "vmd-hf so"}, ["solve"]),
    ],
)
def test_shells_complete_commands_recipes_and_options(shell, words, expected):
    result = CliRunner().invoke(cli.app, [], env={"_VMD_HF_COMPLETE": f"complete_{shell}", **words})
    assert result.exit_code == 0
    for word in expected:
        assert word in result.output.replace('"', " ").split()
    assert "generate" not in result.output
