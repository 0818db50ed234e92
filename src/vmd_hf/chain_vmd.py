"""The chain: a discrete latent whose posterior is known.

The tokens x_1, ..., x_m that a step reveals, from left to right, are drawn with states c_1, ..., c_m in {1..K} between
them, the memory of what was drawn so far:

    p(x_A, c | x_t) = p(x_1 | x_t) pi(c_1) prod_{j > 1} p(x_j | x_{j-1}, ..., c_{j-1}, x_t) T_j(c_{j-1} -> c_j)

Were the last token all that is read, this would be a hidden Markov model whose states are pairs of a token and one of
its K clones, so that each emits one token only ("cloned HMM", arXiv 1905.00507), with probabilities that depend on
what the denoiser saw. Here the last `NUM_TOKENS` are, which costs nothing: they are observed. All factors are read off
the hidden states h of one pass of the denoiser, and embeddings v of the tokens:

    f_j = gelu(X [v_{j-1}, v_{j-2}, v_{j-3}] + H [h_j, h_{j-1}] + G_gap)    what the tokens before mean here
    h'_j = h_j + O f_j                                                      O = 0 at the start
    p(x | x_{j-1}, ..., c, x_t)  prop. to  exp(a_x(h'_j) + sum_r U_cr (P f_j)_r V_xr),    sum_c U_cr = 0
    pi(c)                        prop. to  exp(q_c(h_1, v_1))
    T_j(c -> c')                 prop. to  exp(E[c, c'] + q_{c'}(h_j, v_j) + sum_m g_m(h_j, v_j) W_m[c, c'])

where a are the denoiser's logits, and the gap is the distance to the token before, up to `NUM_GAPS`. Of a large
vocabulary, only the most probable tokens at a position have the sum in the exponent, and all others 0. The
probabilities of all tokens still sum to 1, and the cost does not depend on the size of the vocabulary.

The sum over all paths of states is a product of K x K matrices, taken in pairs, so that the likelihood is exact and
takes log2(m) rounds: there is no posterior to learn, no KL term and nothing to collapse. A step that reveals one token
is the model's own without a latent, and so is what a position says of itself (its confidence).

Probabilities are computed in float32, whatever the type of the layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .configuration_vmd import VMDConfig
from .latents_vmd import input_dtype
from .layers_vmd import VMDUnitLinear, VMDZeroLinear

NUM_KERNELS = 8
NUM_GAPS = 8
NUM_TOKENS = 3  # that are read as they are; of those before these, only the states know
_SMALLEST = 1e-30  # of a probability: keeps logarithms finite


class Tables(NamedTuple):
    """The weights of a chain that belong to no layer, in float32: G, (NUM_GAPS, 2 * hidden), E and W together, (1 +
    NUM_KERNELS, K, K), U, (K, rank), of mean 0 over the states (with one state, zero), and V, (vocabulary, rank)."""

    gaps: torch.Tensor
    kernels: torch.Tensor
    states: torch.Tensor
    tokens: torch.Tensor


class VMDChainTables(nn.Module):
    """[`Tables`]. They are what a call returns, so that accelerate brings them where the model is offloaded."""

    def __init__(self, config: VMDConfig):
        super().__init__()
        num_states, rank = config.latent_size, config.conditioning_size
        self.gaps = nn.Parameter(torch.empty(NUM_GAPS, 2 * config.hidden_size))
        self.table = nn.Parameter(torch.empty(num_states, num_states))  # E
        self.kernels = nn.Parameter(torch.empty(NUM_KERNELS, num_states, num_states))  # W
        self.state_vectors = nn.Parameter(torch.empty(num_states, rank))  # U
        self.token_vectors = nn.Parameter(torch.empty(config.vocab_size, rank))  # V

    def forward(self) -> Tables:
        kernels, vectors = torch.cat([self.table[None], self.kernels]).float(), self.state_vectors.float()
        return Tables(self.gaps.float(), kernels, vectors - vectors.mean(0), self.token_vectors.float())


class VMDChain(nn.Module):
    """What tokens that are revealed together tell of one another. `tables` is what `self.tables()` returns."""

    def __init__(self, config: VMDConfig):
        super().__init__()
        size, rank = config.hidden_size, config.conditioning_size
        self.num_states = config.latent_size
        self.num_candidates = config.candidate_tokens
        self.token_norm = nn.LayerNorm(size, eps=config.norm_eps, bias=False)  # v
        self.token_proj = VMDUnitLinear(NUM_TOKENS * size, 2 * size, bias=False)  # X
        self.hidden_proj = VMDUnitLinear(2 * size, 2 * size)  # H
        self.out_proj = VMDZeroLinear(2 * size, size, bias=False)  # O
        self.tilt_proj = VMDUnitLinear(2 * size, rank, bias=False)  # P
        self.state_proj = VMDUnitLinear(2 * size, self.num_states)  # q
        self.kernel_proj = VMDUnitLinear(2 * size, NUM_KERNELS)  # g
        self.tables = VMDChainTables(config)

    def known(self, embeddings: torch.Tensor) -> torch.Tensor:
        """v of tokens, (..., hidden)."""
        return self.token_norm(embeddings.to(input_dtype(self.hidden_proj)))

    def surroundings(
        self, before: torch.Tensor, hidden_states: torch.Tensor, gaps: torch.Tensor, tables: Tables
    ) -> torch.Tensor:
        """What f has of tokens beside those before them, (..., 2 * hidden).

        Args:
            before, hidden_states: (..., hidden), of the denoiser where the token before stands, and here.
            gaps: (...) int64, the distance to the token before.
        """
        inputs = torch.cat([hidden_states, before], dim=-1).to(input_dtype(self.hidden_proj))
        of_inputs = self.hidden_proj(inputs)
        return of_inputs + tables.gaps[gaps.clamp(max=NUM_GAPS) - 1].to(of_inputs.dtype)

    def read(
        self, known: torch.Tensor, surroundings: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states h' (tokens, hidden) of tokens given those before each, and P f, (tokens, rank).

        Args:
            known: (tokens, NUM_TOKENS * hidden), v of the tokens before, the nearest first, 0 where there is none.
            surroundings: (tokens, 2 * hidden).
            hidden_states: (tokens, hidden), of the denoiser.
        """
        features = nn.functional.gelu(self.token_proj(known) + surroundings)
        return hidden_states + self.out_proj(features).to(hidden_states.dtype), self.tilt_proj(features).float()

    def remember(self, known: torch.Tensor, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q (tokens, K), and 1 and g (tokens, 1 + NUM_KERNELS), of v and hidden states of tokens, (tokens, hidden)."""
        inputs = torch.cat([hidden_states.to(known.dtype), known], dim=-1)
        weights = nn.functional.pad(self.kernel_proj(inputs).float(), (1, 0), value=1.0)
        return self.state_proj(inputs).float(), weights

    def transitions(self, scores: torch.Tensor, weights: torch.Tensor, tables: Tables) -> torch.Tensor:
        """T, (tokens, K, K), of what `remember` returns."""
        logits = (weights @ tables.kernels.flatten(1)).unflatten(-1, tables.kernels.shape[1:])
        return logits.add_(scores[:, None]).softmax(-1)

    def following(
        self, scores: torch.Tensor, weights: torch.Tensor, states: torch.Tensor, tables: Tables
    ) -> torch.Tensor:
        """Logits of the states (tokens, K) that follow these (tokens,) int64: of a row of each matrix."""
        rows = tables.kernels.transpose(0, 1)[states]  # (tokens, 1 + NUM_KERNELS, K)
        return torch.baddbmm(scores[:, None], weights[:, None], rows)[:, 0]

    def emission_log_probs(
        self, tilts: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor, tables: Tables
    ) -> torch.Tensor:
        """log p(token | c) of each state c of the token before, (tokens, K), of P f (tokens, rank), logits of h'
        (tokens, vocabulary) and tokens (tokens,) int64."""
        log_probs, candidates, rest = self._log_probs(tilts, logits, tables)
        place, share = tokens[:, None], 0.0
        if candidates is not None:
            found = candidates == place  # (tokens, candidates)
            is_candidate = found.any(-1, keepdim=True)
            share = (logits.float().gather(-1, place) - rest).masked_fill(is_candidate, 0.0)
            place = torch.where(is_candidate, found.long().argmax(-1, keepdim=True), self.num_candidates)
        return log_probs.gather(-1, place[..., None].expand(-1, self.num_states, 1)).squeeze(-1) + share

    def token_log_probs(
        self, tilts: torch.Tensor, logits: torch.Tensor, states: torch.Tensor, tables: Tables
    ) -> torch.Tensor:
        """log p(x | c) of one state c (tokens,) int64 each, (tokens, vocabulary)."""
        log_probs, candidates, rest = self._log_probs(tilts, logits, tables, states)
        log_probs = log_probs[:, 0]
        if candidates is None:
            return log_probs
        return (logits.float() - rest + log_probs[:, -1:]).scatter(-1, candidates, log_probs[:, :-1])

    def _log_probs(
        self, tilts: torch.Tensor, logits: torch.Tensor, tables: Tables, states: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """log p(x | c) of all tokens, (tokens, K, vocabulary), `None`, `None`; of a large vocabulary those of the
        candidates and of all other tokens together, (tokens, K, candidates + 1), the candidates (tokens, candidates),
        and the logarithm of the sum over the others' exponentials (tokens, 1). With `states` (tokens,) K is 1, that
        state."""
        logits = logits.float()
        vectors, of_tokens = tables.states, tables.tokens
        of_state = tilts[:, None] * (vectors if states is None else vectors[states][:, None])  # (tokens, K, rank)
        if logits.shape[-1] <= self.num_candidates:
            return (of_state @ of_tokens.T).add_(logits[:, None]).log_softmax(-1), None, None
        top = logits.topk(self.num_candidates, dim=-1)
        tilted = of_state @ nn.functional.embedding(top.indices, of_tokens).transpose(1, 2)
        # All tokens but the candidates: the logarithm of a difference, of which the first part is the larger one.
        whole, among = (part.logsumexp(-1, keepdim=True) for part in (logits, top.values))
        rest = whole + torch.log1p(-(among - whole).exp().clamp(max=1 - 1e-6))  # (tokens, 1)
        tilted = torch.cat([tilted.add_(top.values[:, None]), rest[:, None].expand(-1, tilted.shape[1], 1)], dim=-1)
        return tilted.log_softmax(-1), top.indices, rest


def identity(matrices: torch.Tensor) -> torch.Tensor:
    """(K, K) like matrices (..., K, K)."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def log_product(matrices: torch.Tensor) -> torch.Tensor:
    """log u M_1 ... M_n 1, (groups,), for matrices (groups, n, K, K) that are not negative and u uniform over K."""
    groups, num_matrices, size, _ = matrices.shape
    total = matrices.new_zeros(groups)
    while num_matrices > 1:
        if num_matrices % 2:
            matrices = torch.cat([matrices, identity(matrices).expand(groups, 1, -1, -1)], dim=1)
        matrices = matrices[:, 0::2] @ matrices[:, 1::2]
        num_matrices = matrices.shape[1]
        # Rescaled, or long products vanish. What the scale is does not matter, so it needs no gradient.
        scale = matrices.detach().amax((-2, -1), keepdim=True).clamp(min=_SMALLEST)
        matrices = matrices / scale
        total = total + scale.log().sum((1, 2, 3))
    return total + (matrices[:, 0].sum((-2, -1)) / size).clamp(min=_SMALLEST).log()


def chain_log_probs(
    chain: VMDChain,
    hidden_states: torch.Tensor,
    embeddings: torch.Tensor,
    tokens: torch.Tensor,
    columns: torch.Tensor,
    place: torch.Tensor,
    group: torch.Tensor,
    shape: tuple[int, int],
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """log p(x_A | x_t) of each group, (groups,) float32, the sum over its chains.

    Args:
        hidden_states, embeddings: (tokens, hidden), of the denoiser, and of the tokens themselves: chain after chain,
            from left to right in each.
        tokens, columns: (tokens,) int64, and where they stand.
        place: (tokens,) int64, how many tokens of its chain are before each.
        group: (tokens,) int64, in ascending order: which group the chain belongs to.
        shape: Groups, and the most tokens that one can have.
        compute_logits: Of hidden states (tokens, hidden).
    """
    num_groups, size, tables = shape[0], chain.num_states, chain.tables()
    later, first = (place > 0).nonzero().squeeze(-1), (place == 0).nonzero().squeeze(-1)
    before, after = later - 1, hidden_states[later]
    back = torch.arange(NUM_TOKENS, device=tokens.device)
    known = chain.known(embeddings)
    nearest = known[(before[:, None] - back).clamp(min=0)] * (back < place[later, None])[..., None]
    gaps = columns[later] - columns[before]
    surroundings = chain.surroundings(hidden_states[before], after, gaps, tables)
    changed, tilts = chain.read(nearest.flatten(1), surroundings, after)
    logits = compute_logits(hidden_states.index_copy(0, later, changed)).float()
    alone = -nn.functional.cross_entropy(logits[first], tokens[first], reduction="none")
    with torch.autocast(logits.device.type, enabled=False):
        emissions = chain.emission_log_probs(tilts, logits[later], tokens[later], tables)  # (later, K)
    highest = emissions.detach().amax(-1)
    totals = alone.new_zeros(num_groups).index_add(0, group[first], alone).index_add(0, group[later], highest)

    # For every later token, a matrix: from the states before those of the token before it to these, times the token's
    # own probability given these. Where the token before is a chain's first one, all rows are alike.
    scores, weights = chain.remember(known[before], hidden_states[before])
    inside = (place[later] > 1).nonzero().squeeze(-1)
    of_group = group[later]
    num_earlier = torch.searchsorted(of_group, torch.arange(num_groups, device=group.device))
    cell = of_group * shape[1] + torch.arange(len(later), device=group.device) - num_earlier[of_group]
    with torch.autocast(logits.device.type, enabled=False):
        matrices = scores.softmax(-1)[:, None].expand(-1, size, -1)
        matrices = matrices.index_copy(0, inside, chain.transitions(scores[inside], weights[inside], tables))
        matrices = matrices * (emissions - highest[:, None]).exp()[:, None]
        grid = identity(matrices).repeat(num_groups * shape[1], 1, 1).index_copy(0, cell, matrices)
        return totals + log_product(grid.unflatten(0, shape))


__all__ = ["VMDChain", "chain_log_probs", "log_product"]
