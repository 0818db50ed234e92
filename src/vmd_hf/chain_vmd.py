"""The chain: a discrete latent whose posterior is known.

The masked positions i_1 < ... < i_n of a block (or sequence) have states s_1..s_n in {1..K}:

    p(x_A | x_t) = sum_s prod_j T_j(s_{j-1} -> s_j | x_t) prod_{i_j in A} p(x_0^{i_j} | s_j, x_t),   A a subset of M_t

with T_1 from a state of its own, the start. All factors are read off the hidden states h and the logits a of one pass
of the denoiser:

    T_j(s -> s')   proportional to   exp(q_{s'}(h_j)) sum_m w_m(h_j) exp(E_m[s, s'])
    p(v | s, h_i)  proportional to   exp(a_iv + sum_r U_sr (1 + e_r(h_i)) V_vr),     sum_s U_sr = 0

Of a large vocabulary, only the most probable tokens at a position have the sum in the exponent, and all others 0. The
probabilities of all tokens still sum to 1, and the cost does not depend on the size of the vocabulary.

The sum over all paths is the forward recursion, so that the likelihood is exact: there is no posterior to learn, no KL
term and nothing to collapse. Emissions of tokens that are not revealed sum to 1, so that all steps, orders and subsets
share one joint distribution. One state is the model without a latent. Transitions are a mixture of M kernels, so that
a step of the recursion is a product with one matrix for all positions, and no tensor has K x K entries a position.

Everything is computed in float32.
"""

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
        kernels: (M, K + 1, K), exp(E); the last row is the start.
        weights: (groups, n, M), w.
        preference: (groups, n, K), exp(q), at most 1.
        normaliser: (groups, n, K + 1), over s' for each s.
        restarts: (groups, n) bool, where a new document begins with a chain of its own; `None`: nowhere.
    """

    kernels: torch.Tensor
    weights: torch.Tensor
    preference: torch.Tensor
    normaliser: torch.Tensor
    restarts: torch.Tensor | None = None

    def start(self) -> torch.Tensor:
        """(groups, K + 1): the probabilities of the states before the first masked column."""
        groups, num_states = self.preference.shape[0], self.preference.shape[2]
        return nn.functional.pad(self.preference.new_zeros(groups, num_states), (0, 1), value=1.0)

    def enter(self, column: int, state: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """The state before a column, or the start, if a document begins there."""
        if self.restarts is None:
            return state
        begins = self.restarts[:, column]
        return torch.where(begins.view(-1, *[1] * (state.dim() - 1)), start, state)

    def step(self, state: torch.Tensor, column: int) -> torch.Tensor:
        """Probabilities of the states before a column, (groups, K + 1), to those at it, (groups, K)."""
        scaled = state / self.normaliser[:, column]
        reached = torch.einsum("gs,msk->gmk", scaled, self.kernels)
        return self.preference[:, column] * torch.einsum("gm,gmk->gk", self.weights[:, column], reached)

    def rows(self, state: torch.Tensor, column: int) -> torch.Tensor:
        """T(state -> s') at a column, (groups, K), of states (groups,) int64 before it, K for the start."""
        kernel = torch.einsum("gm,gmk->gk", self.weights[:, column], self.kernels[:, state].transpose(0, 1))
        normaliser = self.normaliser[:, column].gather(-1, state[:, None])
        return self.preference[:, column] * kernel / normaliser


class VMDChain(nn.Module):
    """States, transitions and emissions of the chain, from hidden states and logits."""

    def __init__(self, config: VMDConfig):
        super().__init__()
        self.num_states = config.latent_size
        self.num_candidates = config.candidate_tokens
        rank = config.conditioning_size
        self.state_proj = nn.Linear(config.hidden_size, self.num_states)  # q
        self.kernel_proj = nn.Linear(config.hidden_size, NUM_KERNELS)  # w
        self.tilt_proj = nn.Linear(config.hidden_size, rank)  # e
        self.kernels = nn.Parameter(torch.empty(NUM_KERNELS, self.num_states + 1, self.num_states))  # E
        self.state_vectors = nn.Parameter(torch.empty(self.num_states, rank))  # U
        self.token_vectors = nn.Parameter(torch.empty(config.vocab_size, rank))  # V

    def transitions(self, hidden_states: torch.Tensor, restarts: torch.Tensor | None = None) -> Transitions:
        """Of hidden states (groups, n, hidden)."""
        scores = self._project(self.state_proj, hidden_states)
        preference = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = self._project(self.kernel_proj, hidden_states).softmax(-1)
        kernels = self.kernels.float().exp()
        reached = torch.einsum("gnk,msk->gnms", preference, kernels)
        normaliser = torch.einsum("gnm,gnms->gns", weights, reached)
        return Transitions(kernels, weights, preference, normaliser, restarts)

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


def chain_log_probs(
    transitions: Transitions,
    emissions: torch.Tensor,
    masked: torch.Tensor,
    scored: torch.Tensor,
    joint: torch.Tensor,
) -> torch.Tensor:
    """log p of each scored token, (groups, n), 0 elsewhere: given x_t and the scored tokens to its left where the
    group is `joint` (the chain rule, so that the sum is log p(x_A | x_t)), else given x_t alone (its marginal).

    Args:
        emissions: (groups, n, K), log p(token | s); read at scored columns only.
        masked, scored: (groups, n) bool, M_t and A.
        joint: (groups,) bool.
    """
    state = start = transitions.start()
    highest = emissions.amax(-1, keepdim=True)
    relative = (emissions - highest).exp()
    log_probs = []
    for column in range(masked.shape[1]):
        state = transitions.enter(column, state, start)
        predicted = transitions.step(state, column)  # (groups, K)
        seen = predicted * relative[:, column]
        evidence = seen.sum(-1, keepdim=True).clamp(min=_SMALLEST)
        is_scored = scored[:, column, None]
        log_probs.append(torch.where(is_scored, evidence.log() + highest[:, column], 0.0))
        predicted = torch.where(is_scored & joint[:, None], seen / evidence, predicted)
        state = torch.where(masked[:, column, None], nn.functional.pad(predicted, (0, 1)), state)
    return torch.cat(log_probs, dim=-1)


def state_marginals(transitions: Transitions, masked: torch.Tensor) -> torch.Tensor:
    """p(s_j | x_t), (groups, n, K), at masked columns; arbitrary elsewhere."""
    state = start = transitions.start()
    found = []
    for column in range(masked.shape[1]):
        state = transitions.enter(column, state, start)
        predicted = transitions.step(state, column)
        found.append(predicted)
        state = torch.where(masked[:, column, None], nn.functional.pad(predicted, (0, 1)), state)
    return torch.stack(found, dim=1)


def draw_states(transitions: Transitions, masked: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """A path of states, (groups, n) int64: drawn, or the most probable one. Arbitrary at columns that are not masked.

    Args:
        masked: (groups, n) bool.
        noise: (groups, n, K) independent exponential, or `None` for the most probable path (Viterbi).
    """
    if noise is None:
        return most_probable_states(transitions, masked)
    state = start = torch.full(masked.shape[:1], transitions.kernels.shape[2], device=masked.device)
    path = []
    for column in range(masked.shape[1]):
        state = transitions.enter(column, state, start)
        # The largest of probabilities over independent exponentials falls on a state with its probability.
        drawn = (transitions.rows(state, column) / noise[:, column]).argmax(-1)
        path.append(drawn)
        state = torch.where(masked[:, column], drawn, state)
    return torch.stack(path, dim=1)


def most_probable_states(transitions: Transitions, masked: torch.Tensor) -> torch.Tensor:
    """The Viterbi path, (groups, n) int64; arbitrary at columns that are not masked."""
    num_states = transitions.kernels.shape[2]
    score = start = transitions.start().log()
    origins = []
    for column in range(masked.shape[1]):
        # What the best path to each state comes from; where a document begins, the best end of the one before.
        end = score.argmax(-1, keepdim=True)
        entered = transitions.enter(column, score, start)
        kernel = torch.einsum("gm,msk->gsk", transitions.weights[:, column], transitions.kernels)
        matrix = kernel * transitions.preference[:, column, None] / transitions.normaliser[:, column, :, None]
        best, origin = (entered[..., None] + matrix.clamp(min=_SMALLEST).log()).max(1)
        origin = transitions.enter(column, origin, end.expand_as(origin))
        stay = torch.arange(num_states + 1, device=masked.device).expand_as(score)
        origins.append(torch.where(masked[:, column, None], nn.functional.pad(origin, (0, 1)), stay))
        best = nn.functional.pad(best, (0, 1), value=-torch.inf)
        score = torch.where(masked[:, column, None], best, entered)
    state = score.argmax(-1)
    path = []
    for column in reversed(range(masked.shape[1])):
        path.append(state.clamp(max=num_states - 1))
        state = origins[column].gather(-1, state[:, None]).squeeze(-1)
    return torch.stack(path[::-1], dim=1)


__all__ = ["Transitions", "VMDChain", "chain_log_probs", "draw_states", "most_probable_states", "state_marginals"]
