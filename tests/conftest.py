"""Shared by the tests: the scripts are imported from the repository, and every test runs in a folder of its own."""
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import seeded_init  # noqa: E402


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Runs and caches land in a temporary folder, and no test starts from another's random state."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=["cpu"] + (["cuda"] if torch.cuda.is_available() else []))
def device(request):
    return torch.device(request.param)


def small_encoder(name: str, init: str, seed: int) -> tuple[nn.Module, int]:
    """Stands in for utils.build_encoder where a test needs a network that learns, but not a ResNet18's time."""
    with seeded_init(seed, "encoder"):
        encoder = nn.Sequential()
        encoder.conv = nn.Conv2d(3, 16, 3, stride=2)
        encoder.bn = nn.BatchNorm2d(16)
        encoder.relu = nn.ReLU()
        encoder.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        encoder.fc = nn.Identity()
    return encoder, 64


@pytest.fixture
def small(monkeypatch):
    """Both scripts train the small encoder."""
    import train_byol
    import train_classifier
    monkeypatch.setattr(train_byol, "build_encoder", small_encoder)
    monkeypatch.setattr(train_classifier, "build_encoder", small_encoder)
