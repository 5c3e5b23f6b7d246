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

import byol
import train_byol
import train_classifier
import utils
from byol import BYOL, CROP_DRAWS, VIEW_DRAWS
from conftest import small_encoder
from data import Split, fetch, place
from utils import build_encoder, build_optimizer, extract_features, knn_predict, read_constants, resolve_auto

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
PRECISIONS = pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
PLACES = pytest.mark.parametrize("where", ["GPU", "host"])  # of the images


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
        if func is aten._local_scalar_dense.default and args[0].device == CUDA:
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
        frame, root = sys._getframe(), Path(byol.__file__).parent
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
    """`n` images that `place` has put where the test wants them; "host, by columns" as STL-10 stores them."""
    pixels = torch.zeros(n, 3, 24, 24, dtype=torch.uint8)
    if where == "host, by columns":
        pixels = pixels.transpose(2, 3)
    free = 2 * pixels.nbytes + (where == "GPU")  # they fit in half of it, by a byte, or do not
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    return place(pixels, CUDA)


def batch_of(n, where):
    """The shape of what is sent for a batch: its indices where the images are on the GPU."""
    return (n,) if where == "GPU" else (n, 3, 24, 24)


def pretraining_steps(cuda, monkeypatch, encoder, where, optimizer, precision):
    """Two steps of train_byol's loop; what the host did in them, and in which type the networks calculated."""
    model, types = BYOL(*encoder, 16, 8), set()
    model.predictor[0].register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    with cuda() as host:
        pixels = images(16, where, monkeypatch)
        model = model.to(CUDA, memory_format=torch.channels_last)
        optimizer = build_optimizer(model, optimizer, 0.1, 1e-4)
        host.waits.clear()  # the network and the images had to get there
        for index in torch.arange(16).split(8):
            views = byol.two_views(fetch(pixels, index, CUDA), 24, torch.Generator().manual_seed(0))
            loss = train_byol.train_step(model, model, optimizer, views, 0.1, 0.9, precision)
    assert loss.device == CUDA and loss.shape == () and all(p.grad is not None for p in model.predictor.parameters())
    return host, types


@PRECISIONS
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@PLACES
def test_a_pretraining_step_never_waits_for_the_gpu(cuda, monkeypatch, where, optimizer, precision):
    host, types = pretraining_steps(cuda, monkeypatch, small_encoder("", "random", 0), where, optimizer, precision)
    assert host.waits == []
    assert types == {precision}
    assert host.sent == [batch_of(8, where), (2, 8, VIEW_DRAWS)] * 2, "a step: images, and one copy for both views"


def test_nor_does_one_of_a_resnet_on_images_stored_by_columns(cuda, monkeypatch):
    encoder = build_encoder("resnet18", "random", 0)
    host, _ = pretraining_steps(cuda, monkeypatch, encoder, "host, by columns", "sgd", torch.bfloat16)
    assert host.waits == []
    assert host.sent == [(8, 3, 24, 24), (2, 8, VIEW_DRAWS)] * 2


@PRECISIONS
@PLACES
def test_features_and_knn_wait_for_batches_from_the_host_and_nothing_else(cuda, monkeypatch, where, precision):
    encoder, feature_dim = small_encoder("", "random", 0)
    with cuda() as host:
        pixels = images(20, where, monkeypatch)
        encoder = encoder.to(CUDA, memory_format=torch.channels_last)
        host.waits.clear()
        features = extract_features(encoder, pixels, CUDA, precision, batch_size=8)
        assert features.device == CUDA and features.shape == (20, feature_dim) and features.dtype == torch.float32
        copies = [f"extract_features: copy [{n}, 3, 24, 24]" for n in (8, 8, 4)]
        assert host.waits == ([] if where == "GPU" else copies)
        host.waits.clear()
        labels = torch.zeros(12, dtype=torch.long, device=CUDA)
        predicted = knn_predict(features[:12], labels, features[12:], 3)
        assert predicted.device == CUDA and predicted.shape == (8,)
        assert host.waits == []
    assert host.sent == []


@PLACES
def test_the_monitor_waits_for_the_features_alone(cuda, monkeypatch, where):
    encoder, feature_dim = small_encoder("", "random", 0)
    with cuda() as host:
        train = Split(images(20, where, monkeypatch), torch.zeros(20, dtype=torch.long), ["a", "b"])
        encoder = encoder.to(CUDA)
        host.waits.clear()
        monkeypatch.setattr(train_byol, "fit_logistic", lambda x, *rest: nn.Linear(x.shape[1], 2))  # of the host alone
        train_byol.monitor(encoder, train, 0, CUDA, torch.bfloat16)
    copies = [] if where == "GPU" else ["extract_features: copy [20, 3, 24, 24]"]
    assert host.waits == copies + [f"monitor: copy [20, {feature_dim}]"]
    assert host.sent == []


@PRECISIONS
@PLACES
def test_a_fine_tuning_step_never_waits_for_the_gpu(cuda, monkeypatch, where, precision):
    c = read_constants(vars(train_classifier), ["--demo", "--epochs", "2", "--batch-size", "8"])
    resolve_auto(c, train_classifier.AUTO)
    encoder, feature_dim = small_encoder("", "random", 0)

    def start(*arguments):  # the network and the images are there, and the steps begin
        host.waits.clear()
        return build_optimizer(*arguments)

    monkeypatch.setattr(train_classifier, "build_optimizer", start)
    with cuda() as host:
        train = Split(images(20, where, monkeypatch), torch.zeros(20, dtype=torch.long), ["a", "b", "c"])
        task = train_classifier.Task(c, train, None, CUDA, precision, [], train_classifier.Trainee())
        network = train_classifier.fine_tune(task, encoder, feature_dim, torch.arange(16), 0, 0.01)
    assert network.fc.weight.device == CUDA and network.fc.weight.grad is not None
    assert host.waits == []
    assert host.sent == [batch_of(8, where), (8, CROP_DRAWS), (8,)] * 4, "for each step images, crops and labels"


def test_auto_takes_the_gpu_its_fast_matrix_products_and_bf16_unless_emulated(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with cuda():
        assert utils.select_device("auto") == CUDA
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.benchmark
    assert utils.select_precision("auto", CUDA) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert utils.select_precision("auto", CUDA) == torch.float32


@pytest.mark.parametrize("device, backend, bound_to", [
    ("cuda:1", "nccl", torch.device("cuda:1")), ("cpu", "gloo", None), ("mps", "gloo", None)])
def test_processes_talk_by_what_their_device_has(monkeypatch, device, backend, bound_to):
    """Even a CPU run on a machine with a GPU, where torch would take NCCL."""
    calls = []

    def init_process_group(backend=None, *, device_id=None, timeout=None):
        calls.append((backend, device_id))

    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.delenv("RANK", raising=False)
    assert utils.start_processes(torch.device(device)) == (0, 1) and not calls, "alone there is no group"
    monkeypatch.setenv("RANK", "0")
    utils.start_processes(torch.device(device))
    assert calls == [(backend, bound_to)]
