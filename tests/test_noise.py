import math
from itertools import pairwise, permutations

import pytest
import torch
from helpers import digits, pad_row, uniform

from vmd_hf.blocks_vmd import row_positions
from vmd_hf.noise_vmd import (
    corrupt_before_step,
    hashed_noise,
    scored_tokens,
    seeded_noise,
    stratified_uniform,
    training_noise,
)
from vmd_hf.schedule_vmd import most_revealed, num_revealed, step_schedule


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 64])
def test_the_most_that_a_step_reveals(num_steps):
    num_maskable = torch.arange(70)
    row_steps = step_schedule(num_maskable, num_steps)
    revealed = torch.stack([num_revealed(step, num_maskable, row_steps) for step in range(num_steps + 1)])
    assert torch.equal(most_revealed(num_maskable, row_steps), revealed.diff(dim=0).amax(0))


def test_the_schedule_takes_a_number_of_steps_for_each_row():
    num_maskable, num_steps = torch.tensor([5, 5, 0, 2]), torch.tensor([2, 9, 4, 1])
    assert step_schedule(num_maskable, num_steps).tolist() == [2, 5, 0, 1]


def test_steps_after_the_last_reveal_nothing_more():
    num_maskable = torch.tensor([0, 3])
    assert num_revealed(9, num_maskable, step_schedule(num_maskable, 2)).tolist() == [0, 3]


def grid_of_times(objective_steps, n):
    """Numbers in [0, 1) that meet each (T, k) equally often, with T from `objective_steps` and k in 1..min(T, n)."""
    cells = len(objective_steps) * math.lcm(*(max(min(steps, n), 1) for steps in objective_steps))
    return (torch.arange(cells) + 0.5) / cells


