"""Bits per character and a perplexity bound of a model on texts."""

import math

import datasets
import evaluate
import torch

from vmd_hf.likelihood import nelbo, ratio_of_sums
from vmd_hf.metrics import PAPER_CITATION

_DESCRIPTION = """An upper bound on what a masked diffusion model with a latent needs to encode a text: bits per
character, and 2 to the bits per token, a bound on the perplexity. It is the bound of a sampler: which one, and in how
many steps, belongs to the number."""

_KWARGS_DESCRIPTION = """
Args:
    predictions: texts. Tokens that the tokenizer adds to them are context, and not scored.
    model: the model itself (a VMDForMaskedDiffusion, bare or wrapped by PEFT), not a name.
    tokenizer: its tokenizer.
    bound: "per_sample" (shared latent) or "per_step" (per-step latent).
    num_steps: steps of the sampler, with blocks for each block.
    num_samples: importance samples of z (IWAE).
    order: in which the sampler reveals tokens, see vmd_hf.nelbo; other than "random" without a Gaussian latent only.
    batch_size: texts at a time.
    seed: of the noise.
Returns:
    bits_per_character, bits_per_token, perplexity_bound, standard_error (of bits_per_character, over texts),
    num_characters, num_tokens, and bound, num_steps, num_samples, order.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class LikelihoodBound(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=PAPER_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions,
        model,
        tokenizer,
        bound: str = "per_sample",
        num_steps: int = 1,
        num_samples: int = 1,
        order: str = "random",
        batch_size: int = 16,
        seed: int = 0,
        **kwargs,
    ):
        if any(not text for text in predictions):
            raise ValueError("predictions must be texts of at least one character, got an empty one")
        if not isinstance(model, torch.nn.Module):
            raise ValueError(f"model must be the model itself, got {model!r}")
        generator = torch.Generator().manual_seed(seed)
        device = next(model.parameters()).device
        nats, tokens = [], []
        for start in range(0, len(predictions), batch_size):
            texts = predictions[start : start + batch_size]
            batch = tokenizer(texts, padding=True, return_special_tokens_mask=True, return_tensors="pt").to(device)
            output = nelbo(
                model,
                batch["input_ids"],
                labels=batch["input_ids"].masked_fill(batch["special_tokens_mask"] == 1, -100),
                attention_mask=batch["attention_mask"],
                bound=bound,
                num_steps=num_steps,
                num_samples=num_samples,
                order=order,
                generator=generator,
            )
            if not output.num_tokens.all():
                raise ValueError("predictions must be texts with a token of their own each, got one without")
            nats.append(output.nelbo.double().cpu())
            tokens.append(output.num_tokens.cpu())
        bits = torch.cat(nats) / math.log(2)
        characters = torch.tensor([len(text) for text in predictions], dtype=torch.float64)
        per_character, standard_error = ratio_of_sums(bits, characters)
        num_tokens = int(torch.cat(tokens).sum())
        per_token = bits.sum().item() / num_tokens
        return {
            "bits_per_character": per_character,
            "bits_per_token": per_token,
            "perplexity_bound": 2.0**per_token,
            "standard_error": standard_error,
            "num_characters": int(characters.sum()),
            "num_tokens": num_tokens,
            "bound": bound,
            "num_steps": num_steps,
            "num_samples": num_samples,
            "order": order,
        }
