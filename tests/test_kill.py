"""The short form of tests/kill.py: a small encoder, two kills."""
import sys

from kill import kill_often
from test_data import write_folder
from test_train_byol import REPOSITORY, TINY


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_left_alone(tmp_path):
    write_folder(tmp_path / "images", per_class=5, unlabeled=200)
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "tests")!r}]
import plots, train_byol, utils
from conftest import small_encoder
train_byol.build_encoder = small_encoder
plots.save_figure = lambda figure, path: utils.write_json(path, "undrawn")
sys.exit(train_byol.main(sys.argv[1:]))
""")
    flags = ["--dataset", "images", *TINY, "--epochs", "8", "--checkpoint-minutes", "0.002"]
    counts = kill_often([sys.executable, str(script), *flags], tmp_path, moments=["training", "writing"], seconds=0.3)
    assert counts["killed"] == counts["continued"] == 2 and counts["runs"] == 1, counts
