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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .configuration_vmd import VMDConfig
from .latents_vmd import input_dtype

NUM_KERNELS = 8
_SMALLEST = 1e-30  # of a probability: keeps logarithms finite
_CHUNK = 2**18  # numbers that a CPU works on before it goes on to the next ones: 1 MB, for its cache


@dataclass
class Transitions:
    """The transitions of a batch of groups (blocks or sequences) of n columns each.

    Attributes:
        start: (groups, n, K), pi where a column is the first masked one.
        matrix: (groups, n - 1, K, K), T of all columns but the first; or for each of these columns a function that
            multiplies states (groups, K) by it.
        restarts: (groups, n) bool, where a new document begins with a chain of its own; `None`: nowhere.
    """

    start: torch.Tensor
    matrix: torch.Tensor | list[Callable[[torch.Tensor], torch.Tensor]]
    restarts: torch.Tensor | None = None

    def columns(self) -> Iterator[tuple]:
        """(start, matrix, restarts) of each column. (Unbound at once: a gradient for each column would be as large as
        that of all.)"""
        restarts = [None] * self.start.shape[1] if self.restarts is None else self.restarts.unbind(1)
        matrices = self.matrix.unbind(1) if isinstance(self.matrix, torch.Tensor) else self.matrix
        yield from zip(self.start.unbind(1), (None, *matrices), restarts, strict=True)


