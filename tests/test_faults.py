"""Everything that goes wrong for a user: one line on stderr that names it, and the run's files as they were."""
import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data
import runs
import train_byol
import train_classifier
import utils
from conftest import use_small
from test_data import write_folder, write_stl10
from test_train_byol import REPOSITORY, TINY, rows, same, weights, without_timings
from test_train_classifier import QUICK


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        use_small(patch)
        write_folder(folder / "images", per_class=10, unlabeled=20)
        write_stl10(folder / "data")
        assert train_byol.main(["--dataset", "images", *TINY, "--run", "tiny"]) == 0
        assert train_classifier.main(["--run", "tiny", *QUICK, "--seeds", "0"]) == 0
    return folder


@pytest.fixture
def finished(finished_once, tmp_path, small):
    """A finished run `tiny`, compared, on the folder `images`; beside it STL-10 files in `data`."""
    shutil.copytree(finished_once, tmp_path, dirs_exist_ok=True)


def refused(capsys, script, argv, status, *needles):
    """The command fails with one last line on stderr that holds the needles, and no file of any run changes."""
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert script.main(argv) == status
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and all(needle in line for needle in needles), line
    after = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in before} == before


def pretraining(*argv):
    return ["--dataset", "images", *TINY, "--run", "tiny", "--overwrite", *argv]  # the worst case: told to overwrite


@pytest.mark.parametrize("argv, status, needles", [
    (["--dataset", "stl11"], 1, ["DATASET 'stl11'"]),
    (["--dataset", "nowhere/images"], 1, ["DATASET 'nowhere/images'"]),
    (["--batch-size", "0"], 2, ["BATCH_SIZE is 0"]), (["--batch-size", "1"], 2, ["BATCH_SIZE is 1"]),
    (["--batch-size", "-4"], 2, ["BATCH_SIZE is -4"]), (["--batch-size", "21"], 2, ["BATCH_SIZE is 21", "20 images"]),
    (["--batchnorm", "frozen"], 2, ["BATCHNORM is frozen", "INIT random"]),
    (["--epochs", "0"], 2, ["EPOCHS is 0"]), (["--epochs", "-1"], 2, ["EPOCHS is -1"]),
    (["--image-size", "15"], 2, ["IMAGE_SIZE is 15"]), (["--learning-rate", "-0.1"], 2, ["LEARNING_RATE is -0.1"]),
    (["--learning-rate", "nan"], 2, ["LEARNING_RATE is nan"]), (["--learning-rate", "fast"], 2, ["--learning-rate", "fast"]),
    (["--base-decay", "1.5"], 2, ["BASE_DECAY is 1.5", "from 0 to 1"]), (["--epoch", "3"], 2, ["--epoch", "--epochs"]),
    (["--frobnicate", "3"], 2, ["--frobnicate"]), (["--optimizer", "lars"], 2, ["OPTIMIZER 'lars'"]),
    (["--blur-p", "0.5"], 2, ["BLUR_P is 0.5", "--blur-p"]), (["--blur-p", "1,2"], 2, ["BLUR_P is 1.0,2.0"]),
    (["--crop-area", "0"], 2, ["CROP_AREA is 0"]), (["--precision", "fp8"], 2, ["PRECISION 'fp8'"]), (["--run", "../../etc"], 2, ["RUN '../../etc'"])])
def test_constants_that_cannot_be(finished, capsys, argv, status, needles):
    refused(capsys, train_byol, pretraining(*argv), status, *needles)


def test_cuda_where_there_is_none(finished, capsys, monkeypatch):
    refused(capsys, train_byol, pretraining("--device", f"cuda:{torch.cuda.device_count()}"), 1, "DEVICE 'cuda:")


