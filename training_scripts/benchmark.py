"""Speed and memory as ratios measured in one run.

    python training_scripts/benchmark.py

What a latent costs over an MDM of the same size in a training step and in generation, for whole sequences and for
blocks; what logits at masked positions only save over logits everywhere, at a vocabulary of 50,000; what the cache
saves in generation, and two streams in training, over one pass of twice the length; and how much of the machine's
measured matrix-multiplication peak a training step uses. The two sides of a ratio are timed in turns, and the median
of each is taken. All of it runs on `--device`, by default the accelerator if there is one.
"""

import argparse
import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from vmd_hf import VMDConfig, VMDForMaskedDiffusion
from vmd_hf.blocks_vmd import CleanContext
from vmd_hf.evaluation.speed import matmul_peak, synchronize
from vmd_hf.evaluation.tables import print_table
from vmd_hf.hub import default_device

MASK = 1


def build(
    latent_size: int,
    vocab_size: int = 1000,
    layers: int = 8,
    hidden_size: int = 256,
    block_size: int | None = None,
    device: torch.device | str = "cpu",
) -> VMDForMaskedDiffusion:
    torch.manual_seed(0)
    config = VMDConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        latent_size=latent_size,
        num_latent_encoder_layers=1,
        block_size=block_size,
        max_position_embeddings=2048,
        mask_token_id=MASK,
    )
    return VMDForMaskedDiffusion(config).to(device)


def training_step(model: VMDForMaskedDiffusion, input_ids: torch.Tensor) -> None:
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    model.zero_grad()


def dense_training_step(model: VMDForMaskedDiffusion, input_ids: torch.Tensor) -> None:
    """The same step with logits at every position, as most code has it."""
    masked = torch.rand(input_ids.shape, device=input_ids.device) < 0.5
    logits = model(input_ids=input_ids.masked_fill(masked, MASK)).logits
    F.cross_entropy(logits.flatten(0, 1), input_ids.masked_fill(~masked, -100).flatten()).backward()
    model.zero_grad()


def one_pass_training_step(model: VMDForMaskedDiffusion, input_ids: torch.Tensor) -> None:
    """A step of block diffusion as most code has it: clean and noisy tokens in one pass under a mask of 2L x 2L."""
    layout = model.model.lay_out(input_ids)
    masked = torch.rand(input_ids.shape, device=input_ids.device) < 0.5
    context = CleanContext(input_ids=input_ids, position_ids=layout.position_ids, new=layout.token_index(clean=True))
    outputs = model.model(input_ids.masked_fill(masked, MASK), layout=layout, context=context)
    logits = model.compute_logits(outputs.last_hidden_state[masked])
    F.cross_entropy(logits, input_ids[masked]).backward()
    model.zero_grad()


def alternate(
    first: Callable[[], None], second: Callable[[], None], repeats: int, device: torch.device
) -> tuple[float, float]:
    """Median seconds of each, timed in turns so that both meet the same machine; one untimed call of each first."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for call, record in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            synchronize(device)
            if repeat:
                record.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def peak(device: torch.device) -> float:
    """MiB that this process has had at most in the memory of the device (of a CPU on Linux; getrusage would count what
    its parent had, too)."""
    if device.type != "cpu":
        return torch.get_device_module(device).max_memory_allocated(device) / 2**20
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _peak_memory(step: Callable, settings: dict, shape: tuple[int, int], connection) -> None:
    model = build(0, **settings)
    input_ids = torch.randint(2, model.config.vocab_size, shape, device=model.device)
    before = peak(model.device)
    torch.manual_seed(0)
    for _ in range(2):
        step(model.train(), input_ids)
    connection.send(peak(model.device) - before)


def peak_memory(step: Callable, settings: dict, shape: tuple[int, int]) -> float:
    """MiB by which the peak of a new process grows over the model during training steps."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_memory, args=(step, settings, shape, sender))
    process.start()
    process.join()
    return receiver.recv()


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed: otherwise large tensors are new pages every time, and the page faults, which do
    not run in parallel, are timed with the model."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


