"""Text: the objective, bounds on the likelihood of a sampler, and the quality of samples."""

import os
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Literal

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from ..data.text import collate, evenly_spaced
from ..extras import import_extra
from ..hub import default_device, load_model, load_tokenizer
from ..likelihood import CorpusBound, Order, confidence_interval, corpus_bound
from ..schedule_vmd import most_revealed
from ..training import active_units, moments
from .sampling import draw_samples
from .tables import Row

DIFFERENCE = ("difference", "difference_low", "difference_high")


BATCH_SIZE = 50  # rows of a batch
Batch = dict[str, torch.Tensor]  # input_ids and labels (rows, length), and where needed attention_mask, position_ids


def batches_of(rows: Dataset, num_rows: int, model: PreTrainedModel) -> list[Batch]:
    """Rows that are taken evenly, in batches on the model's device."""
    chosen = list(evenly_spaced(rows, num_rows))
    parts = [chosen[start : start + BATCH_SIZE] for start in range(0, len(chosen), BATCH_SIZE)]
    batches = [collate(part, model.config.pad_token_id or 0) for part in parts]
    return [{name: values.to(model.device) for name, values in batch.items()} for batch in batches]


def num_bytes(batches: list[Batch], tokenizer: PreTrainedTokenizerBase) -> int:
    """Of the text of rows, UTF-8, special tokens aside."""
    rows = [row[row != -100] for batch in batches for row in batch["labels"]]
    return sum(len(text.encode()) for text in tokenizer.batch_decode(rows, skip_special_tokens=True))


@torch.no_grad()
def evaluate_objective(model: PreTrainedModel, batches: list[Batch]) -> Row:
    """The objective in nats a token (no perplexity if there is a latent; the noise is hashed, so it is the same number
    every time), and how many dimensions of z the posterior uses (see `VMDMetricsCallback`)."""
    model.eval()
    outputs = [model(**batch) for batch in tqdm(batches, desc="objective", disable=None)]
    weights = torch.stack([(batch["labels"] != -100).sum() for batch in batches]).float()
    result: Row = {"objective": model.config.objective, "rows": sum(len(batch["labels"]) for batch in batches)}
    for name in ("loss", "reconstruction_loss", "kl"):
        result[name] = float((torch.stack([output[name] for output in outputs]) * weights).sum() / weights.sum())
    if model.config.gaussian_size:
        result["active_units"] = active_units(sum(moments(output.posterior_shift) for output in outputs))
    return result


def largest_step(width: int, num_steps: int) -> int:
    """Tokens that one of `num_steps` steps reveals at most, of `width`."""
    return int(most_revealed(torch.tensor(width), torch.tensor(num_steps)))


def corpus_bounds(
    model: PreTrainedModel,
    batches: list[Batch],
    num_steps: Sequence[int],
    num_draws: Sequence[int] = (1,),
    bound: Literal["per_sample", "per_step"] = "per_step",
    order: Order = "random",
    seed: int = 0,
) -> dict[tuple[int, int], tuple[CorpusBound, float]]:
    """`corpus_bound` for each number of steps and of importance samples, with the seconds that it took; of steps
    without a latent, which draw nothing, only once."""
    config, found = model.config, {}
    width = config.block_size or batches[0]["input_ids"].shape[1]
    for steps in num_steps:
        has_latent = config.gaussian_size > 0 and largest_step(width, steps) >= config.latent_min_tokens
        for draws in num_draws if has_latent else [1]:
            start = time.perf_counter()
            result = corpus_bound(
                model,
                batches,
                bound=bound,
                order=order,
                num_steps=steps,
                num_samples=draws,
                generator=torch.Generator().manual_seed(seed),
                show_progress=sys.stderr.isatty(),
            )
            found[steps, draws] = result, time.perf_counter() - start
    return found


def evaluate_bounds(
    model: PreTrainedModel,
    batches: list[Batch],
    num_steps: Sequence[int],
    num_draws: Sequence[int] = (1,),
    bound: Literal["per_sample", "per_step"] = "per_step",
    order: Order = "random",
    seed: int = 0,
    baseline: PreTrainedModel | None = None,
) -> list[Row]:
    """A row for each of `corpus_bounds`; with a baseline first its own, then the model's with their differences from
    it: at as many importance samples, or, of a model without a latent, from the baseline's bound with the most."""
    settings = num_steps, num_draws, bound, order, seed
    found = corpus_bounds(model, batches, *settings)
    rows = [bound_row(bound, order, *key, *value) for key, value in found.items()]
    if baseline is None:
        return rows
    others = corpus_bounds(baseline, batches, *settings)
    results = [
        {"model": "baseline", **bound_row(bound, order, *key, *value), **dict.fromkeys(DIFFERENCE)}
        for key, value in others.items()
    ]
    for row, (key, (result, _)) in zip(rows, found.items(), strict=True):
        own, of_baseline = ([other for other in keys if other[0] == key[0]] for keys in (found, others))
        if min(len(own), len(of_baseline)) == 1:
            key = max(of_baseline)
        difference, error = result.difference(others[key][0])
        values = difference, *confidence_interval(difference, error)
        results.append({"model": "this one", **row, **dict(zip(DIFFERENCE, values, strict=True))})
    return results


def bound_row(name: str, order: str, num_steps: int, num_draws: int, bound: CorpusBound, seconds: float) -> Row:
    low, high = bound.interval
    return {
        "bound": name,
        "order": order,
        "num_steps": num_steps,
        "num_draws": num_draws,
        "bits_per_token": bound.bits_per_token,
        "low": low,
        "high": high,
        "kl_bits_per_token": bound.kl_bits_per_token,
        "num_tokens": bound.num_tokens,
        "seconds": seconds,
    }


