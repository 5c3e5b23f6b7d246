"""Kill a pretraining run again and again, and see that nothing is lost: `python tests/kill.py [KILLS]` (50: 20 min).

The run is the demo with a checkpoint every three seconds. Each time it is killed (SIGKILL) at a random moment: while it
starts, while it trains, or inside the write of a checkpoint; then the same command continues it. In the end its encoder
must equal that of a run left alone bit for bit, and metrics.csv, whose rows beyond the checkpoint are written anew, in
every column but the timings. Prints what happened, exits 1 if anything differs. tests/test_kill.py is its short form.
"""
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SCRIPT = Path(__file__).resolve().parent.parent / "train_byol.py"
MOMENTS = ["starting", "training", "writing"]


def wait_for(condition, process: subprocess.Popen, timeout: float = 120) -> bool:
    """Poll until the condition holds; False where the process ended or the time is over first."""
    end = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.002)
    return False


def kill_often(command: list[str], folder: Path, moments: list[str], seconds: float) -> dict[str, int]:
    """Run `command --run whole` once and `command --run killed-0` with a kill at each of the moments (starting,
    training, writing); a run that ends is followed by another. seconds: the longest training between two kills. Raises
    AssertionError where a killed run ends otherwise than the whole one."""
    rng = random.Random(0)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as a user's shell
    environment.setdefault("OMP_NUM_THREADS", "1")  # equal bit for bit at equally many threads; two run at once
    counts = dict(killed=0, starting=0, training=0, writing=0, continued=0, runs=0)
    whole = subprocess.Popen([*command, "--run", "whole"], cwd=folder, stdout=subprocess.DEVNULL, env=environment)
    while True:
        run, output = folder / "runs" / f"killed-{counts['runs']}", folder / "output"
        saved, writing = run / "checkpoint.pt", run / "checkpoint.pt.tmp"
        left = counts["killed"] < len(moments)
        with open(output, "w") as out:
            process = subprocess.Popen([*command, "--run", run.name], cwd=folder, stdout=out, env=environment)
        if left:
            moment = moments[counts["killed"]]
            if moment == "starting":
                time.sleep(rng.uniform(0, 4))
            elif wait_for(lambda: "BYOL:" in output.read_text() and (moment == "writing" or saved.exists()), process):
                time.sleep(rng.uniform(0, seconds))
                if moment == "writing" and wait_for(writing.exists, process):
                    time.sleep(rng.uniform(0, 0.05))
            if process.poll() is None:
                moment = "writing" if writing.exists() else moment if moment != "writing" else "training"
                process.kill()
                counts["killed"] += 1
                counts[moment] += 1
        process.wait()
        counts["continued"] += "from step" in output.read_text()
        if process.returncode == 0:
            assert whole.wait() == 0
            compare(folder / "runs" / "whole", run)
            counts["runs"] += 1
            assert counts["runs"] <= len(moments), f"runs end before they can be killed: {counts}"
            if not left:
                return counts
        else:
            assert process.returncode == -9, f"{run.name} ended with {process.returncode}"


def compare(whole: Path, killed: Path) -> None:
    """Assert that two runs ended with the same encoder and the same metrics, timings aside."""
    a, b = (torch.load(run / "encoder.pt", weights_only=True) for run in (whole, killed))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), f"{killed.name}: other weights"
    rows = []
    for run in (whole, killed):
        with open(run / "metrics.csv", newline="") as file:
            rows.append([{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)])
    assert rows[0] == rows[1], f"{killed.name}: other metrics"


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as folder:
        counts = kill_often([sys.executable, str(SCRIPT), "--demo", "--checkpoint-minutes", "0.05"], Path(folder),
                            moments=random.Random(0).choices(MOMENTS, weights=[1, 3, 2], k=kills), seconds=8)
    print(f"{counts['killed']} kills: {counts['starting']} while starting, {counts['training']} while training, "
          f"{counts['writing']} inside the write of a checkpoint; {counts['continued']} restarts continued from a "
          f"checkpoint; {counts['runs']} runs ended, each as the run left alone: encoder.pt and metrics.csv are equal")


if __name__ == "__main__":
    main()
