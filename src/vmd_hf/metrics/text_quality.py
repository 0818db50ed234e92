"""Generated texts: what a judge model thinks of them, and how they vary."""

import math
import os
from collections import Counter

import datasets
import evaluate
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from vmd_hf import VMDConfig
from vmd_hf.hub import check_model, default_device
from vmd_hf.likelihood import nelbo

_DESCRIPTION = """Quality of generated texts: perplexity under a judge, an autoregressive model that the user names;
distinct-n, the share of different n-grams of words among all (arXiv 1510.03055); the entropy of single words in nats;
and the share of words that a word list knows. A low perplexity alone is no quality: texts that repeat themselves have
it, and a low distinct-n and entropy."""

_KWARGS_DESCRIPTION = """
Args:
    predictions: texts.
    judge: a causal language model of transformers, or a VMD model with block_size = 1 and no latent, whose bound is
        its exact likelihood; the model itself, or its folder or Hub id. None for no perplexity.
    judge_tokenizer: its tokenizer; default: that of the folder or id.
    words: a collection of known words; None for no share.
    max_n: distinct-1 to distinct-max_n.
    batch_size: texts at a time that the judge reads.
Returns:
    distinct_1 .. distinct_n, unigram_entropy, and, where asked for, known_words, judge_perplexity (per token of the
    judge, over all texts).
"""

_CITATION = """@inproceedings{li2016diversity,
  title={A Diversity-Promoting Objective Function for Neural Conversation Models},
  author={Li, Galley, Brockett, Gao, Dolan}, booktitle={NAACL}, year={2016}
}"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class TextQuality(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self, predictions, judge=None, judge_tokenizer=None, words=None, max_n: int = 3, batch_size: int = 16, **kwargs
    ):
        texts = [text.split() for text in predictions]
        if not any(texts):
            raise ValueError("predictions must have at least one word, got none")
        results = {}
        for n in range(1, max_n + 1):
            grams = Counter(tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1))
            results[f"distinct_{n}"] = len(grams) / max(grams.total(), 1)
        counts = torch.tensor(list(Counter(word for text in texts for word in text).values()), dtype=torch.float64)
        results["unigram_entropy"] = torch.special.entr(counts / counts.sum()).sum().item()
        if words is not None:
            words = set(words)
            results["known_words"] = sum(word in words for text in texts for word in text) / int(counts.sum())
        if judge is not None:
            results["judge_perplexity"] = judge_perplexity(predictions, judge, judge_tokenizer, batch_size)
        return results


def load_judge(judge: str | os.PathLike, tokenizer=None):
    """The model in a folder or of a Hub id, on the accelerator if there is one, and its tokenizer if none is given."""
    check_model(judge)
    is_vmd = AutoConfig.from_pretrained(judge).model_type == VMDConfig.model_type
    model = (AutoModelForMaskedLM if is_vmd else AutoModelForCausalLM).from_pretrained(judge).to(default_device())
    return model, tokenizer or AutoTokenizer.from_pretrained(judge)


@torch.no_grad()
def judge_perplexity(texts, judge, tokenizer, batch_size: int) -> float:
    """exp of the mean negative log-probability of a token given those before it. A causal model of transformers has
    none for the first token of a text."""
    if isinstance(judge, str | os.PathLike):
        judge, tokenizer = load_judge(judge, tokenizer)
    if tokenizer is None:
        raise ValueError("judge_tokenizer must be given with a judge that is a model, got None")
    is_vmd = judge.config.model_type == VMDConfig.model_type
    if is_vmd and (judge.config.block_size != 1 or judge.config.latent_size):
        raise ValueError(
            "judge must be autoregressive: a VMD model with block_size = 1 and latent_size = 0, got "
            f"{judge.config.block_size} and {judge.config.latent_size}"
        )
    judge.eval()
    texts = [text for text in texts if text]
    nats, tokens = 0.0, 0
    for start in range(0, len(texts), batch_size):
        # On the right, where a causal model does not see it; and many of them have no token for padding.
        rows = tokenizer(texts[start : start + batch_size])["input_ids"]
        rows = [torch.tensor(row, dtype=torch.long) for row in rows]
        input_ids = pad_sequence(rows, batch_first=True).to(judge.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(judge.device)
        if is_vmd:
            output = nelbo(judge, input_ids, attention_mask=mask, num_steps=1)
            nats, tokens = nats + output.nelbo.sum().item(), tokens + int(output.num_tokens.sum())
            continue
        logits = judge(input_ids=input_ids, attention_mask=mask).logits[:, :-1].float()
        scored = mask[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
        nats += (losses * scored).sum().item()
        tokens += int(scored.sum())
    if tokens == 0:
        raise ValueError("predictions must have a text of at least two of the judge's tokens, got none")
    return math.exp(nats / tokens)
