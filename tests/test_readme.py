"""What README.md and RESULTS.md say is true, as far as it can be read from the code and the files beside them."""
import re
import shlex
import zipfile
from pathlib import Path

import pytest

import tiny_imagenet_10
import train_byol
import train_classifier
from utils import read_constants

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {"train_byol.py": train_byol, "train_classifier.py": train_classifier}


def test_ci_runs_the_readmes_own_test_command():
    assert "grep -m1 -e '-m pytest' README.md" in (ROOT / ".ci" / "run").read_text()
    command = next(line for line in README.splitlines() if "-m pytest" in line)
    assert command.startswith("python3 -m venv") and "pip install" in command


@pytest.mark.parametrize("page", ["README.md", "RESULTS.md"])
def test_pictures_files_and_headings_that_the_pages_name_exist(page):
    for target in re.findall(r"\]\(([^):]+)\)", (ROOT / page).read_text()):
        file, _, anchor = target.partition("#")
        assert (ROOT / (file or page)).exists(), target
        headings = re.findall(r"^#+ (.*)", (ROOT / (file or page)).read_text(), re.M) if anchor else []
        assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings] + [""]


@pytest.mark.parametrize("page", ["README.md", "RESULTS.md"])
def test_the_pages_commands_are_understood(page):
    commands = re.findall(r"python (train_\w+\.py)((?: [^\s&|`;…]+)*)", (ROOT / page).read_text())
    assert commands
    for script, flags in commands:
        read_constants(vars(SCRIPTS[script]), shlex.split(flags.replace("$S", "0")))


def test_the_recipes_table_holds_the_scripts_values():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", README, re.M)
    assert train_byol.RECIPE.keys() <= {name for name, *_ in rows}
    for name, *texts in rows:
        values = train_byol.RECIPE.get(name) or [getattr(train_byol, name)] * 2
        assert [train_byol.KINDS[name](text) for text in texts] == list(values[:2]), name


def test_the_files_to_read_are_all_there_and_as_long_as_the_readme_says():
    lengths = dict(re.findall(r"`(\w+\.py)` \((\d+)", README))
    assert lengths.keys() == {file.name for file in ROOT.glob("*.py")}
    for name, length in lengths.items():
        lines = (ROOT / name).read_text().count("\n")
        assert abs(int(length) - lines) <= 0.15 * lines, f"{name} has {lines} lines"


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.S))
def test_snippets_are_python(snippet):
    compile(snippet, "README.md", "exec")


def test_tiny_imagenet_10_is_built_from_an_archive_of_its_layout(tmp_path):
    (tmp_path / "list.txt").write_text("# synset class images\nn1 bird rtu.\nn2 - ..uu\n")
    with zipfile.ZipFile(tmp_path / "tiny.zip", "w") as archive:
        for synset in ("n1", "n2"):
            for number in range(4):
                name = f"tiny-imagenet-200/train/{synset}/images/{synset}_{number}.JPEG"
                archive.writestr(name, f"{synset} {number}")
    tiny_imagenet_10.build(tmp_path / "tiny.zip", tmp_path / "out", tmp_path / "list.txt")
    found = {str(file.relative_to(tmp_path / "out")): file.read_text() for file in (tmp_path / "out").rglob("*.JPEG")}
    assert found == {"train/bird/n1_0.JPEG": "n1 0", "test/bird/n1_1.JPEG": "n1 1", "unlabeled/n1_2.JPEG": "n1 2",
                     "unlabeled/n2_2.JPEG": "n2 2", "unlabeled/n2_3.JPEG": "n2 3"}
    letters = "".join(line.split()[2] for line in tiny_imagenet_10.LIST.read_text().splitlines()[2:])
    assert [letters.count(letter) for letter in "rtu"] == [5000, 8000, 50000]
