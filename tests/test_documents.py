"""What the README and the model cards say runs, and their figures are those that were measured."""

import json
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from cosmos_hf.data.video import write_video
from cosmos_hf.training.config import read_yaml
from cosmos_hf.training.diffusion import DiffusionConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SETUP = (ROOT / "setup.cfg").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.S), ids=lambda code: code[:30])
def test_code_of_the_readme_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    exec(compile(code, "README", "exec"), {})


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_code_of_the_pages_runs(page, tmp_path, monkeypatch):
    """The blocks of a page share their variables, in order; the files that it names are there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    text, variables = page.read_text(), {}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(code, page.name, "exec"), variables)
    named = re.findall(r"(?:training|pipelines|docs|model_cards|tests|src)/[\w./-]+\.(?:py|yaml|md|png)", text)
    assert not [name for name in named if not (ROOT / name).exists()]


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


def test_scripts_and_files_that_the_readme_names_exist():
    named = re.findall(r"(?:training|pipelines|docs|model_cards|tests|src)/[\w./-]+\.(?:py|yaml|md|png)", README)
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    """As a reader would run them one after the other, on a few tiny clips and with few steps."""
    for name in ("training", "pipelines", "setup.cfg"):
        (tmp_path / name).symlink_to(ROOT / name)
    for split in ("train", "val_iid"):
        write_clips(tmp_path / "datasets" / "tabletop" / split)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|bash)\n(.*?)```", page.read_text(), flags=re.S)
    assert blocks
    for language, code in blocks:
        if language == "python":
            exec(compile(code, page.name, "exec"), {})
        else:
            for line in code.strip().splitlines():
                run_command(shlex.split(line))


def write_clips(folder):
    for i in range(3):
        frames = torch.full((3, 13, 48, 64), 60 + 40 * i, dtype=torch.uint8)
        for t in range(13):
            frames[0, t, 10:30, 2 * t : 2 * t + 20] = 200
        write_video(folder / f"{i}.mp4", frames, 5, crf=12)
        (folder / f"{i}.txt").write_text(f"A red square moves over grey {i}.")
        actions = np.full((12, 7), 0.1 * i)
        actions[:, 6] = np.arange(12) % 2
        camera = dict(intrinsics=[[50, 0, 32], [0, 50, 24], [0, 0, 1.0]], extrinsics=np.tile(np.eye(4), (13, 1, 1)))
        np.savez(folder / f"{i}.npz", actions=actions, **camera)


def run_command(words):
    """A line of a bash block, in this process: training for two steps; what needs several GPUs is only read."""
    if words[:2] == ["pip", "install"]:
        assert all(extra in SETUP for extra in re.findall(r"\w+", " ".join(re.findall(r"\[(.*?)\]", words[-1]))))
        return
    several = "--config_file" in words
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert not several or Path(words[words.index("--config_file") + 1]).exists()
    arguments = words[script + 1 :]
    if several:
        read_yaml(DiffusionConfig, arguments[arguments.index("--config") + 1])
        return
    if words[script].startswith(("training/train", "training/pretrain", "training/posttrain")):
        arguments += ["--max_steps", "2", "--log_every", "1", "--progress", "false"]
    runpy.run_path(words[script])["main"](arguments)


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


def leaves(node):
    """All means of an evaluation."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "mean" and isinstance(value, float):
                yield value
            else:
                yield from leaves(value)
