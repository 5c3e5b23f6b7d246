"""What both scripts share: constants and flags, randomness, encoders, kNN, files that are whole or absent."""
import importlib.util
import json
import math
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from matplotlib.axes import Axes
from torch import nn

import train_byol
import train_classifier
import runs
import utils
from plots import plot_curves
from runs import Metrics, run_folder, save_torch, whole_file
from utils import (UsageError, UserError, build_encoder, can_compile, check_ranges, choose_threads, extract_features,
                   knn_predict, load_encoder, plain_state_dict, read_constants, seeded_generator, seeded_init,
                   select_device, select_precision)


def constants(*argv, script=train_byol):
    return read_constants(vars(script), list(argv))


# --------------------------------------------------------------------------------------------- constants and flags

@pytest.mark.parametrize("script", [train_byol, train_classifier])
def test_every_constant_is_a_flag_with_its_comment_and_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        constants("--help", script=script)
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    values = vars(constants(script=script))
    names = [name for name in values if name.isupper()]
    assert {"DATASET", "RUN", "EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "DEVICE", "INIT", "ENCODER"} <= set(names)
    assert not {"DEMO", "FREE", "COLUMNS", "PROTOCOLS"} & set(names)
    for name in names:
        assert values[name] == getattr(script, name)
        default = ",".join(map(str, values[name])) if isinstance(values[name], tuple) else str(values[name])
        usage = f"{utils.flag(name)} " + (f", --no-{name.lower()} " if isinstance(values[name], bool) else "VALUE ").lstrip()
        usage = usage.replace(" ,", ",")
        help_text = shown[shown.index(usage):].removeprefix(usage)
        comment, bracket, rest = help_text.partition(f" [{default}]")
        assert bracket and len(comment) > 10 and " --" not in comment, name


def test_flags_win_over_the_demo_and_the_demo_over_the_constants():
    assert constants().DATASET == "stl10" and constants("--demo").DATASET == "patterns"
    c = constants("--demo", "--epochs", "7", "--warmup-epochs=0.5")
    assert (c.EPOCHS, c.WARMUP_EPOCHS, c.RUN) == (7, 0.5, "demo") and c.given == {"EPOCHS", "WARMUP_EPOCHS"}
    c = constants("--seeds", "4,5", "--labels-per-class", "7,all", "--folds", script=train_classifier)
    assert (c.SEEDS, c.LABELS_PER_CLASS, c.FOLDS) == ((4, 5), (7, "all"), True)
    assert constants("--blur-p", "0.5,0").BLUR_P == (0.5, 0.0)


def test_both_demos_agree_on_the_data_and_the_run():
    a, b = (constants("--demo", script=script) for script in (train_byol, train_classifier))
    assert all(getattr(a, name) == getattr(b, name) for name in ("DATASET", "IMAGE_SIZE", "INIT", "RUN", "ENCODER"))


@pytest.mark.parametrize("argv, message", [
    (["--batchsize", "3"], "unknown flag --batchsize: did you mean --batch-size?"), (["--xyzzy"], "see --help"),
    (["--epochs", "many"], "--epochs.*invalid int value: 'many'"), (["--warmup-epochs", "fast"], "invalid float value"),
    (["--epochs"], "expected one argument"), (["stray"], "unknown flag stray")])
def test_wrong_flags_are_named(argv, message):
    with pytest.raises(UsageError, match=message):
        constants(*argv)


@pytest.mark.parametrize("default, text, value", [((10, "all"), "10,all", (10, "all")), (("all", 10), "10", (10,)),
                                                  (("all",), "all", ("all",)), ((0.5,), "1,2", (1.0, 2.0))])
def test_several_values_are_of_their_defaults_type_whatever_stands_first(default, text, value):
    assert utils.parser_of(default)(text) == value


def test_a_list_may_stand_where_there_is_a_tuple():
    script = vars(train_classifier) | {"SEEDS": [4, 5], "LABELS_PER_CLASS": ["all"]}
    c = read_constants(script, ["--labels-per-class", "10"])
    assert (c.SEEDS, c.LABELS_PER_CLASS) == ((4, 5), (10,)) and read_constants(script, []).LABELS_PER_CLASS == ("all",)


def test_a_single_value_may_stand_where_there_are_several():
    c = SimpleNamespace(SEEDS=3, RATES=(1, 2))
    utils.make_tuples(c, "SEEDS", "RATES")
    assert (c.SEEDS, c.RATES) == ((3,), (1, 2))


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_values_out_of_range_are_named(value):
    with pytest.raises(UsageError, match="RATE is .*--rate"):
        check_ranges(SimpleNamespace(RATE=value), RATE=(0.5, math.inf))


def test_a_user_error_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    def fail(error):
        def run(c):
            raise error
        return utils.run_script(vars(train_byol) | {"run": run}, [])

    assert fail(UserError("the disk is full")) == 1 and fail(UsageError("no such flag")) == 2
    assert capsys.readouterr().err == "error: the disk is full\nerror: no such flag\n"
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "/tmp/x", ".."])
def test_a_run_name_cannot_leave_the_runs_folder(name):
    with pytest.raises(UsageError, match="no run name"):
        run_folder(name)


