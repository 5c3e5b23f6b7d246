"""What both scripts need to be scripts: constants and flags, errors, signals, seeds, the machine, whole files."""
import mmap
import os
import platform
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import train_byol
import train_classifier
import utils
from test_faults import full_disk
from utils import UserError, read_constants, run_script, select_device, select_precision

CPU, ROOT, SCRIPTS = torch.device("cpu"), Path(utils.__file__).parent, (train_byol, train_classifier)


def edited(script, **lines):
    """The globals of a copy of the script, where other lines stand for those of some constants."""
    source = Path(script.__file__).read_text()
    for name, line in lines.items():
        source = re.sub(rf"^{name} = .*", lambda _: line, source, flags=re.M)
    Path("edited.py").write_text(source)
    return runpy.run_path("edited.py", run_name=script.__name__)


def help_of(script, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        read_constants(script, ["--help"])
    return " ".join(capsys.readouterr().out.split())


def flag(name, value):
    return utils.flag(name), utils.as_text(value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_is_a_flag_with_its_comment_and_default(script, capsys):
    top = re.split("\n\n(?:RECIPE|KINDS) = ", Path(script.__file__).read_text())[0]
    comments, shown = dict(re.findall(r"^([A-Z_]+) = .*  # (.*)$", top, re.M)), help_of(vars(script), capsys)
    assert comments.keys() == script.KINDS.keys()
    for name, comment in comments.items():
        words, default = flag(name, getattr(script, name))
        assert f"{words} VALUE {comment} [{default}]" in shown


def test_flags_win_over_the_demo_and_the_demo_over_the_file():
    script = edited(train_byol, EPOCHS="EPOCHS = 3", LOG_EVERY="LOG_EVERY = 7")
    for argv, epochs in (([], 3), (["--demo"], train_byol.DEMO["EPOCHS"]),
                         (["--epochs", "9", "--demo", "--overwrite"], 9)):
        c = read_constants(script, argv)
        assert (c.EPOCHS, c.LOG_EVERY, c.demo, c.overwrite) == (epochs, 7, "--demo" in argv, "--overwrite" in argv)
    for column, argv in ((0, []), (1, ["--demo"])):  # both scripts mean the same data
        c, classifiers = (read_constants(vars(script), argv) for script in SCRIPTS)
        of_the_run = {name: values[column] for name, values in train_classifier.OF_THE_RUN.items()}
        assert classifiers.RUN == (c.RUN,) and of_the_run.items() <= vars(c).items()


def test_the_demo_is_the_recipe_but_for_sizes_and_lengths():
    assert train_byol.DEMO.keys() == {"DATASET", "IMAGE_SIZE", "INIT", "RUN", "EPOCHS", "BATCH_SIZE"}
    assert train_classifier.DEMO.keys() == {"RUN", "LABELS_PER_CLASS", "SEEDS", "EPOCHS", "BATCH_SIZE", "LEARNING_RATE"}
    assert train_classifier.DEMO["LEARNING_RATE"] in train_classifier.LEARNING_RATE, "one of those that are tried"


VALUES = {  # of each constant: what it may be, the first unlike what a script says or what auto is; and what it may not
    "DATASET": (["patterns", "some/folder"], []), "DATA_ROOT": (["elsewhere", "~/data"], []), "RUN": (["other", 7], []),
    "MAX_UNREADABLE": ([0.2, 1], [2]),
    "IMAGE_SIZE": ([32, "48", 64.0], [15, "large", 32.5]), "CROP_AREA": ([0.4, 1], [0, "nan"]), "SEED": ([1], [0.5]),
    "BLUR_P": ([(0.5, 0), [1, 1], "0, 0.1"], [0.5, (1, 2)]), "JITTER": ([0.2, 2], [-1]), "LOG_EVERY": ([5], [0]),
    "ENCODER": (["resnet34"], []), "STEM": (["3x3"], ["5x5"]), "INIT": (["random", "first.pt"], []),
    "BATCHNORM": (["batch", "auto"], ["thawed"]), "HIDDEN_DIM": ([64], [0]), "PROJECTION_DIM": ([64, "32"], [1]),
    "EPOCHS": ([3, 4.0, "5"], [0, True, "few"]), "BATCH_SIZE": ([32, "16"], [1, "auto"]), "PREDICTOR_RATE": ([3], [-1]),
    "LEARNING_RATE": ([0.3, 1, (0.1,)], [-1, "inf", (0.2, 0.2)]), "HEAD_RATE": ([1, 0.5], [-1]),
    "WEIGHT_DECAY": ([0.1, 0], [-1]), "WARMUP_EPOCHS": ([0.5, 2], ["long"]), "BASE_DECAY": ([0.9, 0, "auto"], [1.5]),
    "DEVICE": (["cpu", "cuda:1"], []), "PRECISION": (["fp32"], ["fp8"]), "CHECKPOINT_MINUTES": ([0.5, 2], ["nan"]),
    "LABELS_PER_CLASS": ([(7, "all"), [3], 5, "fold"], [(3, 3), 0, "some"]), "SEEDS": ([(4, 5), [6], 7], [(0, 0), -1])}


def outcome(script, *argv):
    """All constants as they are resolved, or the line that refuses them."""
    try:
        c = read_constants(script, argv)
        script.get("resolve", id)(c)
    except UserError as error:
        return str(error)
    return str(sorted(vars(c).items()))


@pytest.mark.parametrize("script, name", [(script, name) for script in SCRIPTS for name in script.KINDS])
def test_an_edited_constant_and_a_flag_mean_the_same_whatever_stands_in_the_file(script, name):
    may_be, may_not = VALUES[name]
    flags = [flag(name, value) for value in may_be + may_not]
    by_flag = [outcome(vars(script), *each) for each in flags]
    assert by_flag[0] != outcome(vars(script))
    for value, (words, _), expected in zip(may_be + may_not, flags, by_flag):
        copy = edited(script, **{name: f"{name} = {value!r}  # edited"})
        assert outcome(copy) == expected
        if value in may_be:
            assert "it must be" not in expected and [outcome(copy, *each) for each in flags] == by_flag
        else:
            assert re.fullmatch(rf"{name} is .*: it must be .* \({words}\)", expected)


def test_constants_may_be_annotated_set_together_or_nothing(capsys):
    script = edited(train_byol, SEED="SEED: int = 3  # of 50%", EPOCHS="", LOG_EVERY="LOG_EVERY, EPOCHS = 5, 4")
    c = read_constants(script, [])
    assert (c.SEED, c.LOG_EVERY, c.EPOCHS) == (3, 5, 4) and "--seed VALUE of 50% [3]" in help_of(script, capsys)
    for name in ("INIT", "EPOCHS"):
        script = edited(train_byol, **{name: f"{name} = None  # forgotten"})
        assert script["main"](["--dataset", "patterns", "--image-size", "16", "--device", "cpu"]) == 1
        assert re.fullmatch(f"error: {name} .*None.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "/tmp/x", "..", "a\n", "x" * 101])
def test_a_run_name_cannot_leave_the_runs_folder(name):
    with pytest.raises(UserError, match="is not a valid name"):
        utils.run_folder("good", name)


def test_what_a_user_can_mend_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    for error, line in ((UserError("no such"), "no such"), (OSError("off"), "cannot read or write a file (off"),
                        (OSError(28, "Full", "runs/x"), "cannot read or write runs/x (Full): make space, or check"),
                        (torch.OutOfMemoryError("50 GiB\nmore"), "memory is exhausted (50 GiB more"),
                        (MemoryError("7 GiB"), "memory is exhausted (7 GiB"),
                        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), "memory is exhausted (Def")):
        assert run_script(Mock(side_effect=error), vars(train_byol), []) == 1
        assert re.fullmatch(re.escape(f"error: {line}") + ".*\n", capsys.readouterr().err)
    for bug in (ZeroDivisionError, NotImplementedError, RuntimeError("shapes do not match")):
        with pytest.raises(bug if isinstance(bug, type) else RuntimeError):
            run_script(Mock(side_effect=bug), vars(train_byol), [])


def test_signals_are_noted_unless_ignored_and_a_second_meets_the_systems_own_handler_but_under_torchrun():
    script = """
import os, utils
from signal import *
for number, handler, rank in ((SIGTERM, SIG_DFL, 1), (SIGINT, default_int_handler, 1), (SIGHUP, SIG_IGN, 1),
                              (SIGHUP, SIG_DFL, 1), (SIGTERM, SIG_DFL, 0)):
    os.environ.update(RANK="0") if rank else os.environ.pop("RANK")
    signal(number, handler)
    with utils.on_signals(noted := []):
        for _ in range(2):
            raise_signal(number)
            print(noted, flush=True)
    print(getsignal(number) == handler)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split("\n") == ["[15]", "[15, 15]", "True", "[2]", "[2, 2]", "True", "[]", "[]", "True",
                                       "[1]", "[1, 1]", "True", "[15]", ""] and done.returncode == -signal.SIGTERM


def test_generators_and_first_weights_depend_on_seed_and_purpose_alone():
    def draw(*key):
        with utils.seeded_init(*key):
            return nn.Linear(3, 3).weight.tolist(), torch.rand(4, generator=utils.seeded_generator(*key)).tolist()

    keys = [(0, "views", 3, 0), (1, "views", 3, 0), (0, "order", 3, 0), (0, "views", 4, 0), (0, "views", 3, 1)]
    state, first = torch.get_rng_state(), [draw(*key) for key in keys]
    assert torch.equal(torch.get_rng_state(), state) and len(set(map(str, first))) == 5
    torch.rand(5)
    assert [draw(*key) for key in keys] == first


def test_a_gpu_is_chosen_by_its_number(monkeypatch):
    chosen, index_of = [], torch.cuda._utils._get_device_index  # CUDA's own question, which wants a number
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(index_of(device)))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert select_device("cpu") == CPU and select_device("auto") == select_device("cuda") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert select_device("auto") == torch.device("cuda:3") and select_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [0, 0, 3, 1]


@pytest.mark.parametrize("device, capability, compiler, header, works", [
    ("cuda", (7, 0), "gcc", True, True), ("cpu", (7, 0), "gcc", True, False), ("cuda", (6, 1), "gcc", True, False),
    ("cuda", (9, 0), "clang", True, True), ("cuda", (9, 0), "tcc", True, False), ("cuda", (7, 0), "gcc", False, False)])
def test_compilation_needs_its_tools(monkeypatch, tmp_path, device, capability, compiler, header, works):
    (tmp_path / ("Python.h" if header else "other.h")).touch()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("shutil.which", lambda name: name if name == compiler else None)
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: tmp_path)
    assert utils.can_compile(torch.device(device)) == works


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is told")
def test_the_memory_of_freed_tensors_is_used_again():
    """In a process of its own, since the heap of this one has holes that other tests left."""
    script = """
import ctypes, torch, utils
from resource import RUSAGE_SELF, getrusage
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of one size, whatever the kernel would merge
utils.keep_freed_memory()
for _ in range(10):
    before = getrusage(RUSAGE_SELF).ru_minflt
    [torch.zeros(mebibytes << 20, dtype=torch.uint8) for mebibytes in (40, 1, 3, 9, 33, 17, 5)]
    print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""
    first, *later = map(int, subprocess.check_output([sys.executable, "-c", script], cwd=ROOT).split())
    assert first > 0.7 * (108 << 20) // mmap.PAGESIZE and sorted(later)[4] == 0, f"{first} pages are new, then {later}"


@pytest.mark.parametrize("speeds, begun_with, users, words", [  # convolutions a second by 4, 2 and 1 threads
    ((600, 600, 600), None, None, "4 threads"), ((600, 840, 840), None, None, "4 threads"),
    ((600, 960, 1000), None, None, "2 threads of 4: other processes keep the cores busy"),
    ((600, 840, 960), None, None, "1 thread of 4: other processes keep the cores busy"),
    ((1, 1, 9), 4, None, "4 threads"), ((1, 1, 1), 64, None, "4 threads"), ((1, 1, 9), 1, "4", "4 threads"),
    ((1, 1, 1), 2, None, "2 threads of 4: as the run was begun")])
def test_fewer_threads_are_taken_where_half_as_fast_again_or_begun_with(monkeypatch, speeds, begun_with, users, words):
    clock, threads, started = [0.0], [4], set()

    def convolve(x, weight):
        clock[0] += 1 / dict(zip((4, 2, 1), speeds))[threads[-1]] + 5 * (threads[-1] not in started)
        started.add(threads[-1])

    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "conv2d", convolve)
    monkeypatch.setattr(utils.time, "monotonic", lambda: clock[0])
    monkeypatch.setenv("OMP_NUM_THREADS", users) if users else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert utils.choose_threads(torch.device("cuda:0")) == "" and threads == [4]
    assert utils.choose_threads(CPU, begun_with).split(" (OMP_NUM_THREADS=N sets N)")[0] == f" with {words}"
    assert threads[-1] == int(words[0])


