"""What several test files need: small models with weights that make every path visible."""

import copy

import pytest
import torch
from transformers import StoppingCriteria

from vmd_hf import VMDConfig, VMDForMaskedDiffusion

MASK, PAD = 10, 11  # digits are 0 to 9

OBJECTIVES = ("vmd", "per_sample", "per_step")


def tiny_config(**overrides) -> VMDConfig:
    """Ten digits, a mask and a pad token; two layers of 32; no KL warm-up, so that the loss has no state."""
    settings = {
        "vocab_size": 12,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
        "latent_size": 4,
        "conditioning_size": 8,
        "kl_warmup_steps": 0,
        "mask_token_id": MASK,
        "pad_token_id": PAD,
    }
    return VMDConfig(**(settings | overrides))


def randomise(model: torch.nn.Module, std: float = 0.3, seed: int = 0) -> torch.nn.Module:
    """Fresh weights leave the latent without effect and the logits almost uniform; these do not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = std * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model


def tiny_model(**overrides) -> VMDForMaskedDiffusion:
    """A model in evaluation mode with weights of standard deviation 0.3."""
    return randomise(VMDForMaskedDiffusion(tiny_config(**overrides))).eval()


def of_the_same_weights(model, **changes):
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    other = VMDForMaskedDiffusion(config).eval()
    assert not other.load_state_dict(model.state_dict(), strict=False).missing_keys
    return other


def digits(batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    """(batch_size, length) random tokens, none of them special."""
    return torch.randint(0, 10, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pad_row(row: torch.Tensor, length: int, side: str, value: int) -> torch.Tensor:
    """(tokens,) to (1, length), padded on the "left" or on the "right"."""
    padding = row.new_full((length - len(row),), value)
    return torch.cat([padding, row] if side == "left" else [row, padding])[None]


def posterior_of_row(
    model: VMDForMaskedDiffusion, row: torch.Tensor, masked: list[int], revealed: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance, each (latent_size,), of q(z | x_0, which positions are masked and revealed now)."""
    flags = torch.zeros(2, 1, len(row), dtype=torch.bool)
    flags[0, 0, masked] = True
    flags[1, 0, revealed] = True
    position_ids = torch.arange(len(row))[None]
    embeddings = model.model.embeddings(row[None], position_ids)
    context = model.model.attention_context(embeddings, None, position_ids)
    mean, log_variance = model.latent_encoder(embeddings, flags[0], flags[1], position_ids, context)
    return mean[0], log_variance[0]


def scored_by_hand(config: VMDConfig, masked: list[int], revealed: list[int]) -> tuple[list[int], float]:
    """The tokens whose cross-entropies a step adds up, and the share of their sum that counts: its expectation over
    the tokens that it reveals, unless a latent was told of them."""
    if config.objective == "per_step" and config.latent_size and len(revealed) >= config.latent_min_tokens:
        return revealed, 1.0
    return masked, len(revealed) / len(masked)


def padded_batch():
    rows = [digits(1, length, seed=length)[0] for length in (3, 7)]
    mask = torch.cat([pad_row(torch.ones_like(row), 7, "left", 0) for row in rows])
    return torch.cat([pad_row(row, 7, "left", PAD) for row in rows]), mask


def padded(rows, side="right", width=None, fill=PAD):
    """Rows of unequal length as one batch: input_ids, attention_mask."""
    width = width or max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        columns = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[index, columns] = torch.tensor(row, dtype=torch.long)
        mask[index, columns] = 1
    return ids, mask


def unpadded(sequences, attention_mask):
    return [row[keep != 0].tolist() for row, keep in zip(sequences, attention_mask, strict=True)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class StopOnce(StoppingCriteria):
    """Says once, after the given step, that a row is to stop."""

    def __init__(self, row, step):
        self.row, self.step, self.seen = row, step, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        stop = torch.zeros(len(input_ids), dtype=torch.bool)
        stop[self.row] = len(self.seen) == self.step
        return stop


implementations_beside_eager = pytest.mark.parametrize(
    "implementation",
    [
        "sdpa",
        pytest.param(
            "flex_attention",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="compiling flex attention takes half a minute on a CPU"
            ),
        ),
    ],
)