def test_folders_that_cannot_be(finished, capsys, monkeypatch):
    Path("empty").mkdir()
    refused(capsys, train_byol, pretraining("--dataset", "empty"), 1, "'empty' has neither unlabeled/ nor train/")
    Path("empty/unlabeled").mkdir()
    refused(capsys, train_byol, pretraining("--dataset", "empty"), 1, "empty/unlabeled holds no images")
    Path("empty/train").mkdir()
    refused(capsys, train_byol, pretraining("--dataset", "empty"), 1, "empty/train holds no class folders")
    Path("images/test/zebra").mkdir()
    refused(capsys, train_classifier, ["--run", "tiny", *QUICK], 1, "images/test/zebra", "'zebra' is not in images/train")
    Path("images/test/zebra").rmdir()
    Path("images/train/zebra").mkdir()
    refused(capsys, train_classifier, ["--run", "tiny", *QUICK], 1, "images/train/zebra holds no images")
    Path("images/train/zebra").rmdir()
    scandir, listdir = os.scandir, os.listdir

    def unreadable(split, function):  # file modes do not keep root from reading
        def read(path="."):
            if split in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path)
        return read

    monkeypatch.setattr(os, "scandir", unreadable("some/depth", scandir))
    refused(capsys, train_byol, pretraining(), 1, "images/unlabeled/some/depth cannot be read: Permission denied")
    monkeypatch.setattr(os, "scandir", unreadable("train", scandir))
    monkeypatch.setattr(os, "listdir", unreadable("train", listdir))
    refused(capsys, train_byol, pretraining(), 1, "images/train cannot be read: Permission denied")


