"""Two processes on the CPU train, save, resume and evaluate as one does; the configurations of accelerate are read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_vmd
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from distributed_worker import TOKENIZER, build, take_a_step, train
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    EuroBertConfig,
    EuroBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import vmd_hf
from vmd_hf import VMDForMaskedDiffusion
from vmd_hf.training import EMACallback

SCRIPTS = Path(train_vmd.__file__).parent
CONFIGS = SCRIPTS / "accelerate_configs"
# Of blocks, the figures of latents count those of padding, too, of which there is less in half a batch.
BLOCKS = {"block_size": 2, "prior": "learned"}
CHAIN = {"block_size": 2, "latent_type": "chain", "objective": "per_step"}
UNEVEN = {"num_rows": 10, "batch_size": 4, "num_eval_rows": 5, "max_steps": -1, "num_train_epochs": 1, "eval_steps": 9}
UNEVEN |= {"eval_strategy": "epoch", "save_strategy": "no", "learning_rate": 0.0}
NOT_SAVED = {"save_strategy": "no"}
SCRIPT = "--sequence_length=16 --hidden_size=16 --num_attention_heads=2 --num_hidden_layers=1 --latent_size=2"
SCRIPT += " --per_device_train_batch_size=4 --per_device_eval_batch_size=2 --num_eval_rows=7"
SCRIPT += " --max_steps=4 --eval_steps=2 --save_steps=2"
SCRIPT = [*SCRIPT.split(), "--report_to=none", "--disable_tqdm=true"]


def launch(config: str, script: Path, *arguments: str | Path) -> str:
    """Two processes; what they wrote."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / config]
    command += ["--num_processes", 2, "--mixed_precision", "no", "--main_process_port", 0, script, *arguments]
    paths = [Path(vmd_hf.__file__).parents[1], SCRIPTS]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launch_jobs(config: str, jobs: list[dict], folder: Path) -> list[dict]:
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    launch(config, Path(__file__).with_name("distributed_worker.py"), folder / "jobs.json", folder / "results.json")
    return json.loads((folder / "results.json").read_text())


LOSSES = ("loss", "grad_norm", "reconstruction_loss", "kl", "epoch")
OF_LATENTS = ("kl_per_latent", "active_units")


def assert_same_log(actual: list[dict], expected: list[dict], names: tuple[str, ...] = LOSSES + OF_LATENTS) -> None:
    """Of training and of evaluation; the rest is times and speeds."""
    names += tuple(f"eval_{name}" for name in names)
    assert sum("loss" in entry for entry in expected) > 1
    for one, other in zip(actual, expected, strict=True):
        for name in set(names) & set(other):
            assert one[name] == pytest.approx(other[name], rel=1e-4), (other["step"], name)


def assert_same_weights(actual: Path, expected: Path, *names: str) -> None:
    for name in names or ("model.safetensors",):
        first, second = load_file(actual / name), load_file(expected / name)
        assert first.keys() - second.keys() <= {"lm_head.weight"}  # FSDP writes the tied weight twice
        for key, value in second.items():
            # Adam makes a part of its step of 0.01 of the rounding of a gradient that is nearly zero.
            torch.testing.assert_close(first[key], value, rtol=0, atol=5e-4)


def assert_same_warnings(actual: list[str], expected: list[str]) -> None:
    for one, other in zip(actual, expected, strict=True):
        numbers = re.compile(r"\d[\d.e-]*\d|\d")
        assert numbers.sub("", one) == numbers.sub("", other)
        pairs = zip(numbers.findall(one), numbers.findall(other), strict=True)
        assert all(float(a) == pytest.approx(float(b), rel=1e-3) for a, b in pairs), (one, other)


def assert_same_training(actual: dict, expected: dict, folders: tuple[Path, Path], names=LOSSES + OF_LATENTS) -> None:
    assert_same_log(actual["log"], expected["log"], names)
    assert actual["generated"] == expected["generated"]
    torch.testing.assert_close(torch.tensor(actual["logits"]), torch.tensor(expected["logits"]), rtol=0, atol=1e-3)
    assert_same_weights(*folders)


CHECKPOINT_FILES = ("checkpoint-3/model.safetensors", "checkpoint-3/training_weights.safetensors")


