import logging

import pytest
import torch
from transformers.utils import logging as transformers_logging

# The tensors are tiny, and the processes of `-n 2` would fight for the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same state of the default generator, whichever tests run before it."""
    torch.manual_seed(0)


class Deprecations(logging.Handler):
    """Keeps what transformers' log says about names that will go away."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        if "deprecated" in (message := record.getMessage()):
            self.messages.append(message)


@pytest.fixture(autouse=True)
def deprecations():
    """A test in which this package uses what transformers is about to remove fails. (So it does where the news comes
    by `warnings`: see pyproject.toml.)"""
    handler, logger = Deprecations(), transformers_logging.get_logger("transformers")
    transformers_logging.warning_once.cache_clear()  # each test is told, not only the first
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    if handler.messages:
        pytest.fail("transformers: " + "; ".join(handler.messages))