def load_baseline(
    model: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    baseline: str | os.PathLike | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel | None:
    """The model to compare the bounds of a saved one with; by default, of an adapter, the model that it is for.

    Raises:
        ValueError: for a baseline of another vocabulary.
    """
    if baseline is not None:
        if load_tokenizer(baseline).get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"baseline must have the model's vocabulary, got {baseline} and {model}")
    elif find_adapter_config_file(model):
        from peft import PeftConfig

        baseline = PeftConfig.from_pretrained(model).base_model_name_or_path
    return None if baseline is None else load_model(baseline, device)


def evaluate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    known_words: Iterable[str],
    num_steps: Sequence[int],
    num_texts: int = 32,
    seed: int = 0,
    temperatures: Sequence[float] = (),
) -> tuple[list[Row], list[list[str]]]:
    """For each number of steps and temperature (by default the model's own) the share of known words in sampled texts
    of `length` tokens, and these texts."""
    known, results, texts = set(known_words), [], []
    temperatures = temperatures or [model.generation_config.temperature or 1.0]
    for steps, temperature in product(num_steps, temperatures):
        start = time.perf_counter()
        ids = draw_samples(model, length, num_texts, seed, do_sample=True, num_steps=steps, temperature=temperature)
        seconds = time.perf_counter() - start
        sampled = tokenizer.batch_decode(ids)
        words = [word for text in sampled for word in text.split()[1:-1]]  # the first and last may be cut
        share = sum(word in known for word in words) / max(len(words), 1)
        results.append(
            {
                "num_steps": steps,
                "temperature": temperature,
                "known_words": share,
                "num_words": len(words),
                "seconds": seconds,
                "sample": sampled[0],
            }
        )
        texts.append(tokenizer.batch_decode(ids, skip_special_tokens=True))
    return results, texts


def evaluate_quality(
    real: list[str],
    sampled: Sequence[list[str]],
    judge: str | None = None,
    featuriser: str | None = None,
    words: Iterable[str] | None = None,
) -> list[Row]:
    """A row of the metric `text_quality` for real texts, and one for each list of sampled texts.

    Args:
        judge: autoregressive model, a folder or Hub id; None for no perplexity.
        featuriser: model for [`mauve`] between real and sampled texts, a folder or Hub id; None for no MAUVE.
        words: known words; None for no share of them.
    """
    from .. import metrics
    from ..metrics.text_quality import load_judge

    metric, (model, tokenizer) = metrics.load("text_quality"), load_judge(judge) if judge else (None, None)
    settings = {"judge": model, "judge_tokenizer": tokenizer, "words": words}
    rows = [metric.compute(predictions=texts, **settings) for texts in (real, *sampled)]
    if featuriser:
        rows[0]["mauve"] = None
        for row, value in zip(rows[1:], mauve(real, sampled, featuriser), strict=True):
            row["mauve"] = value
    return rows


@torch.no_grad()
def mauve(real: list[str], sampled: Iterable[list[str]], featuriser: str | os.PathLike) -> list[float]:
    """MAUVE between real and sampled texts, 0 to 1 for texts that are alike (arXiv 2102.01454), by its library.

    A text's features are the last hidden state of its last token, of the first 1,024 at most, as in the library, which
    knows the models of a few names only. Of less than some thousands of texts the value says little (see there).

    Args:
        featuriser: a language model of transformers, its folder or Hub id; gpt2-large in the paper.

    Raises:
        ImportError: the library is not installed.
    """
    library = import_extra("mauve", "mauve")
    tokenizer = AutoTokenizer.from_pretrained(featuriser)
    model = AutoModel.from_pretrained(featuriser).to(default_device()).eval()
    length = min(1024, tokenizer.model_max_length, model.config.max_position_embeddings)

    def features(texts: list[str]) -> np.ndarray:
        """(texts, hidden_size); that of an empty text is a space's."""
        rows = [
            tokenizer(text or " ", truncation=True, max_length=length, return_tensors="pt")["input_ids"]
            for text in texts
        ]
        states = [model(input_ids=ids.to(model.device)).last_hidden_state[0, -1] for ids in rows]
        return torch.stack(states).float().cpu().numpy()

    of_real = features(real)
    return [
        float(library.compute_mauve(p_features=of_real, q_features=features(texts), verbose=False).mauve)
        for texts in sampled
    ]


def draw_frontier(rows: list[Row], path: str | os.PathLike) -> None:
    """A picture of the judge's perplexity over the entropy of words: of real text, the first row, a point, and for
    each number of steps a line over temperatures. Either alone is easily had; at the entropy of real text the lower
    perplexity is the better one."""
    import_extra("matplotlib", "scripts")
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    real, *sampled = rows
    axes.plot(real["unigram_entropy"], real["judge_perplexity"], "k*", markersize=14, label="real text")
    for steps in dict.fromkeys(row["num_steps"] for row in sampled):
        line = sorted((row for row in sampled if row["num_steps"] == steps), key=lambda row: row["temperature"])
        points = [(row["unigram_entropy"], row["judge_perplexity"]) for row in line]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{steps} steps")
        for row, point in zip(line, points, strict=True):
            axes.annotate(f"{row['temperature']:g}", point, textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xlabel="entropy of words, nats", ylabel="perplexity of the judge", yscale="log")
    for format_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        format_ticks(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_title("at temperatures as written", fontsize=10)
    axes.legend()
    figure.savefig(path, dpi=110)


__all__ = [
    "batches_of",
    "corpus_bounds",
    "draw_frontier",
    "evaluate_bounds",
    "evaluate_objective",
    "evaluate_quality",
    "evaluate_samples",
    "largest_step",
    "load_baseline",
    "mauve",
    "num_bytes",
]
