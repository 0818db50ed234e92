import pytest
import torch

# The tensors are tiny, and the processes of `-n 2` would fight for the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same state of the default generator, whichever tests run before it."""
    torch.manual_seed(0)