def test_data_parallel_trains_evaluates_and_resumes_as_one_process(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    whole, blocks = train(one / "whole"), train(one / "blocks", BLOCKS, ema=False)
    chain = train(one / "chain", CHAIN, ema=False)
    uneven = train(one / "uneven", ema=False, **UNEVEN)
    jobs = [
        {"folder": two / "whole"},
        {"folder": two / "blocks", "model": BLOCKS, "ema": False},
        {"folder": two / "resumed", "resume": one / "whole" / "checkpoint-3", **NOT_SAVED},
        {"folder": two / "uneven", "ema": False, **UNEVEN},
        {"folder": two / "chain", "model": CHAIN, "ema": False},
        {"losses_of_processes": two / "plain"},
    ]
    *results, plain = launch_jobs("cpu_2.yaml", jobs, tmp_path)
    # Each process draws noise of its own, without a callback that gives it seeds.
    assert len(plain) == 2 and len(plain[0]) == len(plain[1]) == 3
    assert len({*plain[0], *plain[1]}) == 6
    assert any("frequencies of tokens" in warning for warning in whole["warnings"])
    assert_same_warnings(results[0]["warnings"], whole["warnings"])
    assert {result["wrapper"] for result in results} == {"DistributedDataParallel"}
    assert_same_training(results[0], whole, (two / "whole", one / "whole"))
    assert_same_weights(two / "whole", one / "whole", *CHECKPOINT_FILES)
    assert_same_training(results[1], blocks, (two / "blocks", one / "blocks"), LOSSES)
    assert_same_training(results[2], whole, (two / "resumed", one / "whole"))
    assert_same_training(results[4], chain, (two / "chain", one / "chain"), LOSSES)
    resumed = train(one / "resumed", resume=str(two / "whole" / "checkpoint-3"), **NOT_SAVED)
    assert_same_training(resumed, whole, (one / "resumed", one / "whole"))

    # Ten rows in batches of four: in one process the last step has two rows, in two processes it repeats two more. Of
    # five rows to evaluate the last pair of batches has one, and three that are repeated.
    actual, expected = ([entry for entry in result["log"] if "loss" in entry] for result in (results[3], uneven))
    assert len(actual) == len(expected) == 3
    assert_same_log(actual[:2], expected[:2])
    actual, expected = (
        next(entry for entry in result["log"] if "eval_loss" in entry) for result in (results[3], uneven)
    )
    assert actual["eval_loss"] == pytest.approx(actual["eval_reconstruction_loss"] + actual["eval_kl"], rel=1e-5)
    for name in OF_LATENTS:
        assert actual[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-4)


def backbones() -> dict[str, dict]:
    """Settings of models around language models of transformers."""
    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 6, "pad_token_id": TOKENIZER.pad_token_id}
    around = {"mask_token_id": TOKENIZER.mask_token_id, "conditioning_size": 8, "kl_warmup_steps": 4}
    causal_lm, masked_lm = LlamaForCausalLM(LlamaConfig(**sizes)), EuroBertForMaskedLM(EuroBertConfig(**sizes))
    chain = {"block_size": 2, "latent_type": "chain", "latent_size": 4, "objective": "per_step"}
    models = {
        "causal_lm": VMDForMaskedDiffusion.from_causal_lm(causal_lm, causal_loss_weight=0.5, **chain, **around),
        "masked_lm": VMDForMaskedDiffusion.from_masked_lm(masked_lm, latent_size=4, **around),
    }
    return {name: json.loads(model.config.to_json_string(use_diff=False)) for name, model in models.items()}