def test_bf16_is_chosen_where_the_hardware_has_it_and_the_tests_can_run_as_on_the_other_kind(monkeypatch):
    monkeypatch.setattr(utils, "has_native_bf16", utils.has_native_bf16)  # these two come back
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", torch.backends.cpu.get_cpu_capability)
    for answer, chosen in (("0", "fp32"), ("1", "bf16")):
        monkeypatch.setenv("TEST_BF16", answer)
        runpy.run_path(str(ROOT / "tests" / "conftest.py"))
        assert select_precision("auto", CPU) == chosen and not utils.has_native_bf16(torch.device("meta")), "no CPU"
        assert select_precision("bf16", CPU) == "bf16" and select_precision("fp32", CPU) == "fp32"


def test_a_file_is_whole_or_as_it_was_and_json_of_others_is_refused(tmp_path):
    file, content = tmp_path / "deep" / "x.pt", {"weight": torch.randn(2000), "losses": [0.1]}
    utils.save_torch(file, content)
    torch.testing.assert_close(torch.load(file, weights_only=True), content, rtol=0, atol=0)
    before = file.read_bytes()
    for save, content in ((utils.save_torch, content), (utils.write_json, [0] * 9999)):
        with pytest.raises(OSError, match="File too large") as raised, full_disk(4000):
            save(file, content)
        assert raised.value.filename == str(file)
    with pytest.raises(ZeroDivisionError), utils.whole_file(file) as out:
        out.write(b"half")
        1 / 0
    assert file.read_bytes() == before and os.listdir(file.parent) == ["x.pt"]
    utils.write_json(file, {"a": [1, 2]})
    assert utils.read_json(file, "a") == {"a": [1, 2]}
    for content in (b"{", b"[]", b'{"b": 1}', b"\xff", b"3"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="x.pt cannot be read"):
            utils.read_json(file, "a")


@pytest.mark.parametrize("files", [[], ["x"]])
def test_a_folder_has_one_writer_and_goes_where_nothing_was_written(tmp_path, files):
    with pytest.raises(ZeroDivisionError), utils.only_writer(folder := tmp_path / "runs" / "x"):
        with pytest.raises(UserError, match="runs/x is being written by another process"):
            utils.only_writer(folder).__enter__()
        [(folder / name).touch() for name in files]
        1 / 0
    assert not folder.exists() if not files else sorted(os.listdir(folder)) == [".lock", *files]
