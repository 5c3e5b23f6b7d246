"""CUDA without a GPU: on fake tensors, which have a shape, a type and a device, but no values.

They refuse operations that mix devices, and the host's copies and reads are recorded: those that make it wait for the
GPU have no place in a step. A GPU that is really there is left alone.
"""
import contextlib
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import train_byol
import train_classifier
import utils
from byol import BYOL, build_optimizer
from conftest import HAS_GPU, small_encoder
from data import Split, fetch, place
from encoders import build_encoder
from test_train_byol import rows, tiny, weights  # noqa: F401
from utils import read_constants
from views import CROP_DRAWS, VIEW_DRAWS

aten = torch.ops.aten
CUDA, DTYPES = torch.device("cuda:0"), {"bf16": torch.bfloat16, "fp32": torch.float32}


class Host(TorchDispatchMode):
    """Records what the host does about the GPU.

    waits: what makes it wait, and in which function. sent: shapes of what it sends there without waiting.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.sent, self.pinned = [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._pin_memory.default:
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if func is aten._fused_sgd_.default:  # has no fake kernel
            assert all(x.device == CUDA for x in sum(args[:3], [])), "weights, gradients and momentum"
            return None
        if func is aten._local_scalar_dense.default:
            if args[0].device == CUDA:
                self.wait("read")
            return 0.0 if args[0].is_floating_point() else 0
        result = func(*args, **kwargs)
        if func is aten._to_copy.default:
            self.copy(args[0], result, kwargs.get("non_blocking"))
        elif func is aten.copy_.default:
            self.copy(args[1], args[0], any(args[2:]) or kwargs.get("non_blocking"))
        elif func in (aten.index.Tensor, aten.index_put_.default) and args[0].device == CUDA:
            for index in filter(torch.is_tensor, args[1]):
                # A mask is asked for its nonzeros, unless a single number goes there; `index` itself refuses one here.
                if index.device != CUDA or index.dtype == torch.bool and args[2].numel() > 1:
                    self.wait(f"index {list(index.shape)}")
        return result

    def copy(self, source, target, non_blocking):
        if source.device == target.device:
            return
        if target.device == CUDA and non_blocking and any(torch._C._is_alias_of(source, x) for x in self.pinned):
            self.sent.append(tuple(source.shape))
        else:
            self.wait(f"copy {list(source.shape)}")

    def wait(self, what):
        frame, root = sys._getframe(), Path(utils.__file__).parent
        while frame and Path(frame.f_code.co_filename).parent != root:
            frame = frame.f_back
        self.waits.append(f"{frame.f_code.co_name if frame else 'test'}: {what}")


def backward(loss):
    """Autograd's engine needs a driver. Instead, a gradient for every leaf that the loss comes from."""
    nodes = [loss.grad_fn]
    for node in nodes:  # which grows on the way
        nodes += [n for n, _ in node.next_functions if n and n not in nodes]
        if hasattr(node, "variable"):
            node.variable.grad = torch.zeros_like(node.variable)


def move(network, device, memory_format=None):
    """`nn.Module.to` would turn its parameters into fake ones in place, which torch refuses."""
    for module in network.modules():
        for name, p in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(p.detach().to(device), p.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return network


@pytest.fixture
def cuda(monkeypatch):
    """`with cuda() as host`: there is a GPU inside. Networks are built outside: fake ones cannot be copied."""
    if not torch.backends.cuda.is_built():
        pytest.skip("a torch without CUDA lacks the guards that even fake devices need")
    real = torch.zeros(1)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            real.to(CUDA)
    except RuntimeError:
        pytest.skip("this torch asks for a driver even where tensors are fake, as 2.6 does")
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(nn.Module, "to", move)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)

    @contextlib.contextmanager
    def cuda():
        # Networks come in real. A fallback would compute, on a GPU that is really there.
        with FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False), Host() as host:
            yield host

    return cuda


