"""Shared by the tests: the scripts are imported from the repository, and every test runs in a folder of its own."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Runs and caches land in a temporary folder, and no test depends on the global random state."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(torch.initial_seed())
    return tmp_path


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=["cpu"] + (["cuda"] if torch.cuda.is_available() else []))
def device(request):
    return torch.device(request.param)
