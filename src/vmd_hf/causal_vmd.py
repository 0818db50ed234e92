"""A small causal network that makes the tokens of a step depend on one another, in the place of a latent.

Tokens that are revealed in the same step, i_1 < ... < i_m, are predicted one after another,

    p(x_A | x_t) = prod_j p(x_0^{i_j} | x_t, x_0^{i_1}, ..., x_0^{i_(j-1)}),

from the hidden states h of one pass of the denoiser, changed by what a recurrent network has read of the tokens
before (O = 0 at the start):

    s_j = LSTM(s_(j-1), [norm(embedding of x_0^{i_j}), h_{i_j}])
    h'_{i_1} = h_{i_1},    h'_{i_j} = h_{i_j} + O gelu(S norm(s_(j-1)) + H h_{i_j})

The likelihood of a step is an exact product, and one that reveals a single token is the model's own without this
network. Unlike the chain's (`chain_vmd.py`), parts of it do not follow from the whole (a token that is not revealed is
not summed out), and its sampler has a loop over tokens, whose small steps are no forward passes.

In the manner of ADJUST (arXiv 2509.22738) and Domino, as the rival that the chain is measured against.
"""

import torch
from torch import nn

from .configuration_vmd import VMDConfig
from .layers_vmd import VMDUnitLinear, VMDZeroLinear

Memory = tuple[torch.Tensor, torch.Tensor]


class VMDCausalHead(nn.Module):
    """Hidden states of tokens that are revealed together, given those to their left."""

    def __init__(self, config: VMDConfig):
        super().__init__()
        size, hidden_size = config.causal_head_size, config.hidden_size
        # Embeddings and states are small at the start beside hidden states: without norms little is learned at first.
        self.token_norm = nn.LayerNorm(hidden_size, eps=config.norm_eps, bias=False)
        self.rnn = nn.LSTM(2 * hidden_size, size, batch_first=True)
        self.state_norm = nn.LayerNorm(size, eps=config.norm_eps, bias=False)
        self.state_proj = VMDUnitLinear(size, hidden_size)  # S
        self.hidden_proj = VMDUnitLinear(hidden_size, hidden_size, bias=False)  # H
        self.out_proj = VMDZeroLinear(hidden_size, hidden_size, bias=False)  # O

    def forward(self, hidden_states: torch.Tensor, embeddings: torch.Tensor, revealed: torch.Tensor) -> torch.Tensor:
        """(groups, n, hidden) to the same, changed at revealed tokens.

        Args:
            hidden_states: (groups, n, hidden), of the denoiser; a group is a block or a sequence.
            embeddings: (groups, n, hidden), of the clean tokens; read where they are revealed.
            revealed: (groups, n) bool, A.
        """
        if revealed.shape[1] == 1:
            return hidden_states
        order = revealed.long().argsort(dim=-1, descending=True, stable=True)[..., None].expand_as(hidden_states)
        inputs, known = hidden_states.gather(1, order), embeddings.gather(1, order)
        changed, _ = self.read(known[:, :-1], inputs[:, :-1], inputs[:, 1:])
        changed = torch.cat([inputs[:, :1].to(changed.dtype), changed], dim=1)
        changed = torch.empty_like(changed).scatter(1, order, changed)
        return torch.where(revealed[..., None], changed, hidden_states)

    def read(
        self, embeddings: torch.Tensor, before: torch.Tensor, after: torch.Tensor, memory: Memory | None = None
    ) -> tuple[torch.Tensor, Memory]:
        """Reads tokens, and changes the hidden states of those that follow them.

        Args:
            embeddings, before: (groups, m, hidden), of tokens and at their columns.
            after: (groups, m, hidden), at the columns of the tokens that follow them.
            memory: What this returned for the tokens before these.

        Returns:
            (groups, m, hidden), and the memory.
        """
        embeddings = self.token_norm(embeddings)
        states, memory = self.rnn(torch.cat([embeddings, before.to(embeddings.dtype)], dim=-1), memory)
        after = after.to(states.dtype)
        features = self.state_proj(self.state_norm(states)) + self.hidden_proj(after)
        return after + self.out_proj(nn.functional.gelu(features)), memory


__all__ = ["VMDCausalHead"]
