"""Speed and memory as ratios measured in one run.

    python training_scripts/benchmark.py

Three questions: what a latent costs over an MDM of the same size in a training step and in generation; what logits
at masked positions only save over logits everywhere, at a vocabulary of 50,000; and how much of the machine's
measured matrix-multiplication peak a training step uses. The two sides of a ratio are timed in turns, and the median
of each is taken.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import torch
from evaluate_vmd import print_table
from torch.nn import functional as F

from vmd_hf import VMDConfig, VMDForMaskedDiffusion

MASK = 1


def build(latent_size: int, vocab_size: int = 1000, layers: int = 8, hidden_size: int = 256) -> VMDForMaskedDiffusion:
    torch.manual_seed(0)
    config = VMDConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        latent_size=latent_size,
        num_latent_encoder_layers=1,
        mask_token_id=MASK,
    )
    return VMDForMaskedDiffusion(config)


def training_step(model: VMDForMaskedDiffusion, input_ids: torch.Tensor) -> None:
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    model.zero_grad()


def dense_training_step(model: VMDForMaskedDiffusion, input_ids: torch.Tensor) -> None:
    """The same step with logits at every position, as most code has it."""
    masked = torch.rand(input_ids.shape) < 0.5
    logits = model(input_ids=input_ids.masked_fill(masked, MASK)).logits
    F.cross_entropy(logits.flatten(0, 1), input_ids.masked_fill(~masked, -100).flatten()).backward()
    model.zero_grad()


def alternate(first: Callable[[], None], second: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median seconds of each, timed in turns so that both meet the same machine; one untimed call of each first."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for call, record in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            if repeat:
                record.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def _peak_memory(step: Callable, connection) -> None:
    model = build(0, vocab_size=50_000, layers=2)
    input_ids = torch.randint(2, 50_000, (8, 256))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    for _ in range(2):
        step(model.train(), input_ids)
    connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def peak_memory(step: Callable) -> float:
    """MiB by which the peak of a new process grows over the model during training steps."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_memory, args=(step, sender))
    process.start()
    process.join()
    return receiver.recv()


def matmul_peak(size: int = 2048, repeats: int = 10) -> float:
    """FLOP/s of a square float32 matrix product, the best of several."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()

    mdm, vmd = build(0), build(64)
    input_ids = torch.randint(2, 1000, (options.batch_size, options.length))
    masks = torch.full_like(input_ids, MASK)
    rows = []

    def compare(what: str, first: Callable[[], None], second: Callable[[], None], limit: str) -> tuple[float, float]:
        seconds = alternate(first, second, options.repeats)
        rows.append(
            {"what": what, "first, s": seconds[0], "second, s": seconds[1], "ratio": seconds[1] / seconds[0]}
            | {"wanted": limit}
        )
        return seconds

    mdm.train(), vmd.train()
    mdm_step, _ = compare(
        "training step, MDM against VMD",
        lambda: training_step(mdm, input_ids),
        lambda: training_step(vmd, input_ids),
        "<= 1.25",
    )
    mdm.eval(), vmd.eval()
    compare(
        "generation in 8 steps, MDM against VMD",
        lambda: mdm.generate(masks, num_steps=8),
        lambda: vmd.generate(masks, num_steps=8),
        "<= 1.05",
    )
    wide = build(0, vocab_size=50_000, layers=2).train()
    wide_ids = torch.randint(2, 50_000, (8, 256))
    compare(
        "training step at 50,000 tokens, all logits against masked only",
        lambda: dense_training_step(wide, wide_ids),
        lambda: training_step(wide, wide_ids),
        "",
    )
    memory = peak_memory(dense_training_step), peak_memory(training_step)
    rows.append(
        {"what": "its peak memory over the model, MiB", "first, s": memory[0], "second, s": memory[1]}
        | {"ratio": memory[1] / memory[0], "wanted": ""}
    )
    print_table(f"medians of {options.repeats}, {torch.get_num_threads()} threads", rows)

    parameters = sum(p.numel() for name, p in mdm.named_parameters() if "embed" not in name and "lm_head" not in name)
    achieved = 6 * parameters * input_ids.numel() / mdm_step
    print(
        f"MDM training step: {achieved / 1e9:.0f} GFLOP/s, {100 * achieved / matmul_peak():.0f} % of the measured peak"
    )


if __name__ == "__main__":
    main()
