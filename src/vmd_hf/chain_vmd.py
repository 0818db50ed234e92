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
from torch.autograd.function import once_differentiable

from .configuration_vmd import VMDConfig
from .latents_vmd import input_dtype

NUM_KERNELS = 8
_SMALLEST = 1e-30  # of a probability: keeps logarithms finite


class _Advance(torch.autograd.Function):
    """p(s') = sum_s p(s) T(s -> s') for groups with matrices T = softmax(q_{s'} + sum_m g_m W_m[s, s']) of their own.

    The gradient of the softmax's argument is T times a matrix of rank two. Written down here, it takes half of the
    time that it takes step by step: these K x K numbers of every group are most of what a chain costs.
    """

    @staticmethod
    def forward(ctx, state, scores, weights, kernels):
        matrix = transition_matrix(scores, weights, kernels)
        ctx.save_for_backward(state, weights, kernels, matrix)
        return torch.bmm(state[:, None], matrix)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        state, weights, kernels, matrix = ctx.saved_tensors
        expected = torch.bmm(matrix, grad[..., None])  # (groups, K, 1)
        before = torch.cat([state[..., None], -state[..., None] * expected], dim=-1)
        after = torch.stack([grad, torch.ones_like(grad)], dim=1)
        of_logits = torch.bmm(before, after).mul_(matrix)
        flat = of_logits.flatten(1)
        of_kernels = (weights.T @ flat).view_as(kernels)
        return expected[..., 0], of_logits.sum(1), flat @ kernels.flatten(1).T, of_kernels


