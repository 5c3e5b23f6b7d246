"""What README.md and the pages beside it name is there."""
import re
from pathlib import Path

import pytest

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
