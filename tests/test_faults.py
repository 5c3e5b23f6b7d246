"""Everything that goes wrong for a user: one line on stderr that names it, and the run's files as they were."""
import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data
import encoders
import train_byol
import train_classifier
import utils
from conftest import use_small
from test_data import write_folder, write_stl10
from test_encoders import Code
from test_train_byol import REPOSITORY, TINY, rows, same, signal_at, weights, without_timings
from test_train_classifier import QUICK

PRETRAIN = ["--dataset", "images", *TINY, "--checkpoint-minutes", "0", "--run"]
PARTS, FINISHED = [*PRETRAIN, "parts"], [*PRETRAIN, "tiny"]
ANEW = [*FINISHED, "--overwrite"]  # the worst case
COMPARE = ["--run", "tiny", *QUICK, "--seeds", "0"]


@pytest.fixture(scope="module")
def begun_once(tmp_path_factory):
    """Paths are absolute in a run's files: each test gets a copy in the very same place."""
    folder, copy = tmp_path_factory.mktemp("begun"), tmp_path_factory.mktemp("copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        use_small(patch)
        write_folder(folder / "images", per_class=10, unlabeled=20)
        write_stl10(folder / "data")
        assert train_byol.main(FINISHED) == 0 and train_classifier.main(COMPARE) == 0
        signal_at(patch, 3)
        assert train_byol.main(PARTS) == 143
    return folder, shutil.copytree(folder, copy / "of")


@pytest.fixture
def begun(begun_once, small, monkeypatch):
    """Runs of 4 steps on the folder `images`: `tiny`, finished and compared, and `parts`, stopped after step 3."""
    folder, copy = begun_once
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    monkeypatch.chdir(folder)
    return folder


def everything():
    return {path: path.is_file() and path.read_bytes() for path in Path("runs").rglob("*")}


def refused(capsys, script, argv, *needles):
    """The command ends with one line on stderr that holds the needles, and neither changes nor leaves a file."""
    before = everything()
    capsys.readouterr()
    assert script.main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and all(needle in err for needle in needles), err
    assert everything() == before


@pytest.mark.parametrize("run", ["tiny", "new"])
@pytest.mark.parametrize("argv, message", [
    ("--dataset stl11", "/stl11' is neither 'stl10', 'cifar10', 'patterns' nor an existing folder"),
    ("--batch-size 0", "BATCH_SIZE is 0: it must be a whole number at least 2 (--batch-size)"),
    ("--batch-size 21", "BATCH_SIZE is 21, but there are only 20 images"),
    ("--batchnorm frozen", "BATCHNORM is frozen, but INIT random"),
    ("--base-decay 1.5", "BASE_DECAY is 1.5: it must be a number from 0 to 1 or auto"),
    ("--x", "unknown flag --x"), ("--epoch 3", "unknown flag --epoch: did you mean --epochs"),
    ("--epochs", "EPOCHS expected one argument (--epochs)"),
    ("--batchnorm no", "BATCHNORM is no: it must be auto or batch or frozen"),
    ("--device tpu", "DEVICE 'tpu' cannot be used"),
    (f"--device cuda:{torch.cuda.device_count()}", "DEVICE 'cuda:"), ("--encoder vgg11", "ENCODER 'vgg11' is unknown"),
    ("--run ../../etc", "RUN '../../etc' is not a valid name"), ("--run none", "RUN none is not possible"),
    ("--init runs/tiny/encoder.pt --run tiny", "INIT must lie outside its folder")])
def test_constants_that_cannot_be(begun, capsys, monkeypatch, run, argv, message):
    monkeypatch.setattr(train_byol, "build_encoder", encoders.build_encoder)
    refused(capsys, train_byol, [*ANEW, "--run", run, *argv.split()], message)


@pytest.mark.parametrize("argv, message", [
    ("--run tiny,tiny", "RUN is tiny,tiny: it must be "), ("--run tiny,../x", "RUN '../x' is not a valid name"),
    ("--run parts", "runs/parts has no encoder.pt yet"), ("--run none --dataset nowhere", "/nowhere' is neither"),
    ("--seeds 0,a", "a: it must be a whole number at least 0"), ("--controls", "unknown flag --controls"),
    ("--seeds 0 1", "1 belongs to no flag: separate"), ("--labels-per-class 11", "'a' has only 10 training images"),
    ("--crop-area 0.9 --epochs 5", "results.json was made with other constants: CROP_AREA 0.3 -> 0.9; set them back")])
def test_comparisons_that_cannot_be(begun, capsys, argv, message):
    refused(capsys, train_classifier, [*COMPARE, *argv.split()], message)


def test_a_file_that_vanishes_and_a_disk_without_mmap_end_in_one_line(begun, capsys, monkeypatch):
    image_files = data.image_files

    def without_the_first(top, others):
        files = image_files(top, others)
        files[0].unlink()
        return files

    with monkeypatch.context() as patch:
        patch.setattr(data, "image_files", without_the_first)
        refused(capsys, train_byol, ANEW, "cannot read or write ", "0.png (No such file or directory)")
    assert "No such file" in data.decode_image(Path("gone.png"), 16), "while it decodes: an image that cannot be read"
    monkeypatch.setattr(np, "memmap", Mock(side_effect=OSError(errno.ENODEV, "No such device", "a.bin")))
    refused(capsys, train_byol, ANEW, "cannot read or write a.bin (No such device)")


def test_folders_that_cannot_be(begun, capsys, monkeypatch):
    for folder, needle in (("empty", "empty' has neither unlabeled/ nor train/"),
                           ("empty/unlabeled", "empty/unlabeled holds no images"),
                           ("empty/train", "empty/train is missing, or holds no class folders")):
        Path(folder).mkdir()
        refused(capsys, train_byol, [*ANEW, "--dataset", "empty"], needle)
    Path("images/test/zebra").mkdir()
    refused(capsys, train_classifier, COMPARE, "images/test/zebra", "'zebra' is not in")
    Path("images/unlabeled/some/depth/3.png").write_bytes(b"")
    refused(capsys, train_byol, ANEW, "1 of 20 images in", "images/unlabeled cannot be read", ".unreadable.txt")
    scandir = os.scandir

    def unreadable(path="."):  # file modes do not keep root from reading
        if blocked in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", unreadable)
    for blocked in ("images/unlabeled/some/depth", "images/train"):
        refused(capsys, train_byol, ANEW, f"cannot read or write {begun}/{blocked} (Permission denied)")


def test_stl10_files_that_cannot_be(begun, capsys, monkeypatch):
    argv, folder = [*ANEW, "--dataset", "stl10", "--image-size", "32"], Path("data/stl10_binary")
    folds = [*COMPARE, "--run", "none", "--dataset", "stl10", "--init", "random", "--labels-per-class", "fold"]
    refused(capsys, train_classifier, [*folds, "--seeds", "10"], "SEEDS from 0 to 9")
    for script, flags, name, contents in ((train_byol, argv, "train_y.bin", (b"", bytes([0] * 20), bytes([11] * 20))),
                                          (train_byol, argv, "unlabeled_X.bin", (b"", b"123", bytes(3 * 96 * 96 + 1))),
                                          (train_classifier, folds, "fold_indices.txt",
                                           (b"0 1 2\n", b"0 1 20\n" * 10, b"0 one 2\n" * 10, b"\n" * 10, None))):
        whole = (folder / name).read_bytes()
        for content in contents:
            (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
            refused(capsys, script, flags, f"data/stl10_binary/{name}")
        (folder / name).write_bytes(whole)
    (folder / "train_y.bin").unlink()
    offline = Mock(side_effect=OSError("<urlopen error [Errno 101] Network is unreachable>"))
    monkeypatch.setattr(data, "download_and_extract_archive", offline)
    refused(capsys, train_byol, argv, "train_y.bin is missing", "unreachable", "data/stl10_binary", "--demo")
    monkeypatch.setattr(train_byol, "build_encoder", encoders.build_encoder)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    refused(capsys, train_byol, [*ANEW, "--init", "imagenet"], "INIT 'imagenet'", "unreachable", "random")
    refused(capsys, train_byol, [*ANEW, "--init", "images/test/a/0.png"], "images/test/a/0.png is not a weights file")


def test_changed_constants_and_images_are_named_and_refused(begun, capsys):
    refused(capsys, train_byol, [*FINISHED, "--epochs", "9", "--seed", "1"], "a longer run is another run",
            "runs/tiny/checkpoint.pt was made with other constants: EPOCHS 2 -> 9, SEED 0 -> 1; set", "--overwrite")
    Path("runs/parts/config.json").unlink()  # which loses nothing, and lets nothing be mixed up
    refused(capsys, train_byol, [*PARTS, "--seed", "9"], ".pt was made with other constants: SEED 0 -> 9; set")
    Image.new("RGB", (20, 20)).save("images/unlabeled/new.png")
    refused(capsys, train_byol, PARTS, "images no longer holds the run's images: bring them back")


def test_another_spelling_of_a_path_changes_nothing(begun, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(begun))
    Path("link").symlink_to("images")
    for spelling in ("~/images", "runs/../images/", "link"):
        assert train_byol.main([*FINISHED, "--dataset", spelling]) == 0 and "is finished" in capsys.readouterr().out
        assert train_classifier.main([*COMPARE, "--dataset", spelling]) == 0
    assert train_byol.main([*PARTS, "--dataset", f"{begun}/images"]) == 0 and "from step 3" in capsys.readouterr().out
    assert same(weights("tiny"), weights("parts"))


def test_data_and_weights_that_were_moved_are_the_same(begun, capsys):
    """As a batch system's scratch is, another one for each job. Other images or weights at another place are not."""
    first = [*PRETRAIN, "second", "--init", "runs/tiny/encoder.pt"]
    assert train_byol.main([*first, "--epochs", "1"]) == 0
    shutil.copytree("runs/tiny", "elsewhere")
    Path("images").rename("moved")
    assert train_byol.main([*PARTS, "--dataset", "moved"]) == 0 and "from step 3" in capsys.readouterr().out
    assert same(weights("tiny"), weights("parts"))
    moved = [*first, "--epochs", "1", "--dataset", "moved", "--init"]
    assert train_byol.main([*moved, "elsewhere/encoder.pt"]) == 0 and "is finished" in capsys.readouterr().out
    refused(capsys, train_byol, [*moved, "random"], "INIT ", "encoder.pt -> random")
    compare = [*COMPARE, "--dataset"]
    assert train_classifier.main([*compare, "moved"]) == 0
    assert train_classifier.main([*compare, "moved", "--run", "second", "--init", "elsewhere/encoder.pt"]) == 0
    Image.new("RGB", (20, 20)).save("moved/train/a/0.png")
    refused(capsys, train_classifier, [*compare, "moved"], "/moved has another train/ than that of tiny: set it to run")
    refused(capsys, train_classifier, [*compare, "patterns"], "DATASET patterns contradicts runs/tiny/config.json")


def test_a_run_continues_in_its_own_precision_and_number_of_threads(tmp_path, small, monkeypatch, capsys):
    """Where `auto` is fp32 on the machine that began it, and bf16 on the one that continues it."""
    write_folder(tmp_path / "images", unlabeled=20)
    auto = ["--dataset", "images", *TINY, "--precision", "auto", "--run"]
    monkeypatch.setattr(utils, "has_native_bf16", lambda device: False)
    assert train_byol.main([*auto, "whole"]) == 0
    precisions = signal_at(monkeypatch, 3)
    assert train_byol.main([*auto, "parts"]) == 143
    monkeypatch.setattr(utils, "has_native_bf16", lambda device: True)
    threads, choose = [], train_byol.choose_threads
    monkeypatch.setattr(train_byol, "choose_threads", lambda *args: threads.append(args[1]) or choose(*args))
    refused(capsys, train_byol, [*auto, "parts", "--precision", "bf16"], "PRECISION fp32 -> bf16")
    shutil.copytree("runs/parts", "runs/named")
    assert train_byol.main([*auto, "parts"]) == train_byol.main([*auto, "named", "--precision", "fp32"]) == 0
    assert precisions == 5 * ["fp32"] and threads == 2 * [torch.get_num_threads()]
    assert same(weights("whole"), weights("parts")) and same(weights("whole"), weights("named"))


@pytest.mark.parametrize("name, content", [
    ("parts/checkpoint.pt", "torn"), ("parts/checkpoint.pt", b""), ("parts/checkpoint.pt", b"foreign"),
    ("parts/checkpoint.pt", {"x": Code()}), ("parts/checkpoint.pt", {"step": 3}), ("parts/checkpoint.pt", [1]),
    ("parts/config.json", b"[]"), ("tiny/results.json", b'{"inputs": ')])
def test_a_file_that_cannot_be_read_is_named_and_not_overwritten(begun, capsys, name, content):
    file = Path("runs", name)
    whole = file.read_bytes()
    torch.save(content, file)
    if isinstance(content, (bytes, str)):
        file.write_bytes(whole[:-1000] if content == "torn" else content)
    if file.name == "config.json":  # killed before its first checkpoint
        file.with_name("checkpoint.pt").unlink()
    script, argv = (train_byol, PARTS) if "parts" in name else (train_classifier, COMPARE)
    refused(capsys, script, argv, f"runs/{name} cannot be read")
    assert not Path("executed").exists()
    assert script.main([*argv, "--overwrite"]) == 0
    assert "tiny" in name or same(weights("tiny"), weights("parts"))


def test_a_run_of_another_version_is_told_apart(begun, capsys, monkeypatch):
    """Also without a checkpoint, and where constants differ, too: setting them back would not help."""
    Path("runs/parts/config.json").unlink()
    Path("runs/tiny/checkpoint.pt").unlink()
    monkeypatch.setattr(train_byol, "VERSION", utils.VERSION + 1)
    for run in ("parts", "tiny"):
        refused(capsys, train_byol, [*PRETRAIN, run, "--seed", "9"], f"runs/{run} was begun by an earlier version")


def test_a_finished_run_stays_finished_without_its_checkpoint(begun, capsys):
    """It is large, and users delete it."""
    Path("runs/tiny/checkpoint.pt").unlink()
    before = everything()
    assert train_byol.main(FINISHED) == 0 and "runs/tiny is finished" in capsys.readouterr().out
    assert everything() == before
    refused(capsys, train_byol, [*FINISHED, "--seed", "7"], "config.json was made with other constants: SEED 0 -> 7")


@pytest.mark.parametrize("flags, sick, step", [([], "loss", 4), ([], "weights", 4), (["--overwrite"], "weights", 1)])
def test_what_is_not_finite_ends_the_run_and_is_never_saved(begun, monkeypatch, capsys, flags, sick, step):
    """At an epoch's end, and where a checkpoint is due."""
    file = Path("runs/parts/checkpoint.pt")
    before = not flags and file.read_bytes()

    def ails(network, model, *rest):
        next(model.parameters()).data.fill_(float("inf") if sick == "weights" else 1)
        return torch.tensor(float("nan") if sick == "loss" else 1.0)

    monkeypatch.setattr(train_byol, "train_step", ails)
    assert train_byol.main([*PARTS, *flags]) == 1
    assert f"losses or weights are no longer finite at step {step}: begin a RUN with a lower" in capsys.readouterr().err
    assert (file.exists() and file.read_bytes()) == before and not Path("runs/parts/encoder.pt").exists()


def test_processes_that_do_not_share_a_run_are_refused(begun, capsys, monkeypatch):
    monkeypatch.setattr(train_byol, "any_process", lambda here, device: 3)
    refused(capsys, train_byol, [*PRETRAIN, "new"], "another process continues from a checkpoint that this one lacks")
    assert train_byol.main(PARTS) == 0, "which both of them have"


def test_a_comparison_is_deleted_when_the_weights_for_another_could_be_read(begun, capsys, monkeypatch):
    Path("runs/tiny/encoder.pt").write_bytes(b"torn")
    monkeypatch.setattr(train_classifier, "build_encoder", encoders.build_encoder)
    refused(capsys, train_classifier, [*COMPARE, "--overwrite"], "encoder.pt is not a weights file")


def test_collapse_is_warned_of_once_also_where_the_run_is_continued(begun, monkeypatch, capsys):
    monkeypatch.setattr(train_byol, "train_step", lambda *args: torch.tensor(1.0))  # the spread of its start stays, 0
    signal_at(monkeypatch, 2)
    assert train_byol.main([*PARTS, "--log-every", "1", "--overwrite"]) == 143
    assert train_byol.main([*PARTS, "--log-every", "1"]) == 0
    assert capsys.readouterr().out.count("warning: the embeddings collapse") == 1


@contextlib.contextmanager
def full_disk(limit):
    """Inside, no file grows beyond `limit` bytes: the system refuses what lies behind, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_during_a_checkpoint(begun, capsys):
    before = Path("runs/parts/checkpoint.pt").read_bytes()
    with full_disk(len(before) // 2):
        assert train_byol.main(PARTS) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: cannot read or write runs/parts/checkpoint.pt (File too large): make space")
    assert Path("runs/parts/checkpoint.pt").read_bytes() == before and not list(Path("runs/parts").glob("*.tmp"))
    assert train_byol.main(PARTS) == 0 and same(weights("tiny"), weights("parts"))


def test_a_disk_that_fills_up_during_the_cache_of_a_folder(begun, capsys):
    argv = [*ANEW, "--image-size", "64"]
    with full_disk(150_000):
        refused(capsys, train_byol, argv, "cannot read or write", "data/cache/images-train-64px", "make space")
    assert not list(Path("data/cache").glob("*64px*"))
    assert train_byol.main(argv) == 0 and len(rows("tiny")) > 0


def test_a_run_folder_that_cannot_be_written(tmp_path, small, capsys):
    write_folder(tmp_path / "images")
    Path("runs").write_text("a file")
    refused(capsys, train_byol, PARTS, "error: cannot read or write runs/parts (Not a directory): make space")


def subprocess_of(code, **options):
    """Python with the repository at hand, as in a user's shell: where output is buffered, it is flushed at the exit."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, "-c", f"""
import os, signal, sys
sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "tests")!r}]
import train_byol, utils
from conftest import small_encoder
train_byol.build_encoder = small_encoder
{code}"""], stderr=subprocess.PIPE, text=True, env=environment, **options)


def test_a_second_writer_is_refused_while_the_first_lives(begun, capsys, monkeypatch):
    holder = subprocess.Popen([sys.executable, "-c", """
