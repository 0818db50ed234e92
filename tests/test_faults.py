"""What happens to training and to files when processes are killed, disks are full and inputs are broken."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import evaluate_vmd
import generate_vmd
import push_to_hub
import pytest
import torch
import train_vmd
from safetensors.torch import load_file
from test_hub import assert_same_state, names, small_model
from transformers import AutoModelForMaskedLM

import vmd_hf
from vmd_hf import training_run
from vmd_hf.data.synthetic import synthetic_tokenizer
from vmd_hf.hub import export_model
from vmd_hf.training import last_whole_checkpoint

TRAIN = (
    "--num_train_rows 100 --hidden_size 16 --num_attention_heads 2 --max_steps 4 --save_strategy steps --save_steps 1"
)
TRAIN = [*TRAIN.split(), "--report_to=none", "--disable_tqdm=true", "--ema_decay=0.9"]


def test_killed_trainings_end_with_the_weights_of_an_undisturbed_one(tmp_path):
    paths = [Path(vmd_hf.__file__).parents[1], Path(train_vmd.__file__).parent]
    subprocess.run(
        [sys.executable, Path(__file__).with_name("kill_rig.py"), tmp_path, "20", "0"],
        env={"PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=300,
    )
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["kills"] == 20
    assert counts["checkpoints"] == sorted(counts["checkpoints"]) and len(set(counts["checkpoints"])) > 2
    killed, undisturbed = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "undisturbed"))
    assert all(torch.equal(killed[name], value) for name, value in undisturbed.items())


def test_the_last_whole_checkpoint_is_the_newest_that_was_written_to_its_end(tmp_path):
    assert last_whole_checkpoint(tmp_path / "nowhere") is None and last_whole_checkpoint(tmp_path) is None
    for step in (2, 9, 10, 11, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 9, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"global_st')
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_training_goes_on_only_where_it_is_told_to(tmp_path):
    train_vmd.main([*TRAIN, f"--output_dir={tmp_path}"])
    weights = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="output_dir must not hold the checkpoints of another training"):
        train_vmd.main([*TRAIN, f"--output_dir={tmp_path}"])
    # At its end there is nothing more to do, but to write the model once more.
    (tmp_path / "model.safetensors").unlink()
    train_vmd.main([*TRAIN, f"--output_dir={tmp_path}", "--resume_from_checkpoint=true"])
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert last_whole_checkpoint(tmp_path).endswith("checkpoint-4")


@pytest.mark.parametrize(
    ("factor", "clipping", "save_steps", "found_in"),
    [(torch.nan, 1.0, 1, 3), (torch.inf, 1.0, 2, 4), (torch.nan, 0.0, 2, 4)],  # with the next log
)
def test_a_gradient_that_is_not_finite_stops_the_training_before_it_saves(
    tmp_path, monkeypatch, factor, clipping, save_steps, found_in
):
    steps = []

    def spoil(module, inputs, output):
        steps.append(1)
        if module.training and len(steps) == 3:
            output.loss = output.loss * factor

    monkeypatch.setattr(training_run, "build_model", with_hook(training_run.build_model, spoil))
    arguments = [f"--save_steps={save_steps}", f"--max_grad_norm={clipping}", "--logging_steps=1000"]
    with pytest.raises(FloatingPointError, match=f"not finite.*step {found_in}"):
        train_vmd.main([*TRAIN, *arguments, f"--output_dir={tmp_path}"])
    assert len(steps) == found_in
    assert last_whole_checkpoint(tmp_path).endswith("checkpoint-2")
    weights = load_file(tmp_path / "checkpoint-2" / "training_weights.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def with_hook(build, hook):
    def build_with_hook(*args, **kwargs):
        model = build(*args, **kwargs)
        model.register_forward_hook(hook)
        return model

    return build_with_hook


def test_a_full_disk_leaves_what_was_saved_before(tmp_path):
    before, after = small_model(), small_model()
    with torch.no_grad():
        after.lm_head.weight.add_(1)
    export_model(before, tmp_path / "model", synthetic_tokenizer())
    files = names(tmp_path / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # no file can be larger
    try:
        for save in (after.save_pretrained, lambda folder: export_model(after, folder)):
            with pytest.raises(Exception, match="File too large"):
                save(tmp_path / "model")
            with pytest.raises(Exception, match="File too large"):
                save(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path / "model") == files and not names(tmp_path / "new")
    assert_same_state(AutoModelForMaskedLM.from_pretrained(tmp_path / "model"), before)


def test_a_folder_that_cannot_be_written_to_is_found_before_the_training(monkeypatch):
    monkeypatch.setattr(training_run, "build_data", lambda *args: pytest.fail("it started"))
    with pytest.raises(OSError, match="/proc/nowhere"):
        train_vmd.main([*TRAIN, "--output_dir=/proc/nowhere"])
    with pytest.raises(OSError, match="/proc/nowhere"):
        small_model().save_pretrained("/proc/nowhere")


def test_saving_in_shards_and_whole_again_leaves_no_file_of_the_other(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert "model.safetensors.index.json" in names(tmp_path) and "model.safetensors" not in names(tmp_path)
    assert_same_state(AutoModelForMaskedLM.from_pretrained(tmp_path), model)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path)
    assert [name for name in names(tmp_path) if "safetensors" in name] == ["model.safetensors"]
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert_same_state(AutoModelForMaskedLM.from_pretrained(tmp_path), model)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b""), OSError, "not whole"),
        (lambda f: (f / "model.safetensors").unlink(), OSError, "no file named model.safetensors"),
        (lambda f: (f / "config.json").write_text('{"model_type": "vm'), OSError, "not a valid JSON file"),
        (lambda f: (f / "config.json").write_text("{}"), ValueError, "model_type"),
        (lambda f: edit_config(f, hidden_size=-3), ValueError, "hidden_size must be at least 1, got -3"),
        (lambda f: edit_config(f, hidden_size="x"), ValueError, "hidden_size"),
        (lambda f: edit_config(f, hidden_size=32), RuntimeError, "mismatched"),
        (lambda f: edit_config(f, dtype="float7"), AttributeError, "float7"),
        (lambda f: (f / "generation_config.json").write_text('{"num_steps": 0}'), ValueError, "num_steps"),
    ],
)
def test_broken_files_are_errors_that_say_what_is_wrong(tmp_path, spoil, error, message):
    small_model().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_truncated_weights_are_an_error_that_says_what_to_do(tmp_path):
    small_model().save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    for length in (7, 100, len(weights) // 2, len(weights) - 1):
        (tmp_path / "model.safetensors").write_bytes(weights[:length])
        with pytest.raises(OSError, match="save, copy or download them again"):
            AutoModelForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("script", [generate_vmd, evaluate_vmd, push_to_hub])
def test_a_missing_tokenizer_is_named(tmp_path, script):
    small_model().save_pretrained(tmp_path)
    arguments = [f"--model={tmp_path}"]
    if script is push_to_hub:
        arguments = [str(tmp_path), str(tmp_path / "exported")]
    if script is evaluate_vmd:
        arguments.append("--task=text")
    with pytest.raises(ValueError, match="has no tokenizer"):
        script.main(arguments)


def test_text_of_which_nothing_is_left_is_an_error(tmp_path):
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text("too short")
    with pytest.raises(ValueError, match="sequence_length"):
        train_vmd.main(
            [
                *TRAIN,
                "--task=text",
                "--tokenizer=characters",
                f"--source={tmp_path}",
                f"--output_dir={tmp_path / 'run'}",
            ]
        )