# ------------------------------------------------------------------------------------------ randomness and hardware

def test_generators_depend_on_seed_and_purpose_alone():
    def draw(*key):
        return torch.rand(4, generator=seeded_generator(*key)).tolist()

    assert draw(0, "views", 3, 0) == draw(0, "views", 3, 0)
    keys = [(0, "views", 3, 0), (1, "views", 3, 0), (0, "order", 3, 0), (0, "views", 4, 0), (0, "views", 3, 1)]
    assert len({tuple(draw(*key)) for key in keys}) == 5


def test_seeded_init_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    with seeded_init(0, "x"):
        first = nn.Linear(3, 3).weight
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    with seeded_init(0, "x"):
        assert torch.equal(nn.Linear(3, 3).weight, first)


def test_a_device_that_is_not_there_is_named():
    for name in (f"cuda:{torch.cuda.device_count()}", "quantum"):
        with pytest.raises(UserError, match=f"DEVICE '{name}'"):
            select_device(name)
    assert select_device("cpu").type == "cpu"


def test_a_gpu_is_chosen_by_its_number(monkeypatch):
    """As CUDA wants it: its own question for the index is asked, without a GPU."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.cuda._utils._get_device_index(device)))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert select_device("auto") == select_device("cuda") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert select_device("auto") == torch.device("cuda:3") and select_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [0, 0, 3, 1]


def test_compilation_needs_its_tools(monkeypatch, tmp_path):
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "clang" else None)
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: tmp_path)
    assert not can_compile(cuda)
    (tmp_path / "Python.h").touch()
    assert can_compile(cuda) and not can_compile(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not can_compile(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not can_compile(cuda)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is told")
def test_the_memory_of_freed_tensors_is_used_again():
    """In a process of its own, since the heap of this one has holes that other tests left."""
    script = """
import ctypes, resource, torch, utils
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of one size, whatever the kernel would merge
utils.keep_freed_memory()
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.zeros(mebibytes << 20, dtype=torch.uint8) for mebibytes in (40, 1, 3, 9, 33, 17, 5)]
    del kept
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(utils.__file__).parent, capture_output=True, text=True,
                          check=True)
    faults = [int(line) for line in done.stdout.split()]
    pages = (108 << 20) // mmap.PAGESIZE
    assert faults[0] > 0.7 * pages, "nearly all are new at first"
    # It may still grow by a block in a later round, where the others have come to lie otherwise.
    assert statistics.median(faults[1:]) == 0, f"once the heap has its size, no page is new: {faults}"