def images(n, where, monkeypatch):
    """`n` images that `place` has put where the test wants them; "columns" are the host's, stored as STL-10's are."""
    pixels = torch.zeros(n, 3, 24, 24, dtype=torch.uint8)
    pixels = pixels.transpose(2, 3) if where == "columns" else pixels
    free = 2 * pixels.nbytes + (where == "GPU")  # they fit in half of it, by a byte, or do not
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    return place(pixels, CUDA)


def sent_for(where, n, *rest):
    """What is sent for a batch: its images, or their indices where the images are on the GPU; and the rest."""
    return [(n,) if where == "GPU" else (n, 3, 24, 24), *rest]


@pytest.mark.parametrize("network, where, precision", [
    ("small", "GPU", "bf16"), ("small", "GPU", "fp32"), ("small", "host", "bf16"), ("small", "host", "fp32"),
    ("resnet18", "columns", "bf16")])
def test_pretraining_never_waits_for_the_gpu_but_for_a_row(cuda, monkeypatch, network, where, precision):
    """The script's own loop, an epoch of two steps. Losses are counted where they would be read, and images are not
    gathered ahead: torch's modes do not hold in another thread."""
    flags = "--init random --batch-size 8 --image-size 24 --epochs 1 --precision"
    train_byol.resolve(c := read_constants(vars(train_byol), [*flags.split(), precision]))
    model = BYOL(*(small_encoder if network == "small" else build_encoder)(network, "random", 0), 16, 8)
    types, read, state = set(), [], {"step": 0, "losses": [], "rows": []}
    model.predictor[0].register_forward_hook(lambda module, inputs, output: types.add(output.dtype))

    def read_losses(state, losses, model=None):
        assert all(loss.device == CUDA and loss.shape == () for loss in losses)
        read.append(len(losses))
        state["losses"] = [2.0] * len(losses)
        losses.clear()

    monkeypatch.setattr(train_byol, "read_losses", read_losses)
    monkeypatch.setattr(train_byol, "batches", lambda pixels, indices, to: (fetch(pixels, i, to) for i in indices))
    for name in ("save_torch", "write_rows"):
        monkeypatch.setattr(train_byol, name, lambda *args: None)
    with cuda() as host:
        pixels = images(16, where, monkeypatch)
        model = model.to(CUDA, memory_format=torch.channels_last)
        optimizer = build_optimizer(model, 1e-4)
        host.waits.clear()  # the network and the images had to get there
        train_byol.train(c, Path("runs/x"), state, pixels, model, optimizer, None)
    assert types == {DTYPES[precision]} and all(p.grad is not None for p in model.predictor.parameters())
    assert read == [2, 0] and host.waits == ["train: read"], "losses and the spread, for the epoch's row"
    assert host.sent == sent_for(where, 8, (2, 8, VIEW_DRAWS)) * 2, "images, and one copy for both views"


@pytest.mark.parametrize("where, precision", [("GPU", "bf16"), ("GPU", "fp32"), ("host", "bf16"), ("host", "fp32")])
def test_fine_tuning_never_waits_for_the_gpu(cuda, monkeypatch, small, where, precision):
    flags = "--demo --epochs 2 --batch-size 8 --precision"
    c = read_constants(vars(train_classifier), [*flags.split(), precision])
    split, types = Split(torch.zeros(20), torch.zeros(20, dtype=torch.long), ["a", "b", "c"]), set()
    setup = train_classifier.build_setup(c, split, split, torch.device("cpu"), 0)
    setup.network.fc[1].register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    weights = small_encoder("", "random", 0)[0].state_dict()

    def start(*arguments):  # the network and the images are there, and the steps begin
        host.waits.clear()
        return build_optimizer(*arguments)

    monkeypatch.setattr(train_classifier, "build_optimizer", start)
    monkeypatch.setattr(train_classifier.copy, "deepcopy", lambda network: network)  # fake ones cannot be copied
    with cuda() as host:
        network, split = setup.network.to(CUDA), split._replace(pixels=images(20, where, monkeypatch))
        setup = setup._replace(train=split, device=CUDA, network=network, forward=network)
        tuned = train_classifier.fine_tune(setup, weights, torch.arange(16), 0, 0.01, "")
    assert types == {DTYPES[precision]} and tuned.fc.weight.device == CUDA and tuned.fc.weight.grad is not None
    assert host.waits == [] and host.sent == sent_for(where, 8, (8, CROP_DRAWS), (8,)) * 4, "images, crops and labels"


