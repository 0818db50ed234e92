import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from test_hub import small_model
from test_model_cards import CARDS
from typer.testing import CliRunner

import vmd_hf_cli as cli
from vmd_hf import VMDForMaskedDiffusion
from vmd_hf.data.sudoku import sudoku_tokenizer
from vmd_hf.data.synthetic import synthetic_tokenizer

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
    for command in ("train", "generate", "evaluate", "solve", "card", "push", "lm-eval", "demo"):
        assert f"\n│ {command} " in result.output
    assert "vmd-hf train d1" in result.output and "VMD_HF_DEBUG" in result.output
    result = run("train", "--help")
    assert result.exit_code == 0
    assert "vmd-hf train d1 --max_steps 1000" in result.output  # the lesson
    assert "--latent_size" in result.output and "--learning_rate" in result.output  # the options
    assert "usage: vmd-hf train" in result.output


def test_help_lists_the_options_and_imports_no_torch():
    """In a process of its own, where torch has not been imported before."""
    code = """
        import sys
        import vmd_hf_cli
        from typer.testing import CliRunner

        for arguments, options in {
            "": "solve",
            "card": "folder",
            "demo": "--setting",
            "evaluate": "--model --task --num_steps --device",
            "generate": "--model --prompt --device --watch --num_steps --top_p --guidance_scale",
            "lm-eval": "run",
            "push": "--repo_id --private",
            "solve": "--puzzle --model --device --num_attempts",
            "train": "--latent_size --task --learning_rate",
        }.items():
            result = CliRunner().invoke(vmd_hf_cli.app, [*arguments.split(), "--help"])
            assert result.exit_code == 0, result.output
            for option in options.split():
                assert option in result.output, (arguments, option)
        assert not hasattr(sys.modules.get("torch"), "Tensor")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=300, check=True)


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
        (
            ["train", "d11"],
            2,
            "recipe must be a YAML file or one of antibody_comparison, boards, causal, cdr3_comparison, d1, ",
        ),
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
        (["generate", "--model", "SAVED", "--prompt", "12x[MASK]"], 1, "vocabulary, '0123456789', got 'x'"),
        (["generate", "--model", "nowhere/at/all"], 1, "got 'nowhere/at/all': no such folder"),
        (["solve", "--model", "./nowhere", PUZZLE], 1, "got './nowhere': no such folder"),
        (["push", "/nowhere", "exported"], 1, "got '/nowhere': no such folder"),
        (["demo", "~/nowhere"], 1, "got '~/nowhere': no such folder"),
        (["card", "nowhere"], 1, "got nowhere without card.yaml"),
        (["solve", "--model", "SAVED", PUZZLE[:80]], 1, "81"),
        (["solve", "--model", "SAVED"], 2, "one puzzle must be given, got none"),
        (["solve", PUZZLE, "--puzzle", PUZZLE], 2, "one puzzle must be given, got '53"),
        (["solve", PUZZLE, "--modle=SAVED"], 2, "unrecognized arguments: --modle=SAVED"),
        (["bake"], 2, "bake"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(saved, argv, code, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = run(*(saved if part == "SAVED" else part for part in argv))
    assert result.exit_code == code
    assert "Traceback" not in result.output
    assert message in result.output
    if code == 1:
        assert len([line for line in result.stderr.splitlines() if line.startswith("vmd-hf: ")]) == 1


def test_the_puzzle_may_stand_anywhere_and_an_unsolved_one_is_a_failed_job(tmp_path):
    tokenizer = sudoku_tokenizer()
    model = small_model(tokenizer, max_position_embeddings=81)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = ["--model", tmp_path, "--num_steps=1", "--num_attempts=1", "--device=cpu"]
    orders = [PUZZLE, *options], [*options, "--puzzle", PUZZLE], [*options, PUZZLE]
    first, second, third = (run("solve", *argv) for argv in orders)
    assert first.exit_code == second.exit_code == third.exit_code == 1
    assert first.stdout == second.stdout == third.stdout
    assert first.stdout.startswith("5 3 ") and "\nnot valid (1 attempts)" in first.stdout


@pytest.mark.parametrize("command", ["generate", "solve"])
def test_the_device_is_that_of_the_model_its_masks_and_its_noise(command, tmp_path, monkeypatch):
    """The device "meta" stands for one that is not the CPU, and generates nothing."""
    small_model(sudoku_tokenizer(), max_position_embeddings=81).save_pretrained(tmp_path)
    sudoku_tokenizer().save_pretrained(tmp_path)

    class Generator:
        def __init__(self, device):
            self.device = device

        def manual_seed(self, seed):
            return self

    def refuse(model, input_ids, generator, **settings):
        raise ValueError(f"devices {model.device} {input_ids.device} {generator.device}")

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(VMDForMaskedDiffusion, "generate", refuse)
    argv = [command, f"--model={tmp_path}", "--prompt=1[MASK]" if command == "generate" else PUZZLE]
    assert "devices meta meta meta" in run(*argv, "--device=meta").stderr
    assert "devices cpu cpu cpu" in run(*argv, "--device=cpu").stderr


def test_a_card_is_written_from_its_files(tmp_path):
    model = tmp_path / "vmd-d1"
    model.mkdir()
    for name in ("card.yaml", "results.json"):
        shutil.copy(CARDS / "vmd-d1" / name, model)
    assert run("card", model).exit_code == 0
    assert (model / "README.md").read_text().strip() == (CARDS / "vmd-d1" / "README.md").read_text().strip()
    assert len(list(model.iterdir())) == 3


def test_errors_show_where_they_come_from_on_request(saved, monkeypatch):
    monkeypatch.setenv("VMD_HF_DEBUG", "1")
    result = run("generate", "--model", saved, "--prompt=1", "--max_new_tokens=99")
    assert isinstance(result.exception, ValueError)


def test_the_command_itself_and_the_script_by_which_bash_completes_it(tmp_path):
    command = tmp_path / "vmd-hf"
    command.write_text(f"#!{sys.executable}\nfrom vmd_hf_cli import main\nmain()\n")  # as it is installed
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    settings = {"capture_output": True, "text": True, "timeout": 300, "env": environment}
    process = subprocess.run(["vmd-hf", "train", "nothing"], **settings)
    assert process.returncode == 2 and process.stderr.startswith("vmd-hf: recipe must be a YAML file or one of")
    if shutil.which("bash") is None:
        pytest.skip("bash is not there")
    script = """
        eval "$(vmd-hf --show-completion)"
        complete -p vmd-hf
        COMP_WORDS=(vmd-hf e); COMP_CWORD=1; _vmd_hf_completion vmd-hf
        echo "${COMPREPLY[@]}"
    """
    process = subprocess.run(["bash", "-c", script], **settings, check=True)
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