@pytest.fixture
def two_threads(monkeypatch):
    """A machine of two cores, in a shell where OMP_NUM_THREADS is not set; the number of threads is left as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("free, begun_with, threads, words", [
    (2, None, 2, " with 2 threads"),
    (1, None, 1, " with 1 thread of 2: the cores are busy (OMP_NUM_THREADS=N sets N)"),
    (8, None, 2, " with 2 threads"), (1, 2, 2, " with 2 threads"), (2, 64, 2, " with 2 threads"),
    (2, 1, 1, " with 1 thread of 2: as the run was begun (OMP_NUM_THREADS=N sets N)")])
def test_as_many_threads_as_cores_are_free_or_as_the_run_has_had(two_threads, monkeypatch, free, begun_with, threads,
                                                                 words):
    monkeypatch.setattr(utils, "free_cores", lambda: free)
    assert choose_threads(torch.device("cpu"), begun_with) == words and torch.get_num_threads() == threads


def test_the_users_number_of_threads_stays(two_threads, monkeypatch):
    monkeypatch.setattr(utils, "free_cores", lambda: 1)
    assert choose_threads(torch.device("cuda:0")) == "", "those of the host matter little to a GPU"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert choose_threads(torch.device("cpu"), 1) == " with 2 threads" and torch.get_num_threads() == 2


@pytest.mark.parametrize("ticks, niceness, quota, free", [  # user, nice, idle, waiting, irq, steal
    ((0, 0, 100, 0, 0, 0), 0, None, 2), ((93, 0, 0, 0, 0, 0), 0, None, 1), ((60, 0, 33, 0, 0, 0), 0, None, 1),
    ((10, 0, 83, 0, 0, 0), 0, None, 2), ((0, 0, 0, 93, 0, 0), 0, None, 2), ((0, 0, 0, 0, 10, 60), 0, None, 1),
    ((0, 0, 0, 0, 60, 10), 0, None, 1),
    ((0, 93, 0, 0, 0, 0), 0, None, 2), ((0, 93, 0, 0, 0, 0), 10, None, 1), ((0, 0, 0, 0, 0, 0), 0, None, 2),
    ((0, 0, 93, 0, 0, 0), 0, "100000 100000", 1), ((0, 0, 93, 0, 0, 0), 0, "max 100000", 2)])
def test_free_cores_are_those_that_the_kernel_does_not_see_busy(monkeypatch, ticks, niceness, quota, free):
    """During one second each of two cores spends these ticks, of 100, and 7 on the system; a third core is not ours.

    Some containers are shown nothing but zeros: then all are free.
    """
    clock, read = [0.0], Path.read_text
    user, nice, idle, waiting, irq, steal = ticks
    system = 7 if sum(ticks) else 0

    def files(path):
        if str(path) == "/proc/stat":
            fields = (user, nice, system, idle, waiting, irq, 0, steal, 0, 0)
            core = " ".join(str(round(clock[0] * field)) for field in fields)
            other = f"{clock[0] * 100:.0f} 0 0 0 0 0 0 0 0 0"
            return f"cpu  {other}\ncpu0 {core}\ncpu1 {core}\ncpu2 {other}\nintr 5\n"
        if str(path) == "/sys/fs/cgroup/cpu.max":
            if quota is None:
                raise FileNotFoundError(path)
            return quota + "\n"
        return read(path)

    monkeypatch.setattr(Path, "read_text", files)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(utils.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(utils.os, "sysconf", lambda name: 100, raising=False)
    monkeypatch.setattr(utils.os, "nice", lambda increment: niceness, raising=False)
    monkeypatch.setattr(utils.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(utils.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    assert utils.free_cores(seconds=1.0) == free


def test_without_the_kernels_count_all_cores_are_free(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert utils.free_cores() == utils.os.cpu_count()
    monkeypatch.setattr(utils.os, "cpu_count", lambda: None)
    assert utils.free_cores() == 1


def test_bf16_is_chosen_only_where_the_hardware_has_it(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(utils, "has_native_bf16", lambda device: native)
        assert select_precision("auto", torch.device("cpu")) == (torch.bfloat16 if native else torch.float32)
    assert select_precision("bf16", torch.device("cpu")) == torch.bfloat16, "the constant overrides it"


@pytest.mark.parametrize("answer, printed", [("0", "torch.float32 False"), ("1", "torch.bfloat16 False"), ("yes", "")])
def test_the_tests_can_run_as_on_a_processor_of_the_other_kind(answer, printed):
    """In the processes that they start, too. Devices other than CPUs answer for themselves."""
    script = ("import torch, conftest, utils\n"
              "print(utils.select_precision('auto', torch.device('cpu')), utils.has_native_bf16(torch.device('meta')))")
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, env=os.environ | {"TEST_BF16": answer},
                          capture_output=True, text=True)
    assert done.stdout.strip() == printed, done.stderr
    assert ("TEST_BF16 is 'yes': it must be 0 or 1" in done.stderr) == (answer == "yes")


# -------------------------------------------------------------------------------------------------------- encoders

def test_students_t():
    for freedom, t in ((1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814), (999, 1.96234), (7999, 1.96026)):
        assert utils.t_quantile(0.975, freedom) == pytest.approx(t, rel=1e-4)


@pytest.mark.parametrize("of_seed", [0.0, 0.3])  # how much a network differs from seed to seed
@pytest.mark.parametrize("repetitions", [1, 3])
def test_intervals_of_two_equal_arms_hold_0_in_95_percent_of_cases(generator, repetitions, of_seed):
    """Seeds and images are drawn anew in every case; a single seed's interval promises nothing of other seeds."""
    cases, images, holds = 400, 400, 0
    for _ in range(cases):
        difficulty = torch.randn(images, generator=generator)  # what both arms find hard
        arms = [difficulty + of_seed * (repetitions > 1) * torch.randn(repetitions, 1, generator=generator)
                + 0.3 * torch.randn(images, generator=generator)  # what this arm finds hard
                + 0.7 * torch.randn(repetitions, images, generator=generator) for _ in range(2)]
        gain, half = utils.gain_of((arms[1] > 0).double() - (arms[0] > 0).double())
        holds += abs(gain) <= half
    assert abs(holds / cases - 0.95) < 3 * math.sqrt(0.95 * 0.05 / cases)


