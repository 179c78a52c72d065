"""What the README and the model cards say runs, and their figures are those that were measured."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SETUP = (ROOT / "setup.cfg").read_text()
OF_TRAINING = {"training", "posttraining"}  # in test_training_pages.py
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem not in OF_TRAINING]
SHARED_OPTIONS = (ROOT / "src" / "cosmos_hf" / "pipelines" / "scripting.py").read_text()  # of several scripts
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.S), ids=lambda code: code[:30])
def test_code_of_the_readme_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    exec(compile(code, "README", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """All blocks of a page in turn, in one namespace; each script that it calls exists and knows the arguments."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    text, names = page.read_text(), {}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(code, page.name, "exec"), names)
    for script, arguments in re.findall(r"python ((?:pipelines|training)/\w+\.py)(.*)", text):
        source = (ROOT / script).read_text() + SHARED_OPTIONS
        assert not [name for name in re.findall(r"--\w+", arguments) if f'"{name}"' not in source], script


def test_the_table_of_solvers_is_what_was_measured():
    """docs/sampling.md shows the figures of benchmarks/results/sampler.json."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "sampler.json").read_text())
    text = (ROOT / "docs" / "sampling.md").read_text()
    table = re.search(r"<!-- table -->(.*?)<!-- end -->", text, flags=re.S)[1]
    problems = {
        "toy `lin`": measured["toy"]["lin"],
        "toy `gm`": measured["toy"]["gm"],
        "nano": measured["nano"]["distance"],
    }
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.strip().splitlines()]
    counts = rows[0][2:]
    for problem, method, *figures in rows[2:]:
        assert figures == [f"{problems[problem][method][count]:.3f}" for count in counts], (problem, method)
    assert len(rows) == 2 + 9


def test_the_table_of_rollouts_is_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "rollout.json").read_text())["ways"]
    text = (ROOT / "docs" / "sampling.md").read_text()
    rows = re.search(r"<!-- rollout -->\n(.*?)\n<!-- end -->", text, flags=re.S)[1].splitlines()[2:]
    assert len(rows) == len(measured)
    for row in rows:
        way, *figures = (cell.strip() for cell in row.strip("| ").split("|"))
        names = ("sharpness_ratio", "colour_shift", "seam")
        assert figures == [f"{measured[way][name]:.3f}" for name in names], way


def test_the_table_of_shortcuts_is_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "shortcuts.json").read_text())["ways"]
    text = (ROOT / "docs" / "hardware.md").read_text()
    rows = re.search(r"<!-- shortcuts -->\n(.*?)\n<!-- end -->", text, flags=re.S)[1].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]
    assert cells == [
        [way["way"], f"{way['speed']:.2f}", f"{way['computed']:.2f}", f"{way['psnr']:.1f}", f"{way['worst']:.1f}"]
        for way in measured
    ]


def test_scripts_and_files_that_the_readme_names_exist():
    named = re.findall(r"(?:training|pipelines|docs|model_cards|tests|src)/[\w./-]+\.(?:py|yaml|md|png)", README)
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_a_card_has_front_matter_and_measured_figures(card):
    """Every figure of the card's table of results stands in the evaluation beside it."""
    text = card.read_text()
    assert text.startswith("---\nlicense: ") and "library_name: cosmos-hf" in text
    measured = (card.parent / "evaluation.json").read_text()
    means = {f"{leaf:.2f}" for leaf in leaves(json.loads(measured))}
    table = re.search(r"<!-- results -->(.*?)<!-- end -->", text, flags=re.S)[1]
    quoted = re.findall(r"\d+\.\d\d", table)
    assert len(quoted) >= 8
    assert not [figure for figure in quoted if figure not in means]


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.parent.name)
def test_a_card_names_no_folder_of_one_machine(card):
    for file in card.parent.glob("*.json*"):
        assert not re.search(r'"/\w', file.read_text()), file


def leaves(node):
    """All means of an evaluation."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "mean" and isinstance(value, float):
                yield value
            else:
                yield from leaves(value)
