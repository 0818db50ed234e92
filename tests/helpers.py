"""What several test files need: small models with weights that make every path visible."""

import copy

import pytest
import torch
from transformers import StoppingCriteria

from vmd_hf import VMDConfig, VMDForMaskedDiffusion

MASK, PAD = 10, 11  # digits are 0 to 9

OBJECTIVES = ("vmd", "per_sample", "per_step")
GRID = [[i // 4 for i in range(16)], [i % 4 for i in range(16)]]
POSITIONS = {
    "both": {"position_embedding_type": "both"},
    "rotary": {"position_embedding_type": "rotary"},
    "learned": {"position_embedding_type": "learned"},
    "groups": {"position_embedding_type": "none", "position_groups": GRID},
    "group bias": {"position_embedding_type": "none", "position_groups": GRID, "position_group_bias": True},
}
PER_POSITION = {"latent_input": "position_slices", "latent_size": 48}  # three for each of sixteen positions
KINDS = {
    "whole": {},
    "whole, no latent": {"latent_size": 0},
    "whole, chain": {"latent_type": "chain", "latent_size": 3},
    "blocks": {"block_size": 3},
    "blocks, no latent": {"block_size": 3, "latent_size": 0},
    "blocks, learned prior": {"block_size": 3, "prior": "learned"},
    "blocks, chain": {"block_size": 3, "latent_type": "chain", "latent_size": 3},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_objective = pytest.mark.parametrize(
    ("kind", "objective"),
    [
        (kind, objective)
        for kind in KINDS
        for objective in OBJECTIVES
        if ("chain", "per_sample") != (kind[-5:], objective)
    ],
)
SCALARS = ("loss", "reconstruction_loss", "kl")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


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


def num_blocks_of(model, length: int) -> tuple[int, ...]:
    """Of what there is one for each row, or for each block of a row of that length: the dimensions after the batch."""
    size = model.config.block_size
    return () if size is None else (-(-length // size),)


def latents_for(model, batch_size: int, length: int, seed: int = 0) -> torch.Tensor | None:
    size = model.config.gaussian_size
    return normal(batch_size, *num_blocks_of(model, length), size, seed=seed) if size else None


def noise_for(model, batch_size: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Explicit noise for `forward`."""
    noise = {
        "times": uniform(batch_size, *num_blocks_of(model, length), seed=seed + 11).clamp(min=0.05),
        "position_noise": uniform(batch_size, length, seed=seed + 12),
    }
    if model.config.gaussian_size:
        noise["latent_noise"] = latents_for(model, batch_size, length, seed + 13)
    return noise


def some_masked(input_ids: torch.Tensor, seed: int = 7) -> torch.Tensor:
    return input_ids.masked_fill(uniform(*input_ids.shape, seed=seed) < 0.5, MASK)


def loss_batch(batch_size: int = 6, length: int = 7) -> dict[str, torch.Tensor]:
    """Rows with padding on both sides and context in places, one of nothing but context, and one of padding."""
    input_ids, attention_mask = digits(batch_size, length), torch.ones(batch_size, length, dtype=torch.long)
    attention_mask[1, :2] = 0
    attention_mask[2, 4:] = 0
    attention_mask[5] = 0
    input_ids[attention_mask == 0] = PAD
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, :4] = labels[1, 3] = labels[3, 0] = labels[3, 5] = -100
    labels[4] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def gradients_of(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the parameters that have one, none of them infinite."""
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
    return gradients


def assert_gradients_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, gradient.abs().max().item())}
        torch.testing.assert_close(actual[name], gradient, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def spy_on_noisy_inputs(model) -> list[torch.Tensor]:
    """The list to which every x_t (on its grid) is appended that the denoiser is called with."""
    seen = []

    def record(module, args, kwargs):
        if not kwargs.get("clean"):
            seen.append((args[0] if args else kwargs["input_ids"]).clone())

    model.model.register_forward_pre_hook(record, with_kwargs=True)
    return seen


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
