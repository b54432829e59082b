"""Policy: who imports whom, and what the wheel holds."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from commands import run_module
from sweeps import SMALL

import ich
from ich.base.config import CONF_DIR

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "ich"
ENTRY = "an entry point"
# Which packages each one may import; an entry point and the benchmarks may import all, and nothing
# imports them.
BELOW = {"base": ""}
BELOW |= {"data": "base", "scoring": "base", "tracking": "scoring base"}
BELOW |= {"training": "tracking scoring data base", "pages": "scoring data base"}
BELOW |= dict.fromkeys(("inference", "launch"), "training tracking pages scoring data base")
BELOW |= dict.fromkeys(("benchmarks", ENTRY), "inference launch benchmarks " + BELOW["launch"])
# Beside the package, in a clone and in the sdist alike.
FRESH_CLONE = (
    *("README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE"),
    *("Makefile", "pyproject.toml", "constraints.txt", "mkdocs.yml", ".ci/run"),
)
# The only places that may import each library; the benchmarks compare with several.
HOMES = {
    "hydra": {ENTRY, "launch", "base.config"},
    "mlflow": {"tracking"},
    "timm": {"training.model"},
    "pydicom": {"data.dicom", "data.phantom"},
    "iterstrat": {"data.protocol"},
    "captum": {"inference.gradcam"},
    "jinja2": {"pages"},
    "onnxruntime": {"inference.session"},
}


def imports_of(path: Path) -> set[str]:
    """Every module named by an import statement, at any depth of the syntax tree."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def floor_of(module: str) -> str:
    return module.split(".")[0] if "." in module else ENTRY


MODULES = {module_of(p): imports_of(p) for p in PACKAGE.rglob("*.py") if p.stem != "__init__"}
TREES = {module_of(p): ast.parse(p.read_text()) for p in PACKAGE.rglob("*.py")}
# Module -> the modules of ich that it imports; `ich.a.b.name` is of the module `a.b`.
ARROWS = {
    module: {m for n in names for m in MODULES if f"{n}.".startswith(f"ich.{m}.")}
    for module, names in MODULES.items()
}


def test_packages_import_only_what_is_below_them() -> None:
    for module, names in ARROWS.items():
        own = floor_of(module)
        for floor in {floor_of(name) for name in names} - {own}:
            assert floor in BELOW[own].split(), f"ich.{module} imports {floor}"
        assert own == ENTRY or ENTRY not in map(floor_of, names), module


def test_no_module_imports_itself_by_way_of_others() -> None:
    TopologicalSorter(ARROWS).prepare()  # raises CycleError


def test_a_network_is_used_without_what_trains_it() -> None:
    for module in (m for m in MODULES if floor_of(m) == "inference"):
        assert "training.fit" not in ARROWS[module]


def test_each_library_has_one_home() -> None:
    for module, names in MODULES.items():
        homes = {module, module.rpartition(".")[0], floor_of(module)}
        for library in {name.split(".")[0] for name in names} & set(HOMES):
            assert homes & {*HOMES[library], "benchmarks"}, f"ich.{module} imports {library}"


def test_packages_are_rooms_and_no_corridors() -> None:
    for folder in (p for p in PACKAGE.rglob("*") if (p / "__init__.py").exists()):
        assert (folder / "__init__.py").read_text() == ""
        assert len(list(folder.glob("*.py"))) <= 16, folder


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("cli", "torch hydra rich"),
        ("completion", "torch hydra rich"),
        # The help of a command, and what completes its options.
        ("sweep prepare evaluate", "torch pandas mlflow scipy"),
        ("predict export report rerun bench train", "torch pandas mlflow scipy"),
        ("base.config", "torch pandas numpy"),
        ("launch.clusters", "torch mlflow ray submitit"),  # composing
        ("data.decode", "torch pandas hydra"),  # a decoding process
        ("data.phantom.files", "torch pandas"),
        ("inference.session", "torch pandas hydra"),
    ],
)
def test_what_starts_often_starts_light(modules: str, absent: str) -> None:
    names = ", ".join(f"ich.{module}" for module in modules.split())
    code = f"import sys, {names}; print(*set({absent.split()}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_no_function_is_longer_than_sixty_lines() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path.name}: {node.name}"


