"""CDR3 sequences of human T-cell receptors (beta chains): amino acids whose distribution is known exactly.

Cells make these sequences by joining pieces of genes at random. The package olga (Sethna et al., arXiv 1807.04425)
draws from a model of this and sums the probabilities of all ways to a sequence. It is licensed under the GPL, so it is
an extra of this package, of which it ships nothing: pip install vmd_hf[olga]

A row has `ROW_LENGTH` tokens: a sequence, and end tokens in all columns behind it. Sequences that do not fit (8 in
100,000) are left out, in data and truth alike.

Other sequences of olga's are a `Repertoire` of their own (antibodies.py).
"""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from ..extras import import_extra
from .characters import character_tokenizer
from .text import token_dataset

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
ROW_LENGTH = 28
SPLIT_SEEDS = {"train": 0, "validation": 1, "test": 2}


class Repertoire(NamedTuple):
    """Sequences that one of olga's models makes, from C to one of `last_residues`."""

    model: str
    shortest: int
    length_limit: int  # sequences are shorter
    last_residues: str
    genes: tuple[tuple[str, ...], tuple[str, ...]] | None = None  # V and J genes that they are made of; `None`: all


T_BETA = Repertoire("human_T_beta", 2, ROW_LENGTH, "FVW")  # FVW: those with which olga lets a sequence end

_FILES = ("model_params.txt", "V_gene_CDR3_anchors.csv", "J_gene_CDR3_anchors.csv", "model_marginals.txt")


class _Receptors(NamedTuple):
    source: Any  # draws sequences
    judge: Any  # knows their probabilities
    kept: np.ndarray  # (length_limit,), the probability that what a cell makes is a sequence of each length


@cache
def _receptors(repertoire: Repertoire) -> _Receptors:
    """olga's model, of some genes.

    Not everything that a cell makes is such a sequence: three quarters are out of frame or have a stop codon. olga's
    probabilities include these, and its draws are of the rest. So the probability of a draw is that of olga over the
    sum of all sequences that may be drawn, which is exact: X stands for any amino acid.
    """
    load_model = import_extra("olga.load_model", "olga")
    from olga.generation_probability import GenerationProbabilityVDJ
    from olga.performance.fast_pgen import FastPgen
    from olga.sequence_generation import SequenceGenerationVDJ

    folder = Path(load_model.__file__).parent / "default_models" / repertoire.model
    *genes, marginals = (str(folder / name) for name in _FILES)
    data, model = load_model.GenomicDataVDJ(), load_model.GenerativeModelVDJ()
    data.load_igor_genomic_data(*genes)
    model.load_and_process_igor_model(marginals)
    if repertoire.genes is not None:
        of_v, of_j = (
            [gene[0].partition("*")[0] in wanted for gene in genes]  # of any allele
            for genes, wanted in zip((data.genV, data.genJ), repertoire.genes, strict=True)
        )
        model.PV, model.PDJ = model.PV * of_v, model.PDJ * of_j
    source, judge = SequenceGenerationVDJ(model, data), GenerationProbabilityVDJ(model, data)
    FastPgen(judge)  # compiled, in the place of the judge's own
    kept = np.zeros(repertoire.length_limit)
    for length in range(repertoire.shortest, repertoire.length_limit):
        for last in repertoire.last_residues:
            kept[length] += judge.compute_aa_CDR3_pgen("C" + "X" * (length - 2) + last)
    return _Receptors(source, judge, kept)


def receptor_sequences(
    num_sequences: int, seed: int, cache_dir: str | os.PathLike | None = None, repertoire: Repertoire = T_BETA
) -> list[str]:
    """Independent draws, kept in a file that the next call reads.

    Args:
        num_sequences: At least 1.
        seed: The same seed gives the same sequences; fewer of them are the first of more.
        cache_dir: Default: a folder in that of `datasets` (`HF_DATASETS_CACHE`).

    Raises:
        ImportError: if olga is not installed.
        ValueError: for a number below 1.
    """
    if num_sequences < 1:
        raise ValueError(f"num_sequences must be at least 1, got {num_sequences}")
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "vmd_hf")
    genes = "".join(f"-{'+'.join(names)}" for names in repertoire.genes or ())
    path = folder / f"{repertoire.model}-{repertoire.length_limit}{genes}-{seed}-{num_sequences}.txt"
    if path.exists():
        return path.read_text().split()
    source, before, sequences = _receptors(repertoire).source, np.random.get_state(), []
    try:
        np.random.seed(seed)  # olga knows no other generator
        while len(sequences) < num_sequences:
            sequence = source.gen_rnd_prod_CDR3(repertoire.last_residues)[1]
            if repertoire.shortest <= len(sequence) < repertoire.length_limit:
                sequences.append(sequence)
    finally:
        np.random.set_state(before)
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=folder, delete=False) as file:
        file.write("\n".join(sequences) + "\n")
    os.replace(file.name, path)
    return sequences


def log2_probabilities(
    sequences: Sequence[str | None], repertoire: Repertoire = T_BETA, given_length: bool = False
) -> np.ndarray:
    """The exact log2 p of each sequence under `receptor_sequences`, (sequences,) float64, or, `given_length`, of it
    among those of its length; -inf where it is 0, as that of a row which is no sequence (`None`)."""
    receptors, found = _receptors(repertoire), []
    for sequence in sequences:
        fits = sequence and repertoire.shortest <= len(sequence) < repertoire.length_limit
        if fits and sequence[0] == "C" and sequence[-1] in repertoire.last_residues:
            probability = receptors.judge.compute_aa_CDR3_pgen(sequence)
            kept = receptors.kept[len(sequence)] if given_length else receptors.kept.sum()
            found.append(probability and probability / kept)  # of some lengths there are none
        else:
            found.append(0.0)
    with np.errstate(divide="ignore"):
        return np.log2(np.array(found, dtype=np.float64))


def receptor_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each amino acid, ids in the order of `AMINO_ACIDS`, then mask, pad and end token."""
    return character_tokenizer(AMINO_ACIDS)


def receptor_dataset(sequences: Sequence[str]) -> Dataset:
    """Rows of `ROW_LENGTH` tokens in torch format with one column `input_ids`.

    Raises:
        ValueError: for a sequence that leaves no room for an end token.
    """
    end = receptor_tokenizer().eos_token_id
    rows = np.full((len(sequences), ROW_LENGTH), end, dtype=np.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        if len(sequence) >= ROW_LENGTH:
            raise ValueError(f"sequences must have fewer than {ROW_LENGTH} amino acids, got {sequence!r}")
        row[: len(sequence)] = [AMINO_ACIDS.index(residue) for residue in sequence]
    return token_dataset(rows)


def sequences_of(rows: torch.Tensor) -> list[str | None]:
    """What rows of tokens (rows, `ROW_LENGTH`) spell; `None` for one that is not amino acids and then end tokens, at
    least one of each."""
    end, found = receptor_tokenizer().eos_token_id, []
    for row in rows.tolist():
        length = row.index(end) if end in row else len(row)
        is_whole = 0 < length < len(row) and all(token == end for token in row[length:])
        is_sequence = is_whole and all(token < len(AMINO_ACIDS) for token in row[:length])
        found.append("".join(AMINO_ACIDS[token] for token in row[:length]) if is_sequence else None)
    return found


__all__ = [
    "AMINO_ACIDS",
    "ROW_LENGTH",
    "SPLIT_SEEDS",
    "T_BETA",
    "Repertoire",
    "log2_probabilities",
    "receptor_dataset",
    "receptor_sequences",
    "receptor_tokenizer",
    "sequences_of",
]
