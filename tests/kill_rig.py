"""Kills trainings at random moments, resumes them from the last whole checkpoint, and counts.

    python tests/kill_rig.py FOLDER NUMBER_OF_KILLS SEED

Everything is imported once, and each training is a fork of this process. Every step saves a checkpoint, so that many
kills hit a process that is saving. The trainings are FOLDER/undisturbed and FOLDER/killed; in FOLDER/counts.json are
`kills`, `checkpoints` (the step that each start resumed from, 0 for none) and `torn` (kills that left a checkpoint
that is not whole).
"""

import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import train_vmd
from transformers.trainer_utils import get_last_checkpoint

import vmd_hf.training_run  # noqa: F401, or each fork would import it anew
from vmd_hf.training import last_whole_checkpoint

SETTINGS = (
    "--num_train_rows 500 --hidden_size 16 --num_attention_heads 2 --latent_size 2 --ema_decay 0.9 --max_steps 40"
)
SETTINGS += (
    " --save_strategy steps --save_steps 1 --save_total_limit 2 --per_device_train_batch_size 8 --logging_steps 10"
)
SETTINGS += " --report_to none --disable_tqdm true --resume_from_checkpoint true"


def start(folder: Path) -> int:
    """A training in a process of its own, resumed where there is something to resume from."""
    process = os.fork()
    if process == 0:
        try:
            output = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            train_vmd.main([*SETTINGS.split(), f"--output_dir={folder}"])
            os._exit(0)
        finally:
            os._exit(1)
    return process


def newest_checkpoint(folder: Path) -> str | None:
    """Whole or not."""
    return get_last_checkpoint(folder) if folder.exists() else None


def main(folder: str, number: str, seed: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not searched for garbage by every training anew
    undisturbed, killed = Path(folder, "undisturbed"), Path(folder, "killed")
    begin = time.perf_counter()
    assert os.waitpid(start(undisturbed), 0)[1] == 0
    duration = time.perf_counter() - begin
    dice = random.Random(int(seed))
    counts = {"kills": 0, "checkpoints": [], "torn": 0}
    while True:
        last = last_whole_checkpoint(killed)
        counts["checkpoints"].append(0 if last is None else int(last.rpartition("-")[2]))
        newest = newest_checkpoint(killed)
        process = start(killed)
        if counts["kills"] < int(number):
            if dice.random() < 0.8:  # in the next steps, else anywhere, even before the first
                while newest_checkpoint(killed) == newest:
                    time.sleep(0.001)
            time.sleep(duration * dice.uniform(0, 0.05))
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        if not os.WIFSIGNALED(status):
            assert status == 0, status
            break
        counts["kills"] += 1
        counts["torn"] += newest_checkpoint(killed) != last_whole_checkpoint(killed)
    Path(folder, "counts.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