def test_state_has_one_writer_and_one_reader() -> None:
    """Written by hand, a file was not synced, or was left half after a kill, in one of ten places;
    read by hand, it ended a command in a traceback, or had OmegaConf look up a secret."""
    # A folder that is renamed whole; what is moved aside; a key with a mode of its own.
    homes = {
        "write_bytes": {"base.files"},
        "write_text": {"base.files", "data.phantom.files"},
        "rename": {"base.files", "data.phantom.files", "pages.tables", "data.patients"},
    }
    for module, tree in TREES.items():
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            name, owner = getattr(node.func, "attr", ""), getattr(node.func, "value", None)
            # pandas renames columns.
            if name in homes and not any(k.arg == "columns" for k in node.keywords):
                assert module in homes[name], f"ich.{module}: {name}"
            reads = (getattr(owner, "id", ""), name) == ("OmegaConf", "load")
            assert not reads, f"ich.{module} reads a config"


def test_html_stands_in_templates_which_escape_and_never_in_f_strings() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(getattr(part, "value", "")) for part in node.values)
                assert not re.search(r"</|<[a-z]+[ >]", text), f"{path.name}: {text}"


def test_the_wheel_runs_in_an_empty_folder(phantom: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", tmp_path],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(next(iter(tmp_path.glob("*.whl")))) as wheel:
        wheel.extractall(site)
    assert {p.relative_to(site / "ich" / "conf") for p in (site / "ich/conf").rglob("*.yaml")} == {
        p.relative_to(CONF_DIR) for p in CONF_DIR.rglob("*.yaml")
    }
    templates = {p.relative_to(REPOSITORY) for p in PACKAGE.rglob("templates/*")}
    assert {p.relative_to(site) for p in site.rglob("templates/*")} == templates
    assert (site / "ich/py.typed").exists()
    assert (site / f"ich-{ich.__version__}.dist-info").exists()
    with tarfile.open(next(iter(tmp_path.glob("*.tar.gz")))) as source:
        names = {Path(*Path(name).parts[1:]) for name in source.getnames()}
    assert templates <= names
    assert {Path(name) for name in FRESH_CLONE} <= names
    env = {"PYTHONPATH": str(site)}
    swept = ("-m", "name=wheel", "model=mobilenet_v2", f'data.root="{phantom}"')
    done = run_module("sweep", *swept, *SMALL, "tracking=none", cwd=empty, env=env)
    assert done.returncode == 0, done.stderr
    assert (empty / "multirun_reports/wheel/comparison.csv").exists()
    assert (empty / "multirun_reports/wheel/report.html").exists()
    (entry_points,) = site.glob("ich-*.dist-info/entry_points.txt")
    assert entry_points.read_text() == "[console_scripts]\nich = ich.cli:run\n"
    where = [sys.executable, "-c", "import ich; print(ich.__file__)"]
    ours = subprocess.check_output(where, cwd=empty, env={**os.environ, **env}, text=True)
    assert ours.startswith(str(site))


def test_what_the_hooks_and_the_workflow_run_is_there() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"].split()[0] for repo in hooks for hook in repo["hooks"]]
    # In the versions of `make check`, which installs them there.
    assert entries == [".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/mypy"]
    job = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())["jobs"]["check"]
    assert job["steps"][-1] == {"run": ".ci/run"}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    supported = [c.rpartition(" ")[2] for c in project["classifiers"] if "Python ::" in c]
    assert job["strategy"]["matrix"]["python-version"] == supported


def test_nothing_is_committed_that_is_to_be_ignored() -> None:
    """A measurement's database, with paths of the machine it was made on, once was."""
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no checkout that git would read: {done.stderr}")
    assert done.stdout == ""