def chunks(rows: torch.Tensor, width: int) -> list[slice]:
    """Of rows for each of which `width` numbers are computed: as many as are computed with at a time."""
    size = max(_CHUNK // width, 1) if rows.device.type == "cpu" else max(len(rows), 1)
    return [slice(start, start + size) for start in range(0, len(rows), size)]


class Transition(torch.autograd.Function):
    """`state @ softmax(features @ kernels + scores)`, a step of the recursion for each row: of the matrices only
    these softmaxes are kept, and their gradients are never there all at once.

    state: (rows, K); scores: (rows, K), of the states that are entered; features: (rows, F); kernels: (F, K * K).
    """

    @staticmethod
    def forward(ctx, state, scores, features, kernels):
        size = state.shape[-1]
        matrix = state.new_empty(len(state), size, size)
        for rows in chunks(state, size**2):
            logits = (features[rows] @ kernels).view(-1, size, size)
            torch.softmax(logits.add_(scores[rows, None]), -1, out=matrix[rows])
        ctx.save_for_backward(state, features, kernels, matrix)
        return torch.bmm(state[:, None], matrix)[:, 0]

    @staticmethod
    def backward(ctx, gradient):
        state, features, kernels, matrix = ctx.saved_tensors
        of_state = torch.bmm(matrix, gradient[..., None])[..., 0]
        of_scores, of_features, of_kernels = (
            torch.empty_like(state),
            torch.empty_like(features),
            torch.zeros_like(kernels),
        )
        for rows in chunks(state, state.shape[-1] ** 2):
            of_logits = matrix[rows] * state[rows, :, None]
            of_logits *= gradient[rows, None] - of_state[rows, :, None]
            of_scores[rows] = of_logits.sum(1)
            of_logits = of_logits.flatten(1)
            of_features[rows] = of_logits @ kernels.T
            of_kernels.addmm_(features[rows].T, of_logits)
        return of_state, of_scores, of_features, of_kernels


class TokenLogProbs(torch.autograd.Function):
    """`log_softmax(logits[:, None] + gate @ pairs, -1)` at a token of each position, (positions, K).

    gate: (positions, rank); pairs: (rank, K * vocabulary); logits: (positions, vocabulary); tokens: (positions,).
    """

    @staticmethod
    def forward(ctx, gate, pairs, logits, tokens):
        num_states = pairs.shape[1] // logits.shape[1]
        log_probs = logits.new_empty(len(logits), num_states, logits.shape[1])
        for rows in chunks(gate, pairs.shape[1]):
            tilted = (gate[rows] @ pairs).view(-1, num_states, logits.shape[1])
            torch.log_softmax(tilted.add_(logits[rows, None]), -1, out=log_probs[rows])
        index = tokens[:, None, None].expand(-1, num_states, 1)
        ctx.save_for_backward(gate, pairs, log_probs, index)
        return log_probs.gather(-1, index).squeeze(-1)

    @staticmethod
    def backward(ctx, gradient):
        gate, pairs, log_probs, index = ctx.saved_tensors
        of_gate, of_pairs = torch.empty_like(gate), torch.zeros_like(pairs)
        of_logits = log_probs.new_empty(len(gate), log_probs.shape[-1])
        for rows in chunks(gate, pairs.shape[1]):
            of_tilted = log_probs[rows].exp().mul_(-gradient[rows, :, None])
            of_tilted.scatter_add_(-1, index[rows], gradient[rows, :, None])
            of_logits[rows] = of_tilted.sum(1)
            of_tilted = of_tilted.flatten(1)
            of_gate[rows] = of_tilted @ pairs.T
            of_pairs.addmm_(gate[rows].T, of_tilted)
        return of_gate, of_pairs, of_logits, None


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

    def transitions(
        self,
        hidden_states: torch.Tensor,
        restarts: torch.Tensor | None = None,
        masked: torch.Tensor | None = None,
    ) -> Transitions:
        """Of hidden states (groups, n, hidden). With `masked` (groups, n), the matrices are not made before they are
        used, and only where a column and one before it are masked: elsewhere the states stay as they are."""
        scores = self._project(self.state_proj, hidden_states)
        start = (scores + self.start.float()).softmax(-1)
        weights = self._project(self.kernel_proj, hidden_states[:, 1:])  # no state comes before the first column
        features = nn.functional.pad(weights, (1, 0), value=1.0)
        kernels = torch.cat([self.table[None], self.kernels]).float().flatten(1)  # (1 + kernels, K * K)
        if masked is not None:
            used = masked[:, 1:] & masked.cumsum(-1)[:, :-1].bool()
            columns, groups = used.T.nonzero().unbind(-1)
            parts = scores[groups, columns + 1], features[groups, columns], groups
            columns = zip(*(part.split(used.sum(0).tolist()) for part in parts), strict=True)
            return Transitions(start, [partial(move, kernels, *column) for column in columns], restarts)
        logits = (features.flatten(0, 1) @ kernels).view(*weights.shape[:2], self.num_states, self.num_states)
        return Transitions(start, logits.add_(scores[:, 1:, None]).softmax(-1), restarts)

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
        if logits.shape[-1] <= self.num_candidates:
            return TokenLogProbs.apply(self._gate(hidden_states), self._pairs(), logits.float(), tokens)
        tilted, normaliser, candidates = self._tilted(hidden_states, logits)
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

    def _gate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """1 + e, (positions, rank)."""
        return 1 + self._project(self.tilt_proj, hidden_states)

    def _pairs(self) -> torch.Tensor:
        """U V of each state and token, (rank, K * vocabulary)."""
        return (self.centred_states()[:, None] * self.token_vectors.float()).flatten(0, 1).T

    def _tilted(
        self, hidden_states: torch.Tensor, logits: torch.Tensor, states: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Logits of the candidates in each state (positions, K, candidates), the logarithm of the sum over the whole
        vocabulary (positions, K), and the candidates (positions, candidates), `None` for all tokens. With `states`
        (positions,) K is 1, that state."""
        logits = logits.float()
        gate = self._gate(hidden_states)
        vectors, tokens = self.centred_states(), self.token_vectors.float()
        if logits.shape[-1] <= self.num_candidates:
            if states is None:
                tilts = (gate @ self._pairs()).unflatten(-1, (self.num_states, -1))
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


def move(kernels, scores, features, groups, state: torch.Tensor) -> torch.Tensor:
    """States (groups, K) after a column at which those of some `groups` move: see `Transition`."""
    return state.index_copy(0, groups, Transition.apply(state[groups], scores, features, kernels))


def advance(
    state: torch.Tensor,
    begun: torch.Tensor,
    start: torch.Tensor,
    matrix: torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None,
    restarts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of the states before a column, (groups, K), to those at it; and `begun` (groups, 1) bool, whether
    there is a state before it in its document."""
    if restarts is not None:
        begun = begun & ~restarts[:, None]
    if matrix is None:
        return start, begun
    moved = torch.bmm(state[:, None], matrix)[:, 0] if isinstance(matrix, torch.Tensor) else matrix(state)
    return torch.where(begun, moved, start), begun


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
