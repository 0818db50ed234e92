"""The chain: a discrete latent whose posterior is known.

The masked positions i_1 < ... < i_n of a block (or sequence) have states s_1..s_n in {1..K}:

    p(x_A | x_t) = sum_s pi(s_1 | x_t) prod_j T_j(s_{j-1} -> s_j | x_t) prod_{i_j in A} p(x_0^{i_j} | s_j, x_t)

for any subset A of M_t. All factors are read off the hidden states h and the logits a of one pass of the denoiser:

    pi(s)          proportional to   exp(E_0[s] + q_s(h_1))
    T_j(s -> s')   proportional to   exp(E[s, s'] + q_{s'}(h_j) + sum_m g_m(h_j) W_m[s, s'])
    p(v | s, h_i)  proportional to   exp(a_iv + sum_r U_sr (1 + e_r(h_i)) V_vr),     sum_s U_sr = 0

Of a large vocabulary, only the most probable tokens at a position have the sum in the exponent, and all others 0. The
probabilities of all tokens still sum to 1, and the cost does not depend on the size of the vocabulary.

The sum over all paths is the forward recursion, so that the likelihood is exact: there is no posterior to learn, no KL
term and nothing to collapse. Emissions of tokens that are not revealed sum to 1, so that all steps, orders and subsets
share one joint distribution. One state is the model without a latent.

Everything is computed in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .configuration_vmd import VMDConfig
from .latents_vmd import input_dtype

NUM_KERNELS = 8
_SMALLEST = 1e-30  # of a probability: keeps logarithms finite


@dataclass
class Transitions:
    """The transitions of a batch of groups (blocks or sequences) of n columns each.

    Attributes:
        start: (groups, n, K), pi where a column is the first masked one.
        matrix: (groups, n - 1, K, K), T of all columns but the first.
        restarts: (groups, n) bool, where a new document begins with a chain of its own; `None`: nowhere.
    """

    start: torch.Tensor
    matrix: torch.Tensor
    restarts: torch.Tensor | None = None

    def columns(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
        """(start, matrix, restarts) of each column. (Unbound at once: a gradient for each column would be as large as
        that of all.)"""
        restarts = [None] * self.start.shape[1] if self.restarts is None else self.restarts.unbind(1)
        yield from zip(self.start.unbind(1), (None, *self.matrix.unbind(1)), restarts, strict=True)


class VMDChain(nn.Module):
    """States, transitions and emissions of the chain, from hidden states and logits."""

    def __init__(self, config: VMDConfig):
        super().__init__()
        self.num_states = config.latent_size
        self.num_candidates = config.candidate_tokens
        rank = config.conditioning_size
        self.state_proj = nn.Linear(config.hidden_size, self.num_states)  # q
        self.kernel_proj = nn.Linear(config.hidden_size, NUM_KERNELS)  # g
        self.tilt_proj = nn.Linear(config.hidden_size, rank)  # e
        self.start = nn.Parameter(torch.empty(self.num_states))  # E_0
        self.table = nn.Parameter(torch.empty(self.num_states, self.num_states))  # E
        self.kernels = nn.Parameter(torch.empty(NUM_KERNELS, self.num_states, self.num_states))  # W
        self.state_vectors = nn.Parameter(torch.empty(self.num_states, rank))  # U
        self.token_vectors = nn.Parameter(torch.empty(config.vocab_size, rank))  # V

    def transitions(self, hidden_states: torch.Tensor, restarts: torch.Tensor | None = None) -> Transitions:
        """Of hidden states (groups, n, hidden)."""
        scores = self._project(self.state_proj, hidden_states)
        start = (scores + self.start.float()).softmax(-1)
        weights = self._project(self.kernel_proj, hidden_states[:, 1:])  # no state comes before the first column
        logits = torch.addmm(self.table.float().flatten(), weights.flatten(0, 1), self.kernels.float().flatten(1))
        logits = logits.view(*weights.shape[:2], self.num_states, self.num_states).add_(scores[:, 1:, None])
        return Transitions(start, logits.softmax(-1), restarts)

    def _project(self, layer: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
        return layer(hidden_states.to(input_dtype(layer))).float()

    def centred_states(self) -> torch.Tensor:
        """U, (K, rank), of mean 0 over the states: with one state, zero."""
        vectors = self.state_vectors.float()
        return vectors - vectors.mean(0)

    def emission_log_probs(
        self, hidden_states: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """log p(token | s) for each state, (positions, K), of hidden states (positions, hidden), the denoiser's logits
        (positions, vocabulary) and tokens (positions,) int64."""
        tilted, normaliser, candidates = self._tilted(hidden_states, logits)
        if candidates is None:
            index = tokens[:, None, None].expand(-1, self.num_states, 1)
            return tilted.gather(-1, index).squeeze(-1) - normaliser
        found = candidates == tokens[:, None]  # (positions, candidates)
        place = found.long().argmax(-1)[:, None, None].expand(-1, self.num_states, 1)
        other = logits.float().gather(-1, tokens[:, None])  # (positions, 1)
        return torch.where(found.any(-1, keepdim=True), tilted.gather(-1, place).squeeze(-1), other) - normaliser

    def token_log_probs(self, hidden_states: torch.Tensor, logits: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """log p(v | state) of one state (positions,) int64 at each position, (positions, vocabulary)."""
        tilted, normaliser, candidates = self._tilted(hidden_states, logits, states)
        if candidates is None:
            return tilted[:, 0] - normaliser
        return logits.float().scatter(-1, candidates, tilted[:, 0]) - normaliser

    def marginal_log_probs(
        self, hidden_states: torch.Tensor, logits: torch.Tensor, state_probs: torch.Tensor
    ) -> torch.Tensor:
        """log sum_s p(s) p(v | s), (positions, vocabulary), of probabilities of the states (positions, K)."""
        tilted, normaliser, candidates = self._tilted(hidden_states, logits)
        log_weights = state_probs.log() - normaliser  # (positions, K)
        mixed = (tilted + log_weights[..., None]).logsumexp(1)
        if candidates is None:
            return mixed
        return (logits.float() + log_weights.logsumexp(-1, keepdim=True)).scatter(-1, candidates, mixed)

    def _tilted(
        self, hidden_states: torch.Tensor, logits: torch.Tensor, states: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Logits of the candidates in each state (positions, K, candidates), the logarithm of the sum over the whole
        vocabulary (positions, K), and the candidates (positions, candidates), `None` for all tokens. With `states`
        (positions,) K is 1, that state."""
        logits = logits.float()
        gate = 1 + self._project(self.tilt_proj, hidden_states)  # (positions, rank)
        vectors, tokens = self.centred_states(), self.token_vectors.float()
        if logits.shape[-1] <= self.num_candidates:
            if states is None:
                pairs = (vectors[:, None] * tokens).flatten(0, 1)  # (K * vocabulary, rank)
                tilts = (gate @ pairs.T).unflatten(-1, (self.num_states, -1))
            else:
                tilts = ((gate * vectors[states]) @ tokens.T)[:, None]
            tilted = tilts + logits[:, None]
            return tilted, tilted.logsumexp(-1), None
        top = logits.topk(self.num_candidates, dim=-1)
        of_state = gate[:, None] * (vectors if states is None else vectors[states][:, None])  # (positions, K, rank)
        tilts = of_state @ nn.functional.embedding(top.indices, tokens).transpose(1, 2)
        tilted = tilts + top.values[:, None]
        # All tokens but the candidates: the logarithm of a difference, of which the first part is the larger one.
        whole, among = logits.logsumexp(-1), top.values.logsumexp(-1)
        others = whole + torch.log1p(-(among - whole).exp().clamp(max=1 - 1e-6))
        normaliser = torch.logaddexp(tilted.logsumexp(-1), others[:, None])
        return tilted, normaliser, top.indices