class Comparison:
    """Pairs timed in turns, and their table."""

    def __init__(self, repeats: int, device: torch.device):
        self.repeats = repeats
        self.device = device
        self.rows: list[dict] = []

    def add(self, what: str, first: float, second: float, wanted: str = "") -> None:
        self.rows.append({"what": what, "first": first, "second": second, "ratio": second / first, "wanted": wanted})

    def seconds(self, first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
        return alternate(first, second, self.repeats, self.device)

    def time(self, what: str, first: Callable[[], None], second: Callable[[], None], wanted: str = "") -> float:
        seconds = self.seconds(first, second)
        self.add(what, *seconds, wanted)
        return seconds[0]


def compare_models(
    table: Comparison,
    what: str,
    first: VMDForMaskedDiffusion,
    second: VMDForMaskedDiffusion,
    input_ids: torch.Tensor,
    wanted: str,
) -> float:
    """Time of a training step of two models, which are left in evaluation mode; the first one's seconds."""
    first.train(), second.train()
    seconds = table.time(
        what, lambda: training_step(first, input_ids), lambda: training_step(second, input_ids), wanted
    )
    first.eval(), second.eval()
    return seconds


def compare_steps(
    table: Comparison, what: str, steps: tuple[Callable, Callable], settings: dict, shape: tuple[int, int]
) -> None:
    """Time and peak memory of two kinds of training step of one MDM."""
    settings = {**settings, "device": table.device}
    model = build(0, **settings).train()
    input_ids = torch.randint(2, model.config.vocab_size, shape, device=table.device)
    first, second = steps
    table.time(what, lambda: first(model, input_ids), lambda: second(model, input_ids))
    table.add("its peak memory over the model, MiB", *(peak_memory(step, settings, shape) for step in steps))


def whole_sequences(table: Comparison) -> None:
    mdm, vmd = build(0, device=table.device), build(64, device=table.device)
    input_ids = torch.randint(2, 1000, (8, 128), device=table.device)
    masks = torch.full_like(input_ids, MASK)
    seconds = compare_models(table, "training step (8 x 128), s: MDM, VMD", mdm, vmd, input_ids, "<= 1.25")
    table.time(
        "generation in 8 steps, s: MDM, VMD",
        lambda: mdm.generate(masks, num_steps=8),
        lambda: vmd.generate(masks, num_steps=8),
        "<= 1.05",
    )
    parameters = sum(p.numel() for name, p in mdm.named_parameters() if "embed" not in name and "lm_head" not in name)
    achieved = 6 * parameters * input_ids.numel() / seconds
    share = achieved / matmul_peak(table.device)
    print(f"MDM training step: {achieved / 1e9:.0f} GFLOP/s, {100 * share:.0f} % of the measured peak")


def vocabulary(table: Comparison) -> None:
    compare_steps(
        table,
        "training step, 50,000 tokens, s: all logits, masked only",
        (dense_training_step, training_step),
        {"vocab_size": 50_000, "layers": 2},
        (8, 256),
    )


def attention_of_a_block(model: VMDForMaskedDiffusion, masks: torch.Tensor, num_steps: int = 4) -> Callable[[], None]:
    """The attention, and nothing else, of an average one of the blocks of 16 that fill `masks`: with keys and values
    of half of them."""
    config = model.config
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    batch_size, context = len(masks), masks.shape[1] // 2
    own = masks.new_ones(batch_size, heads, 16, size, dtype=torch.float32)
    cache = own.new_ones(config.num_hidden_layers, 2, batch_size, heads, context, size)
    visible = own.new_ones(batch_size, 1, 16, context + 16, dtype=torch.bool)

    def attention() -> None:
        for _ in range(num_steps):
            for layer in cache:
                key, value = (torch.cat([part, own], dim=2) for part in layer)
                F.scaled_dot_product_attention(own, key, value, attn_mask=visible)

    return attention


def blocks(table: Comparison) -> None:
    mdm, vmd = (build(latent_size, block_size=16, device=table.device) for latent_size in (0, 64))
    input_ids = torch.randint(2, 1000, (8, 128), device=table.device)
    compare_models(table, "blocks of 16: training step (8 x 128), s: MDM, VMD", mdm, vmd, input_ids, "<= 1.2")
    for batch_size in (1, 8):
        masks = torch.full((batch_size, 512), MASK, device=table.device)
        table.time(
            f"blocks of 16, batch {batch_size}: generation of 512 tokens, 4 steps a block, s: MDM, VMD",
            lambda: mdm.generate(masks, num_steps=4),  # noqa: B023
            lambda: vmd.generate(masks, num_steps=4),  # noqa: B023
            "<= 1.05",
        )
        table.time(
            f"blocks of 16, batch {batch_size}: the same, s: cached, uncached",
            lambda: vmd.generate(masks, num_steps=4),  # noqa: B023
            lambda: vmd.generate(masks, num_steps=4, use_cache=False),  # noqa: B023
            ">= 3",
        )
        few, many = (masks[:, : 16 * num_blocks] for num_blocks in (8, 32))
        attention = table.seconds(attention_of_a_block(vmd, few), attention_of_a_block(vmd, many))
        whole = table.seconds(
            lambda: vmd.generate(few, num_steps=4),  # noqa: B023
            lambda: vmd.generate(many, num_steps=4),  # noqa: B023
        )
        rest = (whole[0] / 8 - attention[0], whole[1] / 32 - attention[1])
        table.add(f"blocks of 16, batch {batch_size}: a block without its attention, s: of 8, of 32", *rest, "1")
    compare_steps(
        table,
        "blocks of 16: training step (2 x 1,024), s: one pass of 2L x 2L, two streams",
        (one_pass_training_step, training_step),
        {"block_size": 16},
        (2, 1024),
    )


SUBJECTS = {"whole": whole_sequences, "vocabulary": vocabulary, "blocks": blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=default_device())
    options = parser.parse_args()
    keep_freed_memory()
    table = Comparison(options.repeats, options.device)
    for subject in options.subjects:
        SUBJECTS[subject](table)
    where = f"{torch.get_num_threads()} threads" if options.device.type == "cpu" else str(options.device)
    print_table(f"medians of {options.repeats}, {where}; ratio = second / first", table.rows)


if __name__ == "__main__":
    main()