def test_an_interval_is_of_the_mean_gain_and_that_of_one_repetition_is_students():
    gains = torch.tensor([1.0, 0, 0, -1, 1, 0, 0, 0, 0, 1])
    mean, half = utils.gain_of(gains)
    assert (mean, half) == (pytest.approx(20), pytest.approx(2.26216 * 100 * gains.std().item() / math.sqrt(10), rel=1e-4))
    same = gains.expand(3, -1)  # seeds that agree on every image add nothing
    assert utils.gain_of(same) == (pytest.approx(mean), pytest.approx(half))
    shifted = torch.tensor([0.0, 1, -1])[:, None].expand(3, 10)  # images that agree in every seed add nothing
    assert utils.gain_of(shifted) == (pytest.approx(0), pytest.approx(4.30265 * 100 / math.sqrt(3), rel=1e-4))
    assert [utils.verdict_of(*x) for x in ((2, 1), (-2, 1), (1, 2), (0, 0), (0, math.nan))] == [
        "gained", "LOST", "cannot tell", "cannot tell", "cannot tell"]


def test_encoder_is_torchvisions_without_the_classifier():
    encoder, feature_dim = build_encoder("resnet18", "random", seed=3)
    assert feature_dim == 512 and encoder.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    again, _ = build_encoder("resnet18", "random", seed=3)
    other, _ = build_encoder("resnet18", "random", seed=4)
    assert torch.equal(encoder.conv1.weight, again.conv1.weight)
    assert not torch.equal(encoder.conv1.weight, other.conv1.weight)


def test_encoder_from_a_weights_file_with_or_without_classifier(tmp_path):
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "full.pt")
    torch.save({k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}, tmp_path / "bare.pt")
    for name in ("full.pt", "bare.pt"):
        encoder, _ = build_encoder("resnet18", str(tmp_path / name), seed=0)
        assert all(torch.equal(encoder.state_dict()[k], network.state_dict()[k]) for k in encoder.state_dict())