@pytest.mark.parametrize("content", [b"", b"no image at all", "truncated", "other"])
def test_a_broken_image_among_many_is_skipped_and_named(tmp_path, small, capsys, content):
    write_folder(tmp_path / "images", unlabeled=120)
    file = tmp_path / "images/unlabeled/some/depth/7.png"
    if content == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
        content = file.read_bytes()[:2000]
    if content == "other":  # a mislabelled file
        Image.new("RGB", (20, 20)).save(tmp_path / "x.gif")
        content = (tmp_path / "x.gif").read_bytes()
    file.write_bytes(content)
    assert train_byol.main(["--dataset", "images", *TINY, "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert "skipped 1 of 120 images" in out and "7.png" in out and "BYOL: 119 images" in out


def test_more_broken_images_than_one_in_a_hundred(finished, capsys):
    Path("images/unlabeled/some/depth/3.png").write_bytes(b"")
    refused(capsys, train_byol, pretraining(), 1, "1 of 20 images in images/unlabeled cannot be read", "3.png")


def test_stl10_files_that_cannot_be(finished, capsys, monkeypatch):
    argv = pretraining("--dataset", "stl10", "--image-size", "32")
    folder = Path("data/stl10_binary")
    whole = (folder / "unlabeled_X.bin").read_bytes()
    for content in (whole[:-1], whole[:1000], b""):  # odd length, truncated, empty
        (folder / "unlabeled_X.bin").write_bytes(content)
        refused(capsys, train_byol, argv, 1, "data/stl10_binary/unlabeled_X.bin has", "bytes")
    (folder / "unlabeled_X.bin").write_bytes(whole)
    labels = (folder / "train_y.bin").read_bytes()
    for content, needle in ((labels[:-1], "19 labels for the 20 images"), (b"\0" + labels[1:], "labels from 0"),
                            (b"\x0b" + labels[1:], "labels from 1 to 11"), (b"", "0 labels for the 20 images")):
        (folder / "train_y.bin").write_bytes(content)
        refused(capsys, train_byol, argv, 1, "data/stl10_binary/train_y.bin", needle)
    (folder / "train_y.bin").unlink()

    def refuse(*args, **kwargs):
        raise OSError("<urlopen error [Errno 101] Network is unreachable>")

    monkeypatch.setattr(data, "download_and_extract_archive", refuse)
    refused(capsys, train_byol, argv, 1, "train_y.bin is missing", "unreachable", "data/stl10_binary", "--demo")


@pytest.mark.parametrize("content", ["0 1 2\n", "0 1 20\n" * 10, "0 one 2\n" * 10, "\n" * 10, None])
def test_stl10_folds_that_cannot_be(finished, capsys, content):
    folds = Path("data/stl10_binary/fold_indices.txt")
    folds.unlink() if content is None else folds.write_text(content)
    refused(capsys, train_classifier, ["--run", "new", *QUICK, "--init", "random", "--folds"], 1,
            "data/stl10_binary/fold_indices.txt")


class Code:
    """A pickle that would run code when it is loaded."""

    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize("make, needles", [
    (lambda path: None, ["INIT 'weights.pt' is neither"]),
    (lambda path: path.write_bytes(b"torn"), ["weights.pt is no weights file"]),
    (lambda path: torch.save(torchvision.models.resnet34().state_dict(), path), ["weights.pt do not fit ENCODER"]),
    (lambda path: torch.save({"x": Code()}, path), ["weights.pt is no weights file"]),
    (lambda path: torch.save({"model": {}, "optimizer": {}, "step": 1}, path), ["weights.pt is no state dict"])])
def test_weights_that_cannot_be(finished, capsys, monkeypatch, tmp_path, make, needles):
    monkeypatch.setattr(train_byol, "build_encoder", utils.build_encoder)
    make(tmp_path / "weights.pt")
    refused(capsys, train_byol, pretraining("--init", "weights.pt"), 1, *needles)
    assert not Path("executed").exists()


def test_imagenet_weights_offline(finished, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr(train_byol, "build_encoder", utils.build_encoder)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    refused(capsys, train_byol, pretraining("--init", "imagenet"), 1, "INIT 'imagenet'", "not known", "'random'")
    refused(capsys, train_byol, pretraining("--encoder", "vgg11"), 2, "ENCODER 'vgg11'")


def test_changed_constants_and_contradictions(finished, capsys):
    refused(capsys, train_byol, ["--dataset", "images", *TINY, "--run", "tiny", "--epochs", "9"], 1, "EPOCHS 2 -> 9",
            "a longer run is another run", "--overwrite")
    refused(capsys, train_classifier, ["--run", "tiny", *QUICK, "--image-size", "99"], 2, "--image-size 99 contradicts",
            "config.json", "16")
    refused(capsys, train_classifier, ["--run", "tiny", *QUICK, "--seeds", "0", "--crop-area", "0.9"], 1,
            "CROP_AREA 0.3 -> 0.9")
    assert train_classifier.main(["--run", "tiny", *QUICK, "--seeds", "0", "--crop-area", "0.9", "--epochs", "5"]) == 1
    err = capsys.readouterr().err
    assert "CROP_AREA 0.3 -> 0.9; set" in err and "longer run" not in err, "where lengths stand beside each other"


def test_a_config_that_is_not_ours(finished, capsys):
    Path("runs/tiny/config.json").write_text("[]")
    Path("runs/tiny/checkpoint.pt").unlink()
    for script in (train_byol, train_classifier):
        refused(capsys, script, ["--run", "tiny", "--device", "cpu"], 1, "runs/tiny/config.json cannot be read")


def test_a_checkpoint_says_which_run_it_belongs_to(stopped, capsys):
    """A config.json that went missing loses nothing and lets nothing be mixed up."""
    Path("runs/parts/config.json").unlink()
    refused(capsys, train_byol, [*stopped, "--seed", "9"], 1, "checkpoint.pt has other constants: SEED 0 -> 9; set")
    assert train_byol.main(stopped) == 0 and same(weights("whole"), weights("parts"))


@pytest.mark.parametrize("batchnorm", [None, "auto"])
def test_a_checkpoint_of_an_earlier_version_is_told_apart(stopped, capsys, batchnorm):
    """Its views were drawn from other numbers, and it knew fewer constants; a finished run needs neither."""
    for path in Path("runs").glob("*/checkpoint*.pt"):
        state = torch.load(path, weights_only=True)
        for key in ("version", "precision", "threads", "right_before"):
            del state[key]
        del state["constants"]["JITTER"]
        state["constants"].pop("BATCHNORM") if batchnorm is None else state["constants"].update(BATCHNORM=batchnorm)
        if "parts" in path.parts:
            state["constants"]["OPTIMIZER"] = "adamw"  # the version is told first: setting constants back would not help
        torch.save(state, path)
    refused(capsys, train_byol, stopped, 1, "checkpoint.pt is of an earlier version of this code", "--overwrite")
    whole = [*stopped[:-1], "whole"]
    assert train_byol.main(whole) == 0 and "is finished" in capsys.readouterr().out
    refused(capsys, train_byol, [*whole, "--seed", "9"], 1, "checkpoint.pt has other constants: SEED 0 -> 9; set")
    assert train_byol.main([*stopped, "--overwrite"]) == 0 and same(weights("whole"), weights("parts"))


def test_a_precision_that_was_auto_cannot_be_another_on_continuing(tmp_path, small, capsys):
    """The run goes on in its own, so that the flag would be ignored in silence."""
    write_folder(tmp_path / "images", unlabeled=20)
    argv = ["--dataset", "images", *TINY, "--run", "tiny", "--precision"]
    assert train_byol.main([*argv, "auto"]) == 0
    refused(capsys, train_byol, [*argv, "bf16"], 1, "PRECISION auto -> bf16")


def test_a_run_continues_with_its_number_of_threads(stopped, monkeypatch, capsys):
    begun = torch.load("runs/parts/checkpoint.pt", weights_only=True)["threads"]
    seen, choose = [], train_byol.choose_threads
    monkeypatch.setattr(train_byol, "choose_threads", lambda *args: seen.append(args[1]) or choose(*args))
    assert train_byol.main(stopped) == 0 and seen == [begun] == [torch.get_num_threads()]
    assert train_byol.main([*stopped, "--overwrite"]) == 0 and seen == [begun, None]


def test_a_run_continues_in_its_own_precision(tmp_path, small, monkeypatch):
    """Where `auto` is fp32 on the machine that began it, and bf16 on the one that continues it."""
    write_folder(tmp_path / "images", unlabeled=20)
    auto = ["--dataset", "images", *TINY, "--precision", "auto", "--run"]
    monkeypatch.setattr(utils, "has_native_bf16", lambda device: False)
    assert train_byol.main([*auto, "whole"]) == 0
    step, steps = train_byol.train_step, []

    def interrupted(*args):
        steps.append(args[-1])
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(train_byol, "train_step", interrupted)
    assert train_byol.main([*auto, "parts"]) == 143
    monkeypatch.setattr(utils, "has_native_bf16", lambda device: True)
    assert train_byol.main([*auto, "parts"]) == 0 and steps == 4 * [torch.float32]
    assert same(weights("whole"), weights("parts"))


def test_a_dataset_that_changed_since_the_run_began(stopped, capsys):
    Image.new("RGB", (20, 20)).save("images/unlabeled/new.png")
    refused(capsys, train_byol, stopped, 1, "has 21 images, and 20 when runs/parts was begun")


def test_sick_weights_are_never_saved(stopped, monkeypatch, capsys):
    step = train_byol.train_step

    def sick(network, model, *rest):
        loss = step(network, model, *rest)  # still finite: it was computed before the update
        with torch.no_grad():
            next(model.parameters()).fill_(float("inf"))
        return loss

    before = Path("runs/parts/checkpoint.pt").read_bytes()
    monkeypatch.setattr(train_byol, "train_step", sick)
    assert train_byol.main(stopped) == 1
    assert "weights are no longer finite after step 4" in capsys.readouterr().err
    assert Path("runs/parts/checkpoint.pt").read_bytes() == before and not Path("runs/parts/encoder.pt").exists()


def test_a_full_disk_at_the_very_end_can_be_mended(tmp_path, small, monkeypatch):
    """A run is finished only once its encoder is there."""
    write_folder(tmp_path / "images", unlabeled=20)
    argv = ["--dataset", "images", *TINY, "--checkpoint-minutes", "0"]
    save = runs.save_torch

    def full(path, content):
        raise utils.UserError("disk full")

    monkeypatch.setattr(runs, "save_torch", full)
    assert train_byol.main(argv) == 1 and not Path("runs/byol/encoder.pt").exists()
    monkeypatch.setattr(runs, "save_torch", save)
    assert train_byol.main(argv) == 0 and Path("runs/byol/encoder.pt").exists()


def test_a_finished_run_stays_finished_without_its_checkpoints(finished, capsys):
    """They are large, and users delete them."""
    for path in Path("runs/tiny").glob("checkpoint*.pt"):
        path.unlink()
    argv = ["--dataset", "images", *TINY, "--run", "tiny"]
    before = {path: path.read_bytes() for path in Path("runs/tiny").iterdir()}
    assert train_byol.main(argv) == 0 and "runs/tiny is finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in Path("runs/tiny").iterdir()} == before
    refused(capsys, train_byol, [*argv, "--seed", "7"], 1, "config.json has other constants: SEED 0 -> 7")
    assert train_byol.main([*argv, "--overwrite"]) == 0 and Path("runs/tiny/checkpoint.pt").exists()


def test_a_run_folder_that_cannot_be_written(tmp_path, small, capsys):
    write_folder(tmp_path / "images")
    Path("runs").write_text("a file")
    assert train_byol.main(["--dataset", "images", *TINY]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: cannot write runs/byol/.lock") and err.endswith("run the same command again\n")
    assert err.count("\n") == 1
    assert train_byol.main(["--dataset", "images", *TINY, "--overwrite"]) == 1
    assert capsys.readouterr().err.endswith("run the same command again\n"), "nothing was begun anew"


# ------------------------------------------------------------------------------------------------ torn checkpoints

@pytest.fixture
def stopped(tmp_path, small, monkeypatch):
    """A run `parts` that was stopped after step 3 of 4, with a checkpoint after each step; and `whole`, which was not."""
    write_folder(tmp_path / "images", unlabeled=20)
    argv = ["--dataset", "images", *TINY, "--checkpoint-minutes", "0", "--run"]
    assert train_byol.main([*argv, "whole"]) == 0
    step, calls = train_byol.train_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(train_byol, "train_step", interrupted)
    assert train_byol.main([*argv, "parts"]) == 130
    return [*argv, "parts"]


@pytest.mark.parametrize("tear", [lambda data: data[:-1000], lambda data: b"", lambda data: b"foreign"])
def test_the_previous_checkpoint_serves_for_a_torn_one(stopped, capsys, tear):
    path = Path("runs/parts/checkpoint.pt")
    path.write_bytes(tear(path.read_bytes()))
    capsys.readouterr()
    assert train_byol.main(stopped) == 0
    out = capsys.readouterr().out
    assert "checkpoint.pt is torn" in out and "from step " in out
    assert same(weights("whole"), weights("parts")) and without_timings("whole") == without_timings("parts")


@pytest.mark.parametrize("renames", [0, 1])
def test_a_crash_between_the_renames_of_a_checkpoint_loses_nothing(stopped, monkeypatch, capsys, renames):
    """checkpoint.next.pt is whole then, and the latest."""
    state = torch.load("runs/parts/checkpoint.pt", weights_only=True)
    replace, done = os.replace, []

    def dies(source, target):
        if not str(source).endswith(".tmp"):
            done.append(source)
            if len(done) > renames:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(runs.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        runs.save_checkpoint(Path("runs/parts"), state | {"step": state["step"], "images": 20})
    monkeypatch.setattr(runs.os, "replace", replace)
    assert Path("runs/parts/checkpoint.next.pt").exists()
    assert runs.read_checkpoint(Path("runs/parts"))["step"] == 3
    assert "torn" not in capsys.readouterr().out


def test_without_any_whole_checkpoint_nothing_is_overwritten(stopped, capsys):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        Path("runs/parts", name).write_bytes(b"torn")
    refused(capsys, train_byol, stopped, 1, "no checkpoint in runs/parts can be read", "--overwrite")


def test_a_torn_row_of_metrics_is_cut(stopped):
    with open("runs/parts/metrics.csv", "a") as file:
        file.write("2,0.")
    assert train_byol.main(stopped) == 0
    assert without_timings("whole") == without_timings("parts")


# ------------------------------------------------------------------------------------------------------- full disks

@contextlib.contextmanager
def full_disk(limit):
    """Inside, no file grows beyond `limit` bytes: the system refuses what lies behind, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_during_a_checkpoint(stopped, capsys):
    before = Path("runs/parts/checkpoint.pt").read_bytes()
    capsys.readouterr()
    with full_disk(len(before) // 2):
        assert train_byol.main(stopped) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: cannot write runs/parts/")
    assert Path("runs/parts/checkpoint.pt").read_bytes() == before
    assert not list(Path("runs/parts").glob("*.tmp"))
    assert train_byol.main(stopped) == 0 and same(weights("whole"), weights("parts"))


def test_a_disk_that_fills_up_during_a_row_of_metrics(stopped, monkeypatch, capsys):
    before = Path("runs/parts/checkpoint.pt").read_bytes()
    with full_disk(Path("runs/parts/metrics.csv").stat().st_size + 10), monkeypatch.context() as patch:
        for name in ("plot_views", "write_json"):  # larger than that
            patch.setattr(train_byol, name, lambda *args: None)
        capsys.readouterr()
        assert train_byol.main(stopped) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: cannot write runs/parts/metrics.csv")
    assert Path("runs/parts/checkpoint.pt").read_bytes() == before
    assert train_byol.main(stopped) == 0 and without_timings("whole") == without_timings("parts")


def test_a_disk_that_fills_up_during_the_cache_of_a_folder(tmp_path, small, capsys):
    write_folder(tmp_path / "images", unlabeled=60)
    argv = ["--dataset", "images", *TINY]
    with full_disk(20_000):
        refused(capsys, train_byol, argv, 1, "error: cannot write the image cache data/cache/")
    assert not list(Path("data/cache").glob("*unlabeled*"))
    assert train_byol.main(argv) == 0 and len(rows("byol")) > 0


# ---------------------------------------------------------------------------------------------------- other troubles

def test_a_second_writer_is_refused_while_the_first_lives(stopped, capsys):
    holder = subprocess.Popen([sys.executable, "-c", f"""
import sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from runs import only_writer, run_folder
with only_writer(run_folder("parts")):
    print("held", flush=True)
    time.sleep(600)"""], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        refused(capsys, train_byol, stopped, 1, "runs/parts is being written by another process")
    finally:
        holder.kill()
        holder.wait()
    assert train_byol.main(stopped) == 0, "the lock of a dead process is no obstacle"


def test_a_reader_who_leaves_ends_the_run_without_a_traceback(tmp_path):
    write_folder(tmp_path / "images", unlabeled=20)
    # As in a user's shell: where output is buffered, Python flushes what is left of it when it exits, and complains.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen([sys.executable, "-c", f"""
import sys
sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "tests")!r}]
import train_byol
from conftest import small_encoder
train_byol.build_encoder = small_encoder
sys.exit(train_byol.main({["--dataset", "images", *TINY, "--epochs", "400"]}))"""],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    lines = [process.stdout.readline() for _ in range(3)]
    assert [line.partition(" ")[0] for line in lines] == ["decoding", "decoding", "BYOL:"]
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 128 + signal.SIGPIPE


@pytest.mark.parametrize("error", ["utils.Stopped('stopped after a step', 2)", "KeyboardInterrupt"])
def test_a_reader_who_leaves_with_the_run_meets_no_traceback(error):
    """Ctrl-C in `python train_byol.py | tee log` ends tee, too."""
    readers_end, writers_end = os.pipe()
    os.close(readers_end)
    done = subprocess.run([sys.executable, "-c", f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import train_byol, utils
def run(c):
    raise {error}
sys.exit(utils.run_script(vars(train_byol) | {{"run": run}}, []))"""], stdout=writers_end, stderr=subprocess.PIPE, text=True)
    os.close(writers_end)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_file_system_without_locks_is_written_all_the_same(stopped, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", refuse)
    assert train_byol.main(stopped) == 0


def test_a_run_that_was_not_begun_anew_is_not_continued_in_its_place(stopped, monkeypatch, capsys):
    """Ctrl-C with --overwrite: before the old run is gone, the same command is the very same."""
    def interrupted(*args):
        raise KeyboardInterrupt

    for name, again in (("load_images", "from there\n"), ("plot_views", "from there (without --overwrite)\n")):
        with monkeypatch.context() as patch:
            patch.setattr(train_byol, name, interrupted)
            assert train_byol.main([*stopped, "--overwrite"]) == 130 and capsys.readouterr().out.endswith(again)


def test_a_second_interrupt_stops_at_once(stopped, monkeypatch, capsys):
    def twice(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun repeats what the terminal sent: still the first
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    before = Path("runs/parts/checkpoint.pt").read_bytes()
    monkeypatch.setattr(train_byol, "train_step", twice)
    assert train_byol.main(stopped) == 143 and "stopped at once" in capsys.readouterr().out
    assert Path("runs/parts/checkpoint.pt").read_bytes() == before


def test_collapse_is_warned_of_once(tmp_path, small, monkeypatch, capsys):
    write_folder(tmp_path / "images", unlabeled=20)
    step = train_byol.train_step

    def collapsed(network, model, *rest):
        loss = step(network, model, *rest)
        model.spread.zero_()
        return loss

    monkeypatch.setattr(train_byol, "train_step", collapsed)
    assert train_byol.main(["--dataset", "images", *TINY, "--log-every", "1"]) == 0
    assert capsys.readouterr().out.count("warning: the embeddings collapse") == 1
