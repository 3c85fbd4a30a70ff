"""What every test gets: a device, a seed, and uninitialised memory that shows."""

import gc
import os
import sys
import warnings

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything decorates a kernel: Triton reads it then, and only then
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

settings.register_profile("suite", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("suite")
torch.set_num_threads(1)  # nothing here is large; threads only cost where other programs run too


def pytest_collection_finish() -> None:
    """Leave what was imported and collected, a million objects, out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_state_of_accelerate():
    """It keeps what one Trainer or Accelerator set, gradient accumulation say, for all that follow in the process."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """Every `torch.empty`, `new_empty` and `empty_like`, in C++ too, comes back full of NaN or of the largest int."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