@pytest.mark.parametrize("size, kernel, stride, padding", [(1, 3, 1, 1), (2, 3, 2, 1), (4, 3, 1, 1), (3, 3, 2, 1), (4, 1, 2, 0),
                                                           (4, (3, 1), (1, 2), (1, 0)), (4, (1, 3), (2, 1), (0, 1))])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_convolution_of_small_maps_has_torchs_gradients(size, kernel, stride, padding, memory_format, generator):
    with seeded_init(0, "convolution"):
        ours, torchs = (cls(4, 6, kernel, stride, padding, bias=False) for cls in (utils.Convolution, nn.Conv2d))
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(3, 4, size, size, generator=generator, dtype=torch.float64)
    results = []
    for convolution in (ours, torchs):
        convolution.to(torch.float64, memory_format=memory_format)
        of = x.clone(memory_format=memory_format).requires_grad_()  # a leaf of its own, with a gradient of its own
        y = convolution(of)
        (y.square() * torch.arange(y.numel()).view_as(y)).sum().backward()  # no two places alike
        results.append((y, of.grad, convolution.weight.grad))
        assert ("SmallMaps" in y.grad_fn.name()) == (convolution is ours)
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs)


def test_a_convolution_of_small_maps_has_torchs_gradients_in_bf16(generator):
    with seeded_init(0, "convolution"):
        ours, torchs = (cls(64, 32, 3, 1, 1, bias=False) for cls in (utils.Convolution, nn.Conv2d))
    ours.load_state_dict(torchs.state_dict())
    x, scale = torch.randn(16, 64, 2, 2, generator=generator), torch.randn(16, 32, 2, 2, generator=generator)
    results = []
    for convolution in (ours, torchs):
        of = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = convolution(of)
        assert y.dtype == torch.bfloat16
        (y * scale).sum().backward()
        results.append((y, of.grad, convolution.weight.grad))
        assert ("SmallMaps" in y.grad_fn.name()) == (convolution is ours)
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, atol=0.02 * theirs.std().item(), rtol=0.02)


@pytest.mark.parametrize("where, precision, capability, ours", [
    ("cpu", "fp32", "AVX2", True), ("cpu", "fp32", "AVX512", False), ("cpu", "bf16", "AVX512", True), ("meta", "bf16", "AVX2", False)])
