"""README.md says what the code says."""
import re
from pathlib import Path

import pytest

import train_byol
import train_classifier
from utils import read_constants

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", [train_byol, train_classifier])
def test_every_constant_stands_in_the_readme_with_its_default_and_meaning(script):
    of_byol, of_classifier = README.split("## Constants")[1].split("`train_classifier.py`;")
    table = of_byol if script is train_byol else of_classifier
    listed = {name: (float(value) if re.fullmatch(r"[\d.e-]+", value) else value, meaning.replace("&lt;", "<"))
              for name, value, meaning in re.findall(r"^\| `([A-Z_]+)` \| `(.*?)` \| (.*) \|$", table, re.M)}
    source = Path(script.__file__).read_text()
    names = [name for name in vars(read_constants(vars(script), [])) if name.isupper()]
    for name in names:
        default = getattr(script, name)
        default = (",".join(map(str, default)) if isinstance(default, tuple) else str(default) if isinstance(default, bool)
                   else default)
        meaning = re.search(rf"^{name} = .*?  # (.*)$", source, re.M).group(1)
        assert listed[name] == (default, meaning)
    assert len(listed) == len(names)


def test_ci_runs_the_readmes_own_test_command():
    assert "grep -m1 -e '-m pytest' README.md" in (ROOT / ".ci" / "run").read_text()
    command = next(line for line in README.splitlines() if "-m pytest" in line)
    assert command.startswith("python3 -m venv") and "pip install" in command


def test_pictures_and_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.S))
def test_snippets_are_python(snippet):
    compile(snippet, "README.md", "exec")
