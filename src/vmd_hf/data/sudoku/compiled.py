"""Functions that numba compiles, and the random numbers that they draw.

Numba is an extra: pip install vmd_hf[sudoku]. It compiles a kernel once more for each literal that it is called with;
`np.int64(1)` is none.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np


class Kernel:
    """A function that numba compiles when it is first called, so that importing this file does not need numba.

    Other kernels may call it: numba asks a global for its `_numba_type_`. The compiled code is kept until the file of
    the kernel changes; whoever changes one that kernels in other files call must delete `__pycache__`.
    """

    def __init__(self, function: Callable):
        self._function = function

    @cached_property
    def _compiled(self) -> Callable:
        try:
            from numba import njit
        except ImportError as error:
            raise ImportError(
                "Sudoku's solver, generator and canonical form need the package numba: pip install vmd_hf[sudoku]"
            ) from error
        try:
            return njit(cache=True, nogil=True)(self._function)
        except RuntimeError:  # neither this folder nor the user's can be written, to keep the compiled code in
            return njit(nogil=True)(self._function)

    @property
    def _numba_type_(self):
        return self._compiled._numba_type_

    def __call__(self, *args):
        return self._compiled(*args)


@Kernel
def mix(value):
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection that scatters 64 bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@Kernel
def random_below(state, bound):
    """A random integer in 0..bound - 1 by SplitMix64, whose state is the only entry of `state`."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    return np.int64(((mix(state[0]) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@Kernel
def shuffle(items, state):
    for last in range(len(items) - 1, 0, -1):
        other = random_below(state, last + 1)
        items[last], items[other] = items[other], items[last]


@Kernel
def _start_streams(seed, states):
    for index in range(len(states)):
        states[index] = mix(seed ^ mix(states[index] + np.uint64(1)))


def stream_states(num_boards: int, name: str, seed: int, start: int) -> np.ndarray:
    """(num_boards,) uint64: the state that the random numbers of each board begin with."""
    for argument, value, lowest in ((name, num_boards, 1), ("seed", seed, 0), ("start", start, 0)):
        if value < lowest:
            raise ValueError(f"`{argument}` must be {lowest} or more, got {value}")
    states = np.arange(start, start + num_boards, dtype=np.uint64)
    _start_streams(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0], states)
    return states
