import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same state of the default generator, whichever tests run before it."""
    torch.manual_seed(0)
