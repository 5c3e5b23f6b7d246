"""What README.md and the pages beside it name is there."""
import re
import zipfile
from pathlib import Path

import pytest

import tiny_imagenet_10

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_readmes_own_test_command():
    assert "grep -m1 -e '-m pytest' README.md" in (ROOT / ".ci" / "run").read_text()
    command = next(line for line in README.splitlines() if "-m pytest" in line)
    assert command.startswith("python3 -m venv") and "pip install" in command


def test_pictures_and_files_that_the_pages_name_exist():
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (ROOT / target).exists(), f"{target}, in {page.name}"


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.S))
def test_snippets_are_python(snippet):
    compile(snippet, "README.md", "exec")


def test_tiny_imagenet_10_is_built_from_an_archive_of_its_layout(tmp_path):
    (tmp_path / "list.txt").write_text("# synset class images\nn1 bird rtu.\nn2 - ..uu\n")
    with zipfile.ZipFile(tmp_path / "tiny.zip", "w") as archive:
        for synset in ("n1", "n2"):
            for number in range(4):
                archive.writestr(f"tiny-imagenet-200/train/{synset}/images/{synset}_{number}.JPEG", f"{synset} {number}")
    tiny_imagenet_10.build(tmp_path / "tiny.zip", tmp_path / "out", tmp_path / "list.txt")
    found = {str(file.relative_to(tmp_path / "out")): file.read_text() for file in (tmp_path / "out").rglob("*.JPEG")}
    assert found == {"train/bird/n1_0.JPEG": "n1 0", "test/bird/n1_1.JPEG": "n1 1", "unlabeled/n1_2.JPEG": "n1 2",
                     "unlabeled/n2_2.JPEG": "n2 2", "unlabeled/n2_3.JPEG": "n2 3"}
    letters = "".join(line.split()[2] for line in tiny_imagenet_10.LIST.read_text().splitlines()[2:])
    assert [letters.count(letter) for letter in "rtu"] == [5000, 8000, 50000]