def steps_by_hand(order, num_steps):
    """[(positions masked before step k, positions revealed by it)] for positions in the order of revealing."""
    row_steps, n = min(num_steps, len(order)), len(order)
    cuts = [k * n // row_steps for k in range(row_steps + 1)]
    return [(set(order[start:]), set(order[start:end])) for start, end in pairwise(cuts)]


@pytest.mark.parametrize("objective_steps", [[1], [2], [1, 2, 4], [3]])
def test_one_weighted_step_is_unbiased_for_the_sum_over_steps(objective_steps):
    """T_n times the cost of a random step, averaged over times and orders, is the mean over T and orders of the sum.

    The cost of a step is any function of its state: here of which tokens it reveals and how many are masked still.
    """
    value = [0.3, 1.7, 2.9, 5.1]
    orders = list(permutations(range(4)))
    times = grid_of_times(objective_steps, 4)
    noise = torch.empty(len(orders), 4)
    for row, order in enumerate(orders):
        noise[row, list(order)] = torch.tensor([0.2, 0.4, 0.6, 0.8])
    rows = noise.repeat_interleave(len(times), 0)
    corruption = corrupt_before_step(
        torch.ones_like(rows, dtype=torch.bool), times.repeat(len(orders)), rows, objective_steps
    )
    revealed_value = (corruption.revealed * torch.tensor(value)).sum(-1)
    estimate = (corruption.weight * revealed_value * corruption.masked.sum(-1)).mean().item()
    plain_estimate = (corruption.weight * revealed_value).mean().item()

    totals = [
        sum(len(masked) * sum(value[i] for i in revealed) for masked, revealed in steps_by_hand(order, num_steps))
        for num_steps in objective_steps
        for order in orders
    ]
    assert estimate == pytest.approx(sum(totals) / len(totals), rel=1e-5)
    assert plain_estimate == pytest.approx(sum(value), rel=1e-5)  # each token is revealed once


@pytest.mark.parametrize("objective_steps", [[1], [2], [1, 2, 4], [3]])
def test_where_nothing_depends_on_what_is_revealed_the_cost_is_its_mean_over_that(objective_steps):
    """Over all orders that have led to the same masks."""
    value = torch.tensor([0.3, 1.7, 2.9, 5.1])
    orders = torch.tensor(list(permutations(range(4))))
    times = grid_of_times(objective_steps, 4)
    noise = orders.repeat_interleave(len(times), 0) / 4
    state = corrupt_before_step(
        torch.ones_like(noise, dtype=torch.bool), times.repeat(len(orders)), noise, objective_steps
    )
    is_told = torch.arange(len(noise)) % 3 == 0
    tokens, share = scored_tokens(state.masked, state.revealed, is_told)
    cost = share * (tokens * value).sum(-1)
    revealed_cost = (state.revealed * value).sum(-1)
    assert torch.equal(cost[is_told], revealed_cost[is_told])
    for masks in state.masked.unique(dim=0):
        for number in (1, 2, 3, 4):
            same = (state.masked == masks).all(-1) & (state.revealed.sum(-1) == number)
            torch.testing.assert_close(
                cost[same & ~is_told], revealed_cost[same].mean().expand((same & ~is_told).sum())
            )


@pytest.mark.parametrize("objective_steps", [[1], [3], [1, 2, 4], [5, 6, 7, 8, 9]])
def test_times_at_the_edges_pick_the_first_and_the_last_step(objective_steps):
    maskable = torch.ones(3, 12, dtype=torch.bool)
    # The last two: the largest float32 below 1, and 1 itself, which rounding may give.
    times = torch.tensor([0.0, 1 - 2**-24, 1.0])
    corruption = corrupt_before_step(maskable, times, uniform(3, 12), objective_steps)
    first, last = objective_steps[0], objective_steps[-1]
    assert corruption.weight.tolist() == [first, last, last]
    assert corruption.masked.sum(-1).tolist() == [12, 12 - (last - 1) * 12 // last, 12 - (last - 1) * 12 // last]
    assert torch.equal(corruption.revealed[1:], corruption.masked[1:])


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_stratified_numbers_fall_one_in_each_interval(batch_size):
    for _ in range(20):
        numbers = stratified_uniform(batch_size, torch.device("cpu"))
        assert numbers.shape == (batch_size,)
        assert (numbers * batch_size).floor().sort().values.tolist() == list(range(batch_size))


def test_stratified_numbers_come_in_random_order_and_are_uniform_in_their_interval():
    draws = torch.stack([stratified_uniform(4, torch.device("cpu")) for _ in range(4000)])
    interval = (draws * 4).floor()
    # Row i is in interval j in a quarter of the draws: standard error sqrt(3/16/4000) = 0.0068.
    for row in range(4):
        for index in range(4):
            assert (interval[:, row] == index).float().mean().item() == pytest.approx(0.25, abs=5 * 0.0068)
    # Uniform within: mean 1/2, standard error 1/sqrt(12 * 16000) = 0.0023; variance 1/12.
    inside = draws * 4 - interval
    assert inside.mean().item() == pytest.approx(0.5, abs=5 * 0.0023)
    assert inside.var().item() == pytest.approx(1 / 12, rel=0.03)


def parts(noise):
    return noise.times, noise.positions, noise.latents


def plain_hash(rows, latent_size=4):
    return parts(hashed_noise(rows, None, torch.arange(rows.shape[1]).expand_as(rows), (latent_size,)))


def padded_hash(row, length, side, pad_token=11):
    real = pad_row(torch.ones_like(row), length, side, 0) != 0
    noise = hashed_noise(pad_row(row, length, side, pad_token), real, row_positions(real), (4,))
    return noise.times, noise.positions[:, real[0]], noise.latents


def test_hashed_noise_has_shapes_ranges_and_no_state():
    rows = digits(6, 5)
    times, positions, latents = plain_hash(rows)
    assert (times.shape, positions.shape, latents.shape) == ((6,), (6, 5), (6, 4))
    for numbers in (times, positions):
        assert numbers.dtype == torch.float32
        assert 0 <= numbers.min() and numbers.max() < 1
    torch.manual_seed(123)
    for first, second in zip((times, positions, latents), plain_hash(rows), strict=True):
        assert torch.equal(first, second)
    assert plain_hash(rows, latent_size=0)[2].shape == (6, 0)


def test_rows_that_differ_in_a_token_or_in_its_place_have_different_noise():
    base = torch.tensor([3, 1, 4, 1, 5])
    others = [base.clone() for _ in range(5)]
    for position in range(5):
        others[position][position] += 1
    others.append(base.flip(0))  # the same tokens in another order
    others.append(torch.tensor([1, 3, 4, 1, 5]))
    times, positions, latents = plain_hash(torch.stack([base, *others]))
    assert len(set(times.tolist())) == 8
    assert len(set(positions.flatten().tolist())) == 40
    assert len(set(latents.flatten().tolist())) == 32
    # A shorter row is another row, even if what follows is token 0.
    assert padded_hash(base, 6, "right")[0] != plain_hash(torch.cat([base, torch.zeros(1, dtype=torch.long)])[None])[0]


def kolmogorov_smirnov(numbers, cdf):
    """Largest distance between the empirical and the given distribution function, times sqrt(n)."""
    n = numbers.numel()
    expected = cdf(numbers.flatten().double().sort().values)
    steps = torch.arange(n + 1).double() / n
    return max((steps[1:] - expected).max(), (expected - steps[:-1]).max()).item() * math.sqrt(n)


@pytest.fixture(scope="module")
def noise_of_many_rows():
    numbers = torch.arange(10_000)  # neighbours, so that a weak hash would show
    return plain_hash(torch.stack([numbers // 1000, numbers // 100 % 10, numbers // 10 % 10, numbers % 10], dim=-1))


def test_hashed_noise_is_uniform_and_normal(noise_of_many_rows):
    times, positions, latents = noise_of_many_rows
    for numbers in (times, *positions.T):
        # Mean 1/2 and variance 1/12 with standard errors 0.0029 and 0.00075; sqrt(n) D is above 1.95 once in 1,000.
        assert numbers.mean().item() == pytest.approx(0.5, abs=4 * 0.0029)
        assert numbers.var().item() == pytest.approx(1 / 12, abs=4 * 0.00075)
        assert kolmogorov_smirnov(numbers, lambda x: x) < 1.95
    for numbers in latents.T:
        # Mean 0 and variance 1 with standard errors 0.01 and 0.0141.
        assert numbers.mean().item() == pytest.approx(0, abs=4 * 0.01)
        assert numbers.var().item() == pytest.approx(1, abs=4 * 0.0141)
        assert kolmogorov_smirnov(numbers, torch.special.ndtr) < 1.95


def test_hashed_noise_streams_are_uncorrelated(noise_of_many_rows):
    times, positions, latents = noise_of_many_rows
    correlation = torch.corrcoef(torch.cat([times[:, None], positions, latents], dim=1).T)
    off_diagonal = correlation - torch.eye(9)
    assert off_diagonal.abs().max() < 5 * 0.01  # standard error 1/sqrt(10,000)


def test_hashed_normal_noise_is_finite_for_the_largest_uniform():
    # Found by search: the uniform number behind dimension 53 of this row is 1 - 2^-24, the largest there is.
    row = torch.tensor([[9, 1, 2, 0, 6, 3]])
    latents = plain_hash(row, latent_size=64)[2]
    assert latents.isfinite().all()
    assert latents.abs().max() < 6  # ndtri(1 - 2^-25) is 5.4


# --- noise from seeds ------------------------------------------------------------------------------------------------


def from_seeds(seeds, length=5, num_blocks=1, latent_size=4):
    position_ids = torch.arange(length * num_blocks).view(num_blocks, length).expand(len(seeds), -1, -1)
    noise = seeded_noise(torch.as_tensor(seeds), position_ids >= 0, position_ids, (latent_size,))
    return [part.flatten(0, 1) for part in parts(noise)]  # every block a row of its own


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_seeded_noise_depends_on_the_row_alone(num_blocks):
    seeds = [7, 2**62 + 5, 0, 12]
    together = from_seeds(seeds, num_blocks=num_blocks)
    for index, seed in enumerate(seeds):
        times, positions, latents = from_seeds([seed], num_blocks=num_blocks)
        rows = slice(index * num_blocks, (index + 1) * num_blocks)
        for part, alone in zip(together, (times, positions, latents), strict=True):
            assert torch.equal(part[rows], alone)
    fewer = from_seeds(seeds[:1], num_blocks=1)
    for part, alone in zip(together, fewer, strict=True):
        assert torch.equal(part[:1], alone)
    assert all(len(part.unique()) == part.numel() for part in together)


@pytest.mark.parametrize("first_seed", [0, 2**61 + 12345])
def test_times_of_consecutive_seeds_are_spread_evenly_and_so_are_those_of_any_part(first_seed):
    times = from_seeds(range(first_seed, first_seed + 256))[0]
    for start, size in ((0, 256), (0, 128), (128, 128), (77, 32), (200, 8)):
        part = times[start : start + size].double().sort().values
        # One in each of `size` intervals is at most 1 / size from uniform, independent ones about 0.87 / sqrt(size).
        grid = torch.arange(size + 1) / size
        distance = max((grid[1:] - part).max().item(), (part - grid[:-1]).max().item())
        assert distance < 3 / size
    assert times.min() >= 0 and times.max() < 1


def test_seeded_noise_is_uniform_and_normal_and_uncorrelated():
    times, positions, latents = from_seeds(range(2**40, 2**40 + 10_000))
    for numbers in positions.T:
        assert kolmogorov_smirnov(numbers, lambda x: x) < 1.95
    for numbers in latents.T:
        assert kolmogorov_smirnov(numbers, torch.special.ndtr) < 1.95
    correlation = torch.corrcoef(torch.cat([times[:, None], positions, latents], dim=1).T)
    assert (correlation - torch.eye(10)).abs().max() < 5 * 0.01
    # And rows that follow one another are:
    for numbers in (*positions.T, *latents.T):
        assert torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1].abs() < 5 * 0.01


def test_processes_of_data_parallel_draw_noise_of_their_own(monkeypatch):
    """The Trainer seeds them all alike. Their times are stratified together."""
    maskable = torch.ones(8, 2, 5, dtype=torch.bool)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    of_ranks = []
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        of_ranks.append(parts(training_noise(maskable, (3,))))
    times, positions, latents = (torch.cat(part) for part in zip(*of_ranks, strict=True))
    assert (times.shape, positions.shape, latents.shape) == ((32, 2), (32, 2, 5), (32, 2, 3))
    assert all(len(part.unique()) == part.numel() for part in (times, positions, latents))
    grid, of_first_blocks = torch.arange(33) / 32, times[:, 0].sort().values
    assert max((grid[1:] - of_first_blocks).max(), (of_first_blocks - grid[:-1]).max()) < 3 / 32
    assert not torch.equal(training_noise(maskable, (3,)).times, of_ranks[-1][0])  # a step later
