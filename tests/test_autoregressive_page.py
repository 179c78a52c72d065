"""The page on autoregressive models: its code runs from top to bottom, and the files that it names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "autoregressive.md").read_text()


def test_code_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, blocks = {}, re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "autoregressive.md", "exec"), namespace)
    assert namespace["video"].shape == (1, 3, 25, 32, 32) and namespace["two"].shape == (2, 48)


def test_named_files_exist():
    named = re.findall(r"(?:training|pipelines|docs|tests|src)/[\w./-]+\.(?:py|yaml)", PAGE)
    assert len(named) > 5 and not [name for name in named if not (ROOT / name).exists()]