import fcntl, sys
fcntl.flock(lock := open("runs/parts/.lock", "w"), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    refused(capsys, train_byol, PARTS, "runs/parts is being written by another process")
    holder.kill()
    holder.wait()
    assert train_byol.main(PARTS) == 0, "the lock of a dead process is no obstacle"
    monkeypatch.setattr(utils.fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    assert train_byol.main(ANEW) == 0, "nor is a file system without locks"


@pytest.mark.parametrize("where", ["load_images", "build_encoder"])
def test_a_signal_before_the_training_changes_nothing(begun, monkeypatch, capsys, where):
    before = everything()
    monkeypatch.setattr(train_byol, where, lambda *args: os.kill(os.getpid(), signal.SIGINT) or 1 / 0)
    for flags, how in ((["--overwrite"], "starts anew; without --overwrite it continues what is there"),
                       ([], "continues from there")):
        assert train_byol.main([*PARTS, *flags]) == 130
        assert capsys.readouterr().out == f"stopped at once: the same command {how}\n"
    assert train_byol.main([*PRETRAIN, "new"]) == 130 and everything() == before


def test_a_second_interrupt_ends_the_process_at_once_and_loses_nothing(begun):
    before = Path("runs/parts/checkpoint.pt").read_bytes()
    process = subprocess_of(f"""
def twice(*args):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("went on")
train_byol.train_step = twice
sys.exit(train_byol.main({PARTS}))""")
    assert process.stderr.read() == "" and process.wait() == -signal.SIGINT
    assert Path("runs/parts/checkpoint.pt").read_bytes() == before
    with open("runs/parts/metrics.csv", "a") as file:
        file.write("4,2.0,0.5,0,1,0.1,,,,9\n2,0.")  # ahead of the checkpoint, and torn
    assert train_byol.main(PARTS) == 0 and same(weights("tiny"), weights("parts"))
    assert without_timings("tiny") == without_timings("parts")


def test_a_reader_who_leaves_ends_the_run_without_a_traceback(tmp_path):
    write_folder(tmp_path / "images", unlabeled=20)
    process = subprocess_of(f"sys.exit(train_byol.main({[*PARTS, '--epochs', '400']}))", stdout=subprocess.PIPE)
    assert [process.stdout.readline().partition(" ")[0] for _ in range(3)] == ["decoding", "decoding", "BYOL:"]
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 128 + signal.SIGPIPE


def test_a_reader_who_leaves_with_the_run_meets_no_traceback(monkeypatch):
    """Ctrl-C in `python train_byol.py | tee log` ends tee, too. What Python then flushes has to go somewhere."""
    readers_end, writers_end = os.pipe()
    os.close(readers_end)
    with open(writers_end, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        status = utils.run_script(lambda c: os.kill(os.getpid(), signal.SIGINT), vars(train_byol), [])
    assert status == 128 + signal.SIGPIPE
