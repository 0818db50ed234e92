"""CDR3 loops of human antibodies, heavy chains, in a framework: gaps of known length whose distribution is known.

The loop is what lies between two residues of every heavy chain, C and W; the framework is all else. It is that of the
genes IGHV3-23 and IGHJ4 (germline, amino acids): given its sequence, a loop is of this V gene and of one of three J
genes that are alike behind W. So these are the genes from which olga draws loops, by its model of the heavy chains
that cells make at random; and given the framework and the length, the probability of a loop is known exactly.

A row has `ROW_LENGTH` tokens: [CLS], a heavy chain, [SEP], and padding. Loops of more than `LONGEST_LOOP` residues (36
in 100) are left out, so that this number of steps fills any of them one at a time.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .receptors import AMINO_ACIDS, Repertoire, log2_probabilities, receptor_sequences
from .text import token_dataset

BEFORE = "EVQLLESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYC"
AFTER = "WGQGTLVTVSS"
LONGEST_LOOP = 16
ROW_LENGTH = len(BEFORE) + LONGEST_LOOP + len(AFTER) + 2
HEAVY_CHAINS = Repertoire(
    "human_B_heavy", 3, LONGEST_LOOP + 3, "W", (("IGHV3-23",), ("IGHJ1", "IGHJ4", "IGHJ5"))
)  # C and W included

_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_START = len(BEFORE) + 1  # the column where a loop begins


def loop_sequences(num_sequences: int, seed: int) -> list[str]:
    """Independent loops; arguments and errors as of [`~vmd_hf.data.receptors.receptor_sequences`]."""
    return [sequence[1:-1] for sequence in receptor_sequences(num_sequences, seed, repertoire=HEAVY_CHAINS)]


def loop_log2_probabilities(loops: Sequence[str | None]) -> np.ndarray:
    """The exact log2 p of each loop given its length and the framework's genes, (loops,) float64; -inf where it is 0,
    as that of what is no loop (`None`)."""
    sequences = [None if loop is None else f"C{loop}W" for loop in loops]
    return log2_probabilities(sequences, HEAVY_CHAINS, given_length=True)


def antibody_tokenizer() -> PreTrainedTokenizerFast:
    """That of AntiBERTy, one token for each amino acid, for text without spaces between them."""
    tokens = [*_SPECIAL_TOKENS, *AMINO_ACIDS]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokens.index(name)) for name in ("[CLS]", "[SEP]")]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, _SPECIAL_TOKENS, strict=True)))


def antibody_dataset(loops: Sequence[str]) -> Dataset:
    """Rows of `ROW_LENGTH` tokens in torch format, `input_ids`, `attention_mask` and `labels`, which are of the loop.

    Raises:
        ValueError: for a loop that is empty or too long.
    """
    if wrong := [loop for loop in loops if not 1 <= len(loop) <= LONGEST_LOOP]:
        raise ValueError(f"loops must have 1 to {LONGEST_LOOP} residues, got {wrong[0]!r}")
    texts = [BEFORE + loop + AFTER for loop in loops]
    rows = antibody_tokenizer()(texts, padding="max_length", max_length=ROW_LENGTH, return_tensors="np")
    column, lengths = np.arange(ROW_LENGTH), np.array([len(loop) for loop in loops])
    in_loop = (column >= _START) & (column < _START + lengths[:, None])
    labels = np.where(in_loop, rows["input_ids"], -100)
    return token_dataset(rows["input_ids"], attention_mask=rows["attention_mask"], labels=labels)


def loops_of(rows: torch.Tensor, labels: torch.Tensor) -> list[str | None]:
    """The loops in rows of tokens, which are where there are labels, both (rows, `ROW_LENGTH`); `None` where there is
    something else than amino acids."""
    first, found = len(_SPECIAL_TOKENS), []
    for row, is_loop in zip(rows, labels != -100, strict=True):
        tokens = (row[is_loop] - first).tolist()
        found.append("".join(AMINO_ACIDS[token] for token in tokens) if min(tokens) >= 0 else None)
    return found


def antiberty_folder() -> Path:
    """The weights in the package antiberty: AntiBERTy (Ruffolo et al., arXiv 2112.07782), a BERT of 26 million weights
    that was trained on antibody sequences. Its code, which is for older versions of transformers, is not needed.

    Raises:
        ImportError: if it is not installed.
    """
    spec = find_spec("antiberty")
    if spec is None:
        raise ImportError("antiberty is not installed: pip install --no-deps antiberty==0.1.3")
    return Path(spec.submodule_search_locations[0], "trained_models", "AntiBERTy_md_smooth")


__all__ = [
    "AFTER",
    "BEFORE",
    "HEAVY_CHAINS",
    "LONGEST_LOOP",
    "ROW_LENGTH",
    "antiberty_folder",
    "antibody_dataset",
    "antibody_tokenizer",
    "loop_log2_probabilities",
    "loop_sequences",
    "loops_of",
]