def transition_matrix(scores: torch.Tensor, weights: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """T, (groups, K, K), of q (groups, K), g (groups, M) and W (M, K, K)."""
    logits = (weights @ kernels.flatten(1)).unflatten(-1, kernels.shape[1:])
    return logits.add_(scores[:, None]).softmax(-1)


@dataclass
class Transitions:
    """The transitions of a batch of groups (blocks or sequences) of n columns each.

    Attributes:
        start: (groups, n, K), pi where a column is the first masked one.
        scores: (groups, n, K), q.
        weights: (groups, n, 1 + NUM_KERNELS), 1 and g.
        kernels: (1 + NUM_KERNELS, K, K), E and W.
        restarts: (groups, n) bool, where a new document begins with a chain of its own; `None`: nowhere.
    """

    start: torch.Tensor
    scores: torch.Tensor
    weights: torch.Tensor
    kernels: torch.Tensor
    restarts: torch.Tensor | None = None

    def columns(self) -> Iterator["Column"]:
        """Each column, from left to right. (Unbound at once: a gradient for each column would be as large as that of
        all.)"""
        restarts = [None] * self.start.shape[1] if self.restarts is None else self.restarts.unbind(1)
        parts = (part.unbind(1) for part in (self.start, self.scores, self.weights))
        yield from (Column(*part, self.kernels) for part in zip(restarts, *parts, strict=True))


@dataclass
class Column:
    """One column of `Transitions`, without the dimension of columns."""

    restarts: torch.Tensor | None
    start: torch.Tensor
    scores: torch.Tensor
    weights: torch.Tensor
    kernels: torch.Tensor

    def still(self, begun: torch.Tensor) -> torch.Tensor:
        """Of `begun` (groups, 1) bool, whether there is a state before the column, what holds within its document."""
        return begun if self.restarts is None else begun & ~self.restarts[:, None]

    def matrix(self) -> torch.Tensor:
        """(groups, K, K)."""
        return transition_matrix(self.scores, self.weights, self.kernels)

    def after(self, state: torch.Tensor, begun: torch.Tensor) -> torch.Tensor:
        """Probabilities of its states, (groups, K), given those of the states before it."""
        return torch.where(begun, _Advance.apply(state, self.scores, self.weights, self.kernels), self.start)

    def after_state(self, state: torch.Tensor, begun: torch.Tensor) -> torch.Tensor:
        """The same where the state before it is known, (groups,) int64: a row of each matrix is enough."""
        rows = self.kernels.transpose(0, 1)[state]  # (groups, 1 + NUM_KERNELS, K)
        following = torch.baddbmm(self.scores[:, None], self.weights[:, None], rows)[:, 0].softmax(-1)
        return torch.where(begun, following, self.start)


class VMDChainTables(nn.Module):
    """The weights of the chain that belong to no layer, in float32. They are what a call returns, so that accelerate
    brings them where the model is offloaded."""

    def __init__(self, config: VMDConfig):
        super().__init__()
        num_states, rank = config.latent_size, config.conditioning_size
        self.start = nn.Parameter(torch.empty(num_states))  # E_0
        self.table = nn.Parameter(torch.empty(num_states, num_states))  # E
        self.kernels = nn.Parameter(torch.empty(NUM_KERNELS, num_states, num_states))  # W
        self.state_vectors = nn.Parameter(torch.empty(num_states, rank))  # U
        self.token_vectors = nn.Parameter(torch.empty(config.vocab_size, rank))  # V

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """E_0, E and W (1 + NUM_KERNELS, K, K), U (of mean 0 over the states: with one state, zero), V."""
        kernels = torch.cat([self.table[None], self.kernels]).float()
        vectors = self.state_vectors.float()
        return self.start.float(), kernels, vectors - vectors.mean(0), self.token_vectors.float()


class VMDChain(nn.Module):
    """States, transitions and emissions of the chain, from hidden states and logits."""

    def __init__(self, config: VMDConfig):
        super().__init__()
        self.num_states = config.latent_size
        self.num_candidates = config.candidate_tokens
        self.state_proj = nn.Linear(config.hidden_size, self.num_states)  # q
        self.kernel_proj = nn.Linear(config.hidden_size, NUM_KERNELS)  # g
        self.tilt_proj = nn.Linear(config.hidden_size, config.conditioning_size)  # e
        self.tables = VMDChainTables(config)

    def transitions(self, hidden_states: torch.Tensor, restarts: torch.Tensor | None = None) -> Transitions:
        """Of hidden states (groups, n, hidden)."""
        scores = self._project(self.state_proj, hidden_states)
        start, kernels, *_ = self.tables()
        start = (scores + start).softmax(-1)
        weights = nn.functional.pad(self._project(self.kernel_proj, hidden_states), (1, 0), value=1.0)
        return Transitions(start, scores, weights, kernels, restarts)

    def _project(self, layer: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
        return layer(hidden_states.to(input_dtype(layer))).float()

    def emission_log_probs(
        self, hidden_states: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """log p(token | s) for each state, (positions, K), of hidden states (positions, hidden), the denoiser's logits
        (positions, vocabulary) and tokens (positions,) int64."""
        log_probs, candidates, rest = self._log_probs(hidden_states, logits)
        place, share = tokens[:, None], 0.0
        if candidates is not None:
            found = candidates == place  # (positions, candidates)
            is_candidate = found.any(-1, keepdim=True)
            share = (logits.float().gather(-1, place) - rest).masked_fill(is_candidate, 0.0)
            place = torch.where(is_candidate, found.long().argmax(-1, keepdim=True), self.num_candidates)
        return log_probs.gather(-1, place[..., None].expand(-1, self.num_states, 1)).squeeze(-1) + share

    def token_log_probs(self, hidden_states: torch.Tensor, logits: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """log p(v | state) of one state (positions,) int64 at each position, (positions, vocabulary)."""
        log_probs, candidates, rest = self._log_probs(hidden_states, logits, states)
        return self._of_all_tokens(log_probs[:, 0], logits, candidates, rest)

    def marginal_log_probs(
        self, hidden_states: torch.Tensor, logits: torch.Tensor, state_probs: torch.Tensor
    ) -> torch.Tensor:
        """log sum_s p(s) p(v | s), (positions, vocabulary), of probabilities of the states (positions, K)."""
        log_probs, candidates, rest = self._log_probs(hidden_states, logits)
        mixed = (log_probs + state_probs.log()[..., None]).logsumexp(1)
        return self._of_all_tokens(mixed, logits, candidates, rest)

    def _of_all_tokens(self, log_probs, logits, candidates, rest) -> torch.Tensor:
        """(positions, vocabulary) of what `_log_probs` gives of one state."""
        if candidates is None:
            return log_probs
        return (logits.float() - rest + log_probs[:, -1:]).scatter(-1, candidates, log_probs[:, :-1])

    def _log_probs(
        self, hidden_states: torch.Tensor, logits: torch.Tensor, states: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """log p(v | s) of all tokens, (positions, K, vocabulary), `None`, `None`; of a large vocabulary those of the
        candidates and of all other tokens together, (positions, K, candidates + 1), the candidates (positions,
        candidates), and the logarithm of the sum over the others' exponentials (positions, 1). With `states`
        (positions,) K is 1, that state."""
        logits = logits.float()
        gate = 1 + self._project(self.tilt_proj, hidden_states)  # (positions, rank)
        *_, vectors, tokens = self.tables()
        if logits.shape[-1] <= self.num_candidates:
            if states is None:
                pairs = (vectors[:, None] * tokens).flatten(0, 1)  # (K * vocabulary, rank)
                tilts = (gate @ pairs.T).unflatten(-1, (self.num_states, -1))
            else:
                tilts = ((gate * vectors[states]) @ tokens.T)[:, None]
            return tilts.add_(logits[:, None]).log_softmax(-1), None, None
        top = logits.topk(self.num_candidates, dim=-1)
        of_state = gate[:, None] * (vectors if states is None else vectors[states][:, None])  # (positions, K, rank)
        tilts = of_state @ nn.functional.embedding(top.indices, tokens).transpose(1, 2)
        # All tokens but the candidates: the logarithm of a difference, of which the first part is the larger one.
        whole, among = (part.logsumexp(-1, keepdim=True) for part in (logits, top.values))
        rest = whole + torch.log1p(-(among - whole).exp().clamp(max=1 - 1e-6))  # (positions, 1)
        tilted = torch.cat([tilts.add_(top.values[:, None]), rest[:, None].expand(-1, tilts.shape[1], 1)], dim=-1)
        return tilted.log_softmax(-1), top.indices, rest


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
    state, begun = None, torch.zeros_like(masked[0])
    evidence = []
    for place, column in enumerate(transitions.columns()):
        begun = column.still(begun)
        predicted = column.start if state is None else column.after(state, begun)
        seen = predicted * relative[place]
        evidence.append(seen.sum(-1, keepdim=True).clamp(min=_SMALLEST))
        predicted = torch.where(conditioned[place], seen / evidence[-1], predicted)
        state = predicted if state is None else torch.where(masked[place], predicted, state)
        begun = begun | masked[place]
    return (torch.cat(evidence, dim=-1).log() + highest).where(scored, 0.0)


def state_marginals(transitions: Transitions, masked: torch.Tensor) -> torch.Tensor:
    """p(s_j | x_t), (groups, n, K), at masked columns; arbitrary elsewhere."""
    masked = masked[..., None].unbind(1)
    state, begun = None, torch.zeros_like(masked[0])
    found = []
    for is_masked, column in zip(masked, transitions.columns(), strict=True):
        begun = column.still(begun)
        found.append(column.start if state is None else column.after(state, begun))
        state = found[-1] if state is None else torch.where(is_masked, found[-1], state)
        begun = begun | is_masked
    return torch.stack(found, dim=1)


def draw_states(transitions: Transitions, masked: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """A path of states, (groups, n) int64: drawn, or the most probable one. Arbitrary at columns that are not masked.

    Args:
        masked: (groups, n) bool.
        noise: (groups, n, K) independent exponential, or `None` for the most probable path (Viterbi).
    """
    if noise is None:
        return most_probable_states(transitions, masked)
    state, begun = torch.zeros_like(masked[:, 0], dtype=torch.long), torch.zeros_like(masked[:, :1])
    path = []
    for place, column in enumerate(transitions.columns()):
        begun = column.still(begun)
        # The largest of probabilities over independent exponentials falls on a state with its probability.
        path.append((column.after_state(state, begun) / noise[:, place]).argmax(-1))
        state = torch.where(masked[:, place], path[-1], state)
        begun = begun | masked[:, place, None]
    return torch.stack(path, dim=1)


def most_probable_states(transitions: Transitions, masked: torch.Tensor) -> torch.Tensor:
    """The Viterbi path, (groups, n) int64; arbitrary at columns that are not masked."""
    masked = masked[..., None].unbind(1)
    score, begun = torch.zeros_like(transitions.start[:, 0]), torch.zeros_like(masked[0])
    stay = torch.arange(score.shape[-1], device=score.device).expand(score.shape)
    origins = []
    for is_masked, column in zip(masked, transitions.columns(), strict=True):
        begun = column.still(begun)
        # A chain that begins here follows the best end of the one before.
        ended, origin = score.max(-1, keepdim=True)
        inside, before = (score[..., None] + column.matrix().log()).max(1)
        best = torch.where(begun, inside, ended + column.start.log())
        origin = torch.where(begun, before, origin.expand_as(stay))
        origins.append(torch.where(is_masked, origin, stay))
        score, begun = torch.where(is_masked, best, score), begun | is_masked
    state = score.argmax(-1, keepdim=True)
    path = []
    for origin in reversed(origins):
        path.append(state)
        state = origin.gather(-1, state)
    return torch.cat(path[::-1], dim=-1)


__all__ = [
    "Column",
    "Transitions",
    "VMDChain",
    "chain_log_probs",
    "draw_states",
    "most_probable_states",
    "state_marginals",
]