def test_small_maps_are_convolved_our_way_where_that_is_faster(where, precision, capability, ours, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    device, (encoder, _) = torch.device(where), build_encoder("resnet18", "random", 0)
    used, names = set(), {module: name for name, module in encoder.to(device).named_modules()}

    def look(module, _, y):
        if "SmallMaps" in y.grad_fn.name():
            used.add(names[module])

    for module in encoder.modules():
        module.register_forward_hook(look)
    with utils.autocast(torch.device("cpu"), utils.select_precision(precision, device)):
        encoder(torch.zeros(2, 3, 64, 64, device=device))
    later = {f"layer{n}.{b}.conv{c}" for n in (3, 4) for b in (0, 1) for c in (1, 2)} | {"layer4.0.downsample.0"}
    assert used == (later - {"layer3.0.conv1"} if ours else set())  # what sees 4x4 pixels or fewer


def test_grouped_convolutions_stay_torchs():
    encoder, _ = build_encoder("resnext50_32x4d", "random", 0)
    encoder(torch.zeros(2, 3, 32, 32)).sum().backward()
    kinds = {(module.groups > 1, type(module)) for module in encoder.modules() if isinstance(module, nn.Conv2d)}
    assert kinds == {(True, nn.Conv2d), (False, utils.Convolution)}


def test_an_unknown_encoder_is_named_with_the_nearest():
    with pytest.raises(UsageError, match="ENCODER 'resnet19' is unknown: did you mean 'resnet1"):
        build_encoder("resnet19", "random", 0)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("run",)

    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet34.pt")
    torch.save({"weights": Code()}, tmp_path / "code.pt")
    torch.save({"model": {}, "step": 3}, tmp_path / "checkpoint.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "resnet34.pt").read_bytes()[:1000])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"conv1.weight": torch.full((1,), torch.nan)}, tmp_path / "nan.pt")
    for name, message in [("resnet34.pt", "do not fit ENCODER"), ("nan.pt", "no finite numbers"), ("code.pt", "no weights file"),
                          ("checkpoint.pt", "no state dict"), ("torn.pt", "no weights file"),
                          ("empty.pt", "no weights file"), ("absent.pt", "nor a file with weights")]:
        with pytest.raises(UserError, match=message) as error:
            build_encoder("resnet18", str(tmp_path / name), 0)
        assert name in str(error.value)


def test_imagenet_weights_that_cannot_be_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match="INIT 'imagenet'.*unreachable.*set INIT to 'random'"):
        build_encoder("resnet18", "imagenet", 0)


def test_plain_state_dict_has_plain_memory():
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    weight = plain_state_dict(network)["weight"]
    assert weight.is_contiguous() and torch.equal(weight, network.weight) and not weight.requires_grad
    load_encoder(nn.Conv2d(3, 4, 3), plain_state_dict(network), "memory")


# ------------------------------------------------------------------------------------------------- features and kNN

def test_features_leave_the_encoder_as_it_was(device):
    encoder, _ = build_encoder("resnet18", "random", 0)
    encoder = encoder.to(device).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    pixels = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    features = extract_features(encoder, pixels, device, torch.float32, batch_size=4)
    assert features.shape == (10, 512) and not features.requires_grad and encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    whole = extract_features(encoder, pixels, device, torch.float32, batch_size=10)
    torch.testing.assert_close(features, whole, atol=1e-4, rtol=1e-4)


def test_features_are_of_normalised_images():
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    features = extract_features(nn.Flatten(), pixels, torch.device("cpu"), torch.float32)
    weights = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    expected = torchvision.transforms.v2.functional.normalize(pixels / 255, weights.mean, weights.std)
    torch.testing.assert_close(features.sort()[0], expected.flatten(1).sort()[0], atol=1e-5, rtol=1e-5)


def test_knn_agrees_with_brute_force(generator):
    bank, queries = torch.randn(60, 5, generator=generator), torch.randn(30, 5, generator=generator)
    labels = torch.randint(0, 4, (60,), generator=generator)
    predicted = knn_predict(bank, labels, queries, classes=4, k=7, temperature=0.2)
    for query, mine in zip(queries.tolist(), predicted.tolist()):
        def cosine(a):
            return sum(x * y for x, y in zip(a, query)) / math.hypot(*a) / math.hypot(*query)
        nearest = sorted(range(60), key=lambda i: -cosine(bank[i].tolist()))[:7]
        votes = [sum(math.exp(cosine(bank[i].tolist()) / 0.2) for i in nearest if labels[i] == k) for k in range(4)]
        assert mine == votes.index(max(votes))


def test_knn_never_holds_the_similarities_of_all_queries_at_once(generator, monkeypatch):
    bank, queries = torch.randn(60, 5, generator=generator), torch.randn(2500, 5, generator=generator)
    labels, topk, rows = torch.randint(0, 4, (60,), generator=generator), torch.Tensor.topk, []
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *a, **k: rows.append(len(x)) or topk(x, *a, **k))
    predicted = knn_predict(bank, labels, queries, classes=4)
    assert sum(rows) == 2500 and max(rows) <= 1024
    assert torch.equal(predicted[2000:], knn_predict(bank, labels, queries[2000:], classes=4))


def test_knn_is_as_right_as_theory_says(generator):
    """Two classes of angles with normal noise, many neighbours known: the vote of 20 that a majority of a dense bank casts.

    At an angle where class 1 has probability p, k voters drawn by it are right with the probabilities of Binomial(k, p).
    """
    n, half, k = 20_000, 0.5, 20

    def draw():
        labels = torch.randint(0, 2, (n,), generator=generator)
        angle = torch.randn(n, generator=generator) * 0.5 + (labels * 2 - 1) * half
        return torch.stack([angle.cos(), angle.sin()], dim=1), labels

    (bank, labels), (queries, truth) = draw(), draw()
    found = (knn_predict(bank, labels, queries, classes=2, k=k, temperature=1000.0) == truth).double().mean().item()
    angle = torch.linspace(-3.5, 3.5, 20_001, dtype=torch.float64)
    density = [torch.exp(-0.5 * ((angle - sign * half) / 0.5) ** 2) for sign in (-1, 1)]
    p = density[1] / (density[0] + density[1])
    votes = torch.stack([math.comb(k, i) * p ** i * (1 - p) ** (k - i) for i in range(k + 1)])
    majority = votes[k // 2 + 1:].sum(0) + votes[k // 2] / 2
    weight = (density[0] + density[1]) / (density[0] + density[1]).sum()
    expected = (weight * (p * majority + (1 - p) * (1 - majority))).sum().item()
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / n) and expected < 0.84 < 0.8413