def advance(
    state: torch.Tensor,
    begun: torch.Tensor,
    start: torch.Tensor,
    matrix: torch.Tensor | None,
    restarts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of the states before a column, (groups, K), to those at it; and `begun` (groups, 1) bool, whether
    there is a state before it in its document."""
    if restarts is not None:
        begun = begun & ~restarts[:, None]
    if matrix is None:
        return start, begun
    return torch.where(begun, torch.bmm(state[:, None], matrix)[:, 0], start), begun


def chain_log_probs(
    transitions: Transitions, emissions: torch.Tensor, masked: torch.Tensor, scored: torch.Tensor
) -> torch.Tensor:
    """log p of each scored token given x_t and the scored tokens to its left, (groups, n), 0 elsewhere: by the chain
    rule the sum is log p(x_A | x_t).

    Args:
        emissions: (groups, n, K), log p(token | s); read at scored columns only.
        masked, scored: (groups, n) bool, M_t and A.
    """
    highest = emissions.amax(-1)
    relative = (emissions - highest[..., None]).exp().unbind(1)
    conditioned = scored[..., None].unbind(1)
    masked = masked[..., None].unbind(1)
    state, begun = relative[0], torch.zeros_like(masked[0])
    evidence = []
    for column, factors in enumerate(transitions.columns()):
        predicted, begun = advance(state, begun, *factors)
        seen = predicted * relative[column]
        evidence.append(seen.sum(-1, keepdim=True).clamp(min=_SMALLEST))
        predicted = torch.where(conditioned[column], seen / evidence[-1], predicted)
        state, begun = torch.where(masked[column], predicted, state), begun | masked[column]
    return (torch.cat(evidence, dim=-1).log() + highest).where(scored, 0.0)


def state_marginals(transitions: Transitions, masked: torch.Tensor) -> torch.Tensor:
    """p(s_j | x_t), (groups, n, K), at masked columns; arbitrary elsewhere."""
    masked = masked[..., None].unbind(1)
    state, begun = transitions.start[:, 0], torch.zeros_like(masked[0])
    found = []
    for is_masked, factors in zip(masked, transitions.columns(), strict=True):
        predicted, begun = advance(state, begun, *factors)
        found.append(predicted)
        state, begun = torch.where(is_masked, predicted, state), begun | is_masked
    return torch.stack(found, dim=1)


def draw_states(transitions: Transitions, masked: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """A path of states, (groups, n) int64: drawn, or the most probable one. Arbitrary at columns that are not masked.

    Args:
        masked: (groups, n) bool.
        noise: (groups, n, K) independent exponential, or `None` for the most probable path (Viterbi).
    """
    if noise is None:
        return most_probable_states(transitions, masked)
    masked = masked[..., None].unbind(1)
    state, begun = torch.zeros_like(noise[:, 0]), torch.zeros_like(masked[0])
    path = []
    for column, factors in enumerate(transitions.columns()):
        predicted, begun = advance(state, begun, *factors)
        # The largest of probabilities over independent exponentials falls on a state with its probability.
        path.append((predicted / noise[:, column]).argmax(-1))
        drawn = nn.functional.one_hot(path[-1], noise.shape[-1]).to(noise.dtype)
        state, begun = torch.where(masked[column], drawn, state), begun | masked[column]
    return torch.stack(path, dim=1)


def most_probable_states(transitions: Transitions, masked: torch.Tensor) -> torch.Tensor:
    """The Viterbi path, (groups, n) int64; arbitrary at columns that are not masked."""
    masked = masked[..., None].unbind(1)
    score, begun = torch.zeros_like(transitions.start[:, 0]), torch.zeros_like(masked[0])
    stay = torch.arange(score.shape[-1], device=score.device).expand(score.shape)
    origins = []
    for is_masked, (start, matrix, restarts) in zip(masked, transitions.columns(), strict=True):
        if restarts is not None:
            begun = begun & ~restarts[:, None]
        # A chain that begins here follows the best end of the one before.
        ended, origin = score.max(-1, keepdim=True)
        best, origin = ended + start.log(), origin.expand_as(stay)
        if matrix is not None:
            inside, before = (score[..., None] + matrix.log()).max(1)
            best, origin = torch.where(begun, inside, best), torch.where(begun, before, origin)
        origins.append(torch.where(is_masked, origin, stay))
        score, begun = torch.where(is_masked, best, score), begun | is_masked
    state = score.argmax(-1, keepdim=True)
    path = []
    for origin in reversed(origins):
        path.append(state)
        state = origin.gather(-1, state)
    return torch.cat(path[::-1], dim=-1)


__all__ = ["Transitions", "VMDChain", "chain_log_probs", "draw_states", "most_probable_states", "state_marginals"]
