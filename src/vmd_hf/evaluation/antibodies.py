"""Loops of antibodies: bits above the truth, and how probable and how varied the loops are that a model generates."""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedModel

from ..data.antibodies import antibody_dataset, loop_log2_probabilities, loops_of
from .receptors import BATCH, Truth, evaluate_receptor_bounds, sample_statistics
from .sampling import fill_masks
from .tables import Row

evaluate_loop_bounds = partial(
    evaluate_receptor_bounds, truth=loop_log2_probabilities, dataset=antibody_dataset, orders=["random"]
)


def mean_identity(loops: Sequence[str]) -> float:
    """The share of residues in which two different ones of these loops agree, the mean over all pairs of the same
    length; NaN without such pairs."""
    of_length = defaultdict(list)
    for loop in loops:
        of_length[len(loop)].append(loop)
    shares, pairs = 0.0, 0
    for length, group in of_length.items():
        counts = [count for column in zip(*group, strict=True) for count in Counter(column).values()]
        shares += sum(count * (count - 1) for count in counts) / length
        pairs += len(group) * (len(group) - 1)
    return shares / pairs if pairs else float("nan")


def evaluate_loop_samples(
    model: PreTrainedModel,
    real: Sequence[str],
    num_steps: Sequence[int],
    seed: int = 0,
    truth: Truth = loop_log2_probabilities,
) -> list[Row]:
    """A loop in the place of each real one, of its length, at temperature 1 and in random order. For each number of
    steps `sample_statistics` of -log2 p given the length, the share of distinct loops and `mean_identity`, beside what
    they are of the real ones, the seconds of sampling, and the loops (`None`: not amino acids)."""
    rows, results = antibody_dataset(real)[:], []
    labels = rows.pop("labels")
    rows["input_ids"] = rows["input_ids"].masked_fill(labels != -100, model.config.mask_token_id)
    for steps in num_steps:
        start = time.perf_counter()
        filled = fill_masks(model, rows, seed, BATCH, do_sample=True, num_steps=steps)
        seconds = time.perf_counter() - start
        loops = loops_of(filled, labels)
        row = {"num_steps": steps, **sample_statistics(loops, real, truth), "seconds": seconds}
        whole = [loop for loop in loops if loop is not None]
        row |= {"sampled identity": mean_identity(whole), "real identity": mean_identity(real)}
        results.append(row | {"real distinct": len(set(real)) / len(real), "loops": loops})
    return results


__all__ = ["evaluate_loop_bounds", "evaluate_loop_samples", "mean_identity"]