def test_the_monitor_waits_for_batches_from_the_host_and_for_the_features(cuda, monkeypatch):
    encoder, feature_dim = small_encoder("", "random", 0)
    monkeypatch.setattr(evaluate, "fit_logistic", lambda x, *rest: nn.Linear(x.shape[1], 2))  # of the host alone
    with cuda() as host:
        pixels, encoder = images(300, "host", monkeypatch), encoder.to(CUDA)
        host.waits.clear()
        evaluate.monitor(encoder, pixels, torch.zeros(300, dtype=torch.long), 0, CUDA, "bf16")
    copies = [f"extract_features: copy [{n}, 3, 24, 24]" for n in (256, 44)]
    assert host.waits == [*copies, f"monitor: copy [300, {feature_dim}]"] and host.sent == []


def test_auto_takes_the_gpu_its_fast_matrix_products_and_bf16_unless_emulated(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with cuda():
        assert utils.select_device("auto") == CUDA
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.benchmark
    for emulated, precision in ((False, "bf16"), (True, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not emulated)
        assert utils.select_precision("auto", CUDA) == precision


@pytest.mark.parametrize("device, backend, bound_to", [
    ("cuda:1", "nccl", torch.device("cuda:1")), ("cpu", "gloo", None), ("mps", "gloo", None)])
def test_processes_talk_by_what_their_device_has(monkeypatch, device, backend, bound_to):
    """Even a CPU run on a machine with a GPU, where torch would take NCCL."""
    calls = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend=None, *, device_id=None, timeout=None:
                        calls.append((backend, device_id)))
    monkeypatch.delenv("RANK", raising=False)
    assert utils.start_processes(torch.device(device)) == (0, 1) and not calls, "alone there is no group"
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(utils.UserError, match="RANK is set, but not MASTER_ADDR, MASTER_PORT, WORLD_SIZE: unset it"):
        utils.start_processes(torch.device(device))
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    utils.start_processes(torch.device(device))
    assert calls == [(backend, bound_to)]


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
def test_what_a_gpu_records_and_replays_is_the_same_training_and_no_step_waits(tiny, monkeypatch):
    def strict(function, choosing):
        calls = []

        def call(*args):
            calls.append(args)
            torch.cuda.set_sync_debug_mode("error" if len(calls) > choosing else "default")
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return call

    with monkeypatch.context() as patch:
        for name, choosing in (("two_views", 2), ("train_step", 1)):  # the first calls choose kernels
            patch.setattr(train_byol, name, strict(getattr(train_byol, name), choosing))
        assert tiny("--device", "cuda", "--epochs", "4", run="eager") == 0
    monkeypatch.setattr(utils, "MIN_STEPS_TO_COMPILE", 4)
    assert tiny("--device", "cuda", "--epochs", "4", run="replayed") == 0
    for name, value in weights("eager").items():
        torch.testing.assert_close(weights("replayed")[name], value, atol=1e-2, rtol=1e-2)  # in TF32
    for one, other in zip(rows("eager")[1:], rows("replayed")[1:], strict=True):
        assert float(other["loss"]) == pytest.approx(float(one["loss"]), abs=0.03), "of two steps each"
        assert float(other["spread"]) == pytest.approx(float(one["spread"]), rel=0.03)
