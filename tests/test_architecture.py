"""The layout's rules: who may import whom, how long files and functions may be, and names that would shadow a module."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "cosmos_hf"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "pipelines").glob("*.py"), *(ROOT / "training").glob("*.py")])

MAY_IMPORT = {
    "models": set(),
    "schedulers": set(),
    "conditioning": set(),
    "nano": set(),
    "data": {"conditioning"},
    "worlds": {"data", "conditioning"},
    "pipelines": {"models", "schedulers", "conditioning", "data", "nano"},
    "evaluation": {"conditioning", "data"},
    "training": {"models", "schedulers", "conditioning", "data", "evaluation"},
    "convert": {"models"},
}
MAX_FILE, MAX_FUNCTION, MAX_MAIN = 450, 60, 120
LONG_NAMES = {"forward", "__call__", "fit", "fit_adversarial", "main", "__init__"}


def parts_of(path):
    return path.relative_to(PACKAGE).parts


def imported_parts(path):
    """The sub-packages of cosmos_hf that a source file imports, at its top or inside a function."""
    package = ["cosmos_hf", *parts_of(path)[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*base, *(node.module or "").split(".")]).strip(".")]
            if node.level and not node.module:
                names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            steps = name.split(".")
            if steps[0] == "cosmos_hf":
                yield steps[1] if len(steps) > 1 else "the package itself"


@pytest.mark.parametrize("path", [p for p in SOURCES if len(parts_of(p)) > 1], ids=lambda p: "/".join(parts_of(p)))
def test_imports_follow_the_layout(path):
    part = parts_of(path)[0]
    foreign = set(imported_parts(path)) - {part} - MAY_IMPORT[part]
    assert not foreign, f"{path} imports {sorted(foreign)}; {part} may import only {sorted(MAY_IMPORT[part])}"


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE, f"{path} is over {MAX_FILE} lines: split it by content"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            limit = MAX_MAIN if node.name in LONG_NAMES else MAX_FUNCTION
            length = node.end_lineno - node.lineno + 1
            assert length <= limit, f"{path}:{node.lineno} {node.name} has {length} lines, over {limit}"


def test_scripts_hold_no_mechanism():
    """A script is a sentence: no class in it, and nothing imports it."""
    for path in SCRIPTS:
        assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)], path
        assert "def main(argv=None)" in path.read_text(), f"{path} needs `def main(argv=None)`"


def test_script_names_shadow_nothing():
    """A script's folder is first on sys.path: a file there named like a module would be imported in its place."""
    for folder in ("pipelines", "training"):
        for path in (ROOT / folder).iterdir():
            name = path.stem
            if name.startswith((".", "_")):
                continue
            assert name not in sys.stdlib_module_names, path
            assert importlib.util.find_spec(name) is None, f"{path} shadows the module {name}"


def test_vague_file_names_are_refused():
    vague = {"utils.py", "misc.py", "common.py", "base.py", "helpers.py"}
    assert not [p for p in SOURCES if p.name in vague]


def test_import_is_lazy_and_fast():
    code = (
        "import sys, time; t = time.perf_counter(); import cosmos_hf; spent = time.perf_counter() - t;"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; assert spent < 0.1, spent; assert 'CosmosVideo2WorldPipeline' in dir(cosmos_hf)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves():
    import cosmos_hf

    for name in cosmos_hf.__all__:
        assert getattr(cosmos_hf, name).__module__.startswith("cosmos_hf."), name
    with pytest.raises(AttributeError, match="public names"):
        cosmos_hf.CosmosNothing  # noqa: B018