def test_knn_with_a_bank_smaller_than_k():
    assert knn_predict(torch.eye(2), torch.tensor([0, 1]), torch.tensor([[0.1, 1.0]]), classes=2).tolist() == [1]


def test_a_probe_of_a_single_image_has_finite_weights():
    head = utils.fit_logistic(torch.tensor([[1.0, 5.0]]), torch.tensor([1]), 2, penalty=0.1)
    assert head.weight.isfinite().all() and head(torch.tensor([[1.0, 5.0]])).argmax().item() == 1


# ---------------------------------------------------------------------------------------------------- whole files

def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "deep" / "x.json"
    with whole_file(path) as file:
        file.write(b"first")
    with pytest.raises(RuntimeError):
        with whole_file(path) as file:
            file.write(b"sec")
            raise RuntimeError("killed")
    assert path.read_bytes() == b"first" and [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_failing_disk_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot write .*x.pt .No space left"):
        with whole_file(tmp_path / "x.pt"):
            raise OSError(28, "No space left on device")


def test_checkpoint_round_trip_is_bit_exact(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    save_torch(tmp_path / "x.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": [0.1]})
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert all(torch.equal(v, loaded["model"][k]) for k, v in model.state_dict().items()) and loaded["losses"] == [0.1]
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, loaded["optimizer"]["state"][key][name]) for name, v in state.items())


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    metrics = Metrics(tmp_path / "metrics.csv", ["step", "loss"], step=0)
    for step in (10, 20, 30):
        metrics.append(step=step, loss=step / 10)
    again = Metrics(tmp_path / "metrics.csv", ["step", "loss"], step=20)
    again.append(step=30, loss=4.0)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n10,1.0\n20,2.0\n30,4.0\n"
    assert again.columns == {"step": [10, 20, 30], "loss": [1, 2, 4]}
    assert Metrics(tmp_path / "metrics.csv", ["step", "loss"], step=0).columns == {"step": [], "loss": []}


def test_metrics_remember_0_and_what_is_missing(tmp_path):
    for metrics in (Metrics(tmp_path / "metrics.csv", ["step", "loss", "knn"], step=0),
                    Metrics(tmp_path / "metrics.csv", ["step", "loss", "knn"], step=1)):
        if not metrics.columns["step"]:
            metrics.append(step=0, knn=0)
            metrics.append(step=1, loss=2.5, knn="")
        assert metrics.columns["step"] == [0, 1] and metrics.columns["knn"][0] == 0 and metrics.columns["loss"][1] == 2.5
        assert math.isnan(metrics.columns["loss"][0]) and math.isnan(metrics.columns["knn"][1])


def test_the_curves_of_a_long_run_have_no_more_points_than_can_be_seen(tmp_path, monkeypatch):
    lines, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axis, x, y, **style: lines.append((x, y)) or plot(axis, x, y, **style))
    n = 30_000
    columns = {"epoch": [i / 10 for i in range(n)], "loss": [math.nan] + [float(i) for i in range(1, n)],
               "spread": [0.1] * n, "knn": (knn := [math.nan if i % 10_000 else 50.0 for i in range(n)]), "probe": knn, "rank": knn}
    c = constants()
    plot_curves(tmp_path / "curves.png", columns, c)
    assert [len(x) for x, _ in lines] == [2000, 1875, 3, 3, 3] and (tmp_path / "curves.png").stat().st_size > 0
    assert all(y == pytest.approx(10 * x) for x, y in zip(*lines[0]))


def test_json_is_written_whole(tmp_path):
    runs.write_json(tmp_path / "x.json", {"a": [1, 2]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, 2]}
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="x.json cannot be read"):
        runs.read_json(tmp_path / "x.json", "a")