def test_fsdp_trains_language_models_of_transformers_as_one_process(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = {"ema": True, "save_steps": 6}
    jobs = [{"folder": two / name, "model": model, **settings} for name, model in backbones().items()]
    expected = [train(one / Path(job["folder"]).name, job["model"], **settings) for job in jobs]
    results = launch_jobs("fsdp2.yaml", jobs, tmp_path)
    for job, result, whole in zip(jobs, results, expected, strict=True):
        name = job["folder"].name
        assert result["wrapper"] == "FSDPVMDForMaskedDiffusion"
        assert_same_training(result, whole, (two / name, one / name), LOSSES)


def test_fsdp_trains_evaluates_and_resumes_as_one_process(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    whole, blocks = train(one / "whole"), train(one / "blocks", BLOCKS, ema=False)
    chain = train(one / "chain", CHAIN, ema=False)
    for index in range(12):
        (tmp_path / f"{index}.txt").write_text("the quick brown fox jumps over the lazy dog " * (5 + index))
    script = [SCRIPTS / "recipes" / "sotu.yaml", f"--source={tmp_path}", f"--output_dir={two / 'script'}", *SCRIPT]
    jobs = [
        {"folder": two / "whole"},
        {"folder": two / "blocks", "model": BLOCKS, "ema": False},
        {"folder": two / "resumed", "resume": two / "whole" / "checkpoint-3", **NOT_SAVED},
        {"folder": two / "sharded", "sharded": True},
        {"folder": two / "sharded-resumed", "resume": two / "sharded" / "checkpoint-3", "sharded": True, **NOT_SAVED},
        {"folder": two / "half", "model": BLOCKS, "ema": False, "bf16": True},
        {"argv": list(map(str, script))},
        {"folder": two / "chain", "model": CHAIN, "ema": False},
        {"folder": two / "spoiled", "ema": False, "spoiled_rank": 1, **NOT_SAVED},
    ]
    results = launch_jobs("fsdp2.yaml", jobs, tmp_path)
    assert "step 2" in results.pop()["error"]  # seen by the other process, too, which does not wait for ever
    assert {result["wrapper"] for result in results} == {"FSDPVMDForMaskedDiffusion"}
    assert_same_warnings(results[0]["warnings"], whole["warnings"])
    for index, name in ((0, "whole"), (2, "resumed"), (3, "sharded"), (4, "sharded-resumed")):
        assert_same_training(results[index], whole, (two / name, one / "whole"))
    assert_same_training(results[1], blocks, (two / "blocks", one / "blocks"), LOSSES)
    assert_same_training(results[7], chain, (two / "chain", one / "chain"), LOSSES)
    assert results[5]["log"][0]["loss"] == pytest.approx(blocks["log"][0]["loss"], rel=0.02)  # generates in bf16, too
    assert_same_weights(two / "whole", one / "whole", *CHECKPOINT_FILES)
    assert_same_weights(two / "sharded", one / "whole", CHECKPOINT_FILES[1])
    with pytest.raises(ValueError, match="FSDP"):  # weights can be loaded anywhere, but the optimizer's state cannot
        train(one / "resumed", resume=str(two / "whole" / "checkpoint-3"))

    assert AutoModelForMaskedLM.from_pretrained(two / "script").config.hidden_size == 16
    assert len([entry for entry in results[6]["log"] if "eval_loss" in entry]) == 2


def test_tensor_parallel_processes_compute_as_one(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 9}
    llama = LlamaConfig(vocab_size=12, num_attention_heads=4, num_key_value_heads=2, **sizes)
    around = {"block_size": 3, "mask_token_id": 10, "latent_size": 3}
    groups = {"position_groups": [[i // 3 for i in range(9)]], "position_group_bias": True}
    models = {
        "blocks": build(num_attention_heads=4, max_position_embeddings=9, block_size=3, prior="learned"),
        "groups": build(num_attention_heads=4, max_position_embeddings=9, **groups),
        "backbone": VMDForMaskedDiffusion.from_causal_lm(LlamaForCausalLM(llama), **around),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    jobs = [{"split": [tmp_path / name, tmp_path / f"{name}-split"]} for name in models]
    results = dict(zip(models, launch_jobs("cpu_2.yaml", jobs, tmp_path), strict=True))
    # Two layers of four matrices each, and of a bias; of seven in Llama, which splits its tokens, too.
    assert {name: result["split"] for name, result in results.items()} == {"blocks": 8, "groups": 10, "backbone": 16}
    for name, result in results.items():
        expected = take_a_step(tmp_path / name, tmp_path / f"{name}-whole")
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert result["generated"] == expected["generated"]
        torch.testing.assert_close(torch.tensor(result["logits"]), torch.tensor(expected["logits"]))
        assert_same_weights(tmp_path / f"{name}-split", tmp_path / f"{name}-whole")


def test_training_does_not_depend_on_how_a_step_is_accumulated(tmp_path):
    def run(accumulation):
        model = {"kl_warmup_steps": 0}  # which counts forward passes
        return train(tmp_path / str(accumulation), model, ema=False, gradient_accumulation_steps=accumulation)

    whole = run(1)
    for accumulation in (2, 4):
        assert_same_training(run(accumulation), whole, (tmp_path / str(accumulation), tmp_path / "1"))


def test_an_average_of_weights_under_deepspeed_is_an_error(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setattr(args.distributed_state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="DeepSpeed"):
        EMACallback().on_train_begin(args, TrainerState(), TrainerControl(), model=build())


def test_names_of_the_configurations_exist():
    arguments = {action.dest for action in launch_command_parser()._actions}
    wanted = {
        "cpu_2.yaml": ("MULTI_GPU", 2),
        "gpu_1.yaml": ("NO", 1),
        "gpu_8.yaml": ("MULTI_GPU", 8),
        "fsdp2.yaml": ("FSDP", 8),
        "zero2.yaml": ("DEEPSPEED", 8),
        "zero3.yaml": ("DEEPSPEED", 8),
    }
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(wanted)
    for name, (distributed_type, num_processes) in wanted.items():
        config = load_config_from_file(str(CONFIGS / name))  # raises for names that it does not know
        assert (config.distributed_type.value, config.num_processes) == (distributed_type, num_processes)
        assert config.use_cpu == name.startswith("cpu")
        assert set(config.fsdp_config) | set(config.deepspeed_config) <= arguments
