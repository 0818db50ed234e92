"""The Gaussian latent z: posterior q(z | x_0, x_t), prior p(z), and the way of z into the denoiser (arXiv 2510.23606).

Probabilities are computed in float32.
"""

import torch
from torch import nn

from .configuration_vmd import VMDConfig
from .layers_vmd import VMDLayer, VMDZeroLinear

VISIBLE, REVEALED_NOW, STILL_MASKED = 0, 1, 2  # the flag of each token that the posterior reads
LOG_VARIANCE_RANGE = -20.0, 10.0  # exp of it, and of a difference of two, is finite in every type


def standardised(
    values: torch.Tensor, prior_mean: torch.Tensor | None = None, prior_log_variance: torch.Tensor | None = None
) -> torch.Tensor:
    """How far values lie from the prior's mean, in its standard deviations. Default prior: N(0, 1)."""
    return values if prior_mean is None else (values - prior_mean) * (-0.5 * prior_log_variance).exp()


def gaussian_kl(
    mean: torch.Tensor,
    log_variance: torch.Tensor,
    prior_mean: torch.Tensor | None = None,
    prior_log_variance: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL(N(mean, exp(log_variance)) || prior) for each element, in nats. Any shape. Default prior: N(0, 1)."""
    mean, log_variance = mean.float(), log_variance.float()
    if prior_mean is not None:
        prior_mean, prior_log_variance = prior_mean.float(), prior_log_variance.float()
        mean = standardised(mean, prior_mean, prior_log_variance)
        log_variance = log_variance - prior_log_variance
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def draw_latents(mean: torch.Tensor, log_variance: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
    """z = mean + std * epsilon. Shapes broadcast to `epsilon`'s."""
    return mean + (0.5 * log_variance).exp() * epsilon


def log_density_ratio(
    latents: torch.Tensor,
    log_variance: torch.Tensor,
    epsilon: torch.Tensor,
    prior_mean: torch.Tensor | None = None,
    prior_log_variance: torch.Tensor | None = None,
) -> torch.Tensor:
    """log p(z) - log q(z) for each element of what `draw_latents` made of `epsilon`, in nats."""
    if prior_log_variance is not None:
        log_variance = log_variance - prior_log_variance
    distance = standardised(latents, prior_mean, prior_log_variance)
    return 0.5 * (epsilon.square() - distance.square() + log_variance)


def mean_and_log_variance(statistics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., 2 * size) to two of (..., size), float32, with a log-variance in a range in which nothing overflows."""
    mean, log_variance = statistics.float().chunk(2, dim=-1)
    return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)


def input_dtype(linear: nn.Module) -> torch.dtype:
    """The type that a linear layer takes. While FSDP has gathered weights, it may not be the model's; and a quantised
    layer's weight says nothing of it, but its bias is not quantised (or, by `quantize_dynamic`, a method)."""
    return linear.bias.dtype if isinstance(linear.bias, torch.Tensor) else torch.float32


class VMDPosteriorLinear(nn.Linear):
    """A linear layer to means of unit scale and small variances (see `VMDPreTrainedModel._init_weights`)."""


class VMDConditioner(nn.Module):
    """Slices of latents, (..., latent_size / slices), to conditioning vectors (..., conditioning_size + 1).

    The last entry is 1, so that what reads the vector needs no bias, and the zero vector is the null latent: the
    denoiser without a latent, which is not the same as z = 0.
    """

    def __init__(self, config: VMDConfig):
        super().__init__()
        self.num_slices = config.num_latent_slices
        self.in_proj = nn.Linear(config.latent_size // self.num_slices, config.conditioning_size)
        self.out_proj = nn.Linear(config.conditioning_size, config.conditioning_size)
        self.act = nn.SiLU()

    def forward(self, latents):
        slices = latents.unflatten(-1, (self.num_slices, -1)) if self.num_slices > 1 else latents
        vector = self.act(self.out_proj(self.act(self.in_proj(slices.to(input_dtype(self.in_proj))))))
        return nn.functional.pad(vector, (0, 1), value=1.0)


class VMDPositionInputs(VMDZeroLinear):
    """What conditioning vectors add to the denoiser's input: a vector for each position of a block (or row), read from
    the block's one conditioning vector, or, with slices, from the position's own."""

    def __init__(self, config: VMDConfig):
        self.hidden_size = config.hidden_size
        vectors = config.positions_per_latent // config.num_latent_slices
        super().__init__(config.conditioning_size + 1, vectors * config.hidden_size, bias=False)

    def forward(self, conditioning, position_ids=None):
        """(batch, N, ..., conditioning_size + 1) to (batch, N * positions, hidden); with `position_ids`
        (batch, length), of whole sequences, to (batch, length, hidden)."""
        inputs = super().forward(conditioning).view(conditioning.shape[0], -1, self.hidden_size)
        if position_ids is None:
            return inputs
        return inputs.gather(1, position_ids[..., None].expand(*position_ids.shape, self.hidden_size))


class VMDLatentPrior(nn.Module):
    """The learned prior p(z | clean earlier blocks), from the last clean hidden state before a block, or zeros where
    there is none. N(0, I) when training starts."""

    def __init__(self, config: VMDConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = nn.SiLU()
        self.out_proj = VMDZeroLinear(config.hidden_size, 2 * config.latent_size)

    def forward(self, before):
        """(..., hidden) to mean and log-variance, each (..., latent_size) float32."""
        return mean_and_log_variance(self.out_proj(self.act(self.in_proj(before.to(input_dtype(self.in_proj))))))


class VMDLatentEncoder(nn.Module):
    """The posterior q_phi(z | x_0, x_t): a diagonal Gaussian, from x_0 and what is masked in x_t.

    Its layers read the clean tokens with a flag each (visible, revealed now, still masked) and are averaged over the
    tokens that are revealed now; with slices, each of these has its own slice of z, and the slices of all other
    positions equal the prior. With blocks, each block is a sequence of its own, to whose tokens the hidden state of
    the last clean token before it is added: z has to encode only what the context does not. Needed in training and for
    likelihoods only.
    """

    def __init__(self, config: VMDConfig):
        super().__init__()
        self.num_slices = config.num_latent_slices
        self.embed_flags = nn.Embedding(3, config.hidden_size)
        self.layers = nn.ModuleList(
            VMDLayer(config, config.num_hidden_layers + index) for index in range(config.num_latent_encoder_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self.out_proj = VMDPosteriorLinear(config.hidden_size, 2 * config.latent_size // self.num_slices)
        with_blocks = config.block_size is not None
        self.before_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if with_blocks else None
        # Training steps so far of the KL warm-up: saved with the weights, so that a resumed run goes on warming up.
        self.register_buffer("kl_warmup_progress", torch.zeros((), dtype=torch.long))

    def forward(self, clean_embeddings, masked, revealed, position_ids, attention_context, before=None, prior=()):
        """
        Args:
            clean_embeddings: (batch, length, hidden), embeddings of x_0. With blocks, a row here is a block.
            masked, revealed: (batch, length) bool, as in `Corruption`.
            position_ids: (batch, length), with slices: those of the tokens (modulo the block's size).
            before: With blocks, (batch, hidden): the last clean hidden state before the block, 0 if there is none.
            prior: Mean and log-variance of a learned prior, each (batch, latent_size); none: N(0, I).

        Returns:
            mean and log-variance, each (batch, latent_size) float32; those of the prior where nothing is revealed.
        """
        flags = torch.where(revealed, REVEALED_NOW, torch.where(masked, STILL_MASKED, VISIBLE))
        hidden_states = clean_embeddings + self.embed_flags(flags)
        if before is not None:
            hidden_states = hidden_states + self.before_proj(before)[:, None]
        for layer in self.layers:
            hidden_states, *_ = layer(hidden_states, **attention_context)
        hidden_states = self.norm(hidden_states)
        if self.num_slices == 1:
            hidden_states = (hidden_states * revealed[..., None]).sum(1, keepdim=True)
            hidden_states = hidden_states / revealed.sum(-1).clamp(min=1)[:, None, None]
            encoded = revealed.any(-1, keepdim=True)  # (batch, slices): what depends on x_0
        else:
            index = position_ids % self.num_slices
            states = hidden_states * revealed[..., None]
            hidden_states = states.new_zeros(states.shape[0], self.num_slices, states.shape[-1])
            hidden_states = hidden_states.scatter_add(1, index[..., None].expand_as(states), states)
            encoded = index.new_zeros(hidden_states.shape[:2]).scatter_add(1, index, revealed.long()) > 0
        posterior = mean_and_log_variance(self.out_proj(hidden_states))  # (batch, slices, latent_size / slices) each
        priors = [part.unflatten(-1, (self.num_slices, -1)) for part in prior] or (0.0, 0.0)
        pairs = zip(posterior, priors, strict=True)
        return tuple(torch.where(encoded[..., None], *pair).flatten(1) for pair in pairs)


__all__ = [
    "VMDConditioner",
    "VMDLatentEncoder",
    "VMDLatentPrior",
    "VMDPositionInputs",
    "VMDPosteriorLinear",
    "draw_latents",
    "gaussian_kl",
    "log_density_ratio",
    "standardised",
]
