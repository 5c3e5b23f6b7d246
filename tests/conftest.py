"""Shared by the tests: the scripts are imported from the repository, and every test runs in a folder of its own.

No result depends on the machine: tests state device and precision. Where one forgets, TEST_BF16 shows it: with 0 or 1
`auto` finds a CPU without or with bf16, in every process that imports this file, so that the tests run as on either
kind; with 0 it is one without AVX512, too.
"""
import os
import signal
from pathlib import Path
from typing import Callable

import pytest
import torch
from torch import nn

import encoders
import evaluate
import plots
import utils

signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs start with Ctrl-C ignored
os.environ["OMP_NUM_THREADS"] = "1"  # several tests run side by side: see pytest.ini
torch.set_num_threads(1)

TEST_BF16, has_native_bf16 = os.environ.get("TEST_BF16"), utils.has_native_bf16
if TEST_BF16 is not None:
    if TEST_BF16 not in ("0", "1"):
        raise ValueError(f"TEST_BF16 is {TEST_BF16!r}: it must be 0 or 1, or not be set")
    utils.has_native_bf16 = lambda device: TEST_BF16 == "1" if device.type == "cpu" else has_native_bf16(device)
    if TEST_BF16 == "0":
        torch.backends.cpu.get_cpu_capability = lambda: "AVX2"

HAS_GPU = torch.cuda.is_available() and torch.cuda.device_count() > 0  # a stand-in may replace the first
save_figure = plots.save_figure


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Runs and caches land in a temporary folder, and no test starts from another's random state or settings."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # what a run on a GPU changes
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # comparisons on a GPU mean fp32
    return tmp_path


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=["cpu"] + ["cuda"] * HAS_GPU)
def device(request):
    return torch.device(request.param)


def small_encoder(name: str, init: str, seed: int, stem: str = "7x7") -> tuple[nn.Module, int]:
    """Stands in for encoders.build_encoder where a test needs a network that learns, but not a ResNet18's time."""
    with utils.seeded_init(seed, "encoder"):
        encoder = nn.Sequential()
        encoder.conv = encoders.Convolution(3, 16, 3, stride=2)
        encoder.bn = nn.BatchNorm2d(16)
        encoder.relu = nn.ReLU()
        encoder.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        encoder.fc = nn.Identity()
    if Path(init).is_file():
        encoder.load_state_dict(torch.load(init, weights_only=True))
    return encoder, 64


def use_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both scripts train the small encoder, probe with one penalty, and write their figures undrawn: to draw one takes
    longer than to train it."""
    for script in ("train_byol", "train_classifier"):
        monkeypatch.setattr(f"{script}.build_encoder", small_encoder)
    monkeypatch.setattr(evaluate, "PROBE_PENALTIES", evaluate.PROBE_PENALTIES[-1:])
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: utils.write_json(path, "undrawn"))


@pytest.fixture
def small(monkeypatch):
    use_small(monkeypatch)


@pytest.fixture
def drawn(small, monkeypatch):
    """As `small`, with the figures drawn."""
    monkeypatch.setattr(plots, "save_figure", save_figure)


def trace_compiled(monkeypatch: pytest.MonkeyPatch) -> list[Callable]:
    """From here on compilation works on every device, as far as one graph of eager steps. Returns what is compiled."""
    compiled, compile = [], torch.compile

    def traced(function, mode, dynamic):
        compiled.append(function)
        return compile(function, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: HAS_GPU)  # it saves the GPU's random state
    monkeypatch.setattr(utils, "can_compile", lambda device: True)
    return compiled
