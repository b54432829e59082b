"""Policy: who imports whom, what the wheel holds, and that the documents tell the truth."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from commands import run_module
from hydra import compose, initialize_config_dir
from sweeps import SMALL

from ich.base.config import CONF_DIR, register_schemas
from ich.data.dicom import read_hu
from ich.launch.composing import register_resolvers

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
# The only places that may import each library; the benchmarks compare with several.
HOMES = {
    "hydra": {ENTRY, "launch", "base.config", "base.entry"},
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
    ("module", "absent"),
    [
        ("base.config", "torch pandas numpy"),
        ("launch.clusters", "torch mlflow ray submitit"),  # composing
        ("data.decode", "torch pandas hydra"),  # a decoding process
        ("data.phantom.files", "torch pandas"),
        ("inference.session", "torch pandas hydra"),
    ],
)
def test_what_starts_often_starts_light(module: str, absent: str) -> None:
    code = f"import sys, ich.{module}; print(*set({absent.split()}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_no_function_is_longer_than_sixty_lines() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path.name}: {node.name}"


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
    with tarfile.open(next(iter(tmp_path.glob("*.tar.gz")))) as source:
        assert templates <= {Path(*Path(name).parts[1:]) for name in source.getnames()}
    env = {"PYTHONPATH": str(site)}
    swept = ("-m", "name=wheel", "model=mobilenet_v2", f'data.root="{phantom}"')
    done = run_module("sweep", *swept, *SMALL, "tracking=none", cwd=empty, env=env)
    assert done.returncode == 0, done.stderr
    assert (empty / "multirun_reports/wheel/comparison.csv").exists()
    assert (empty / "multirun_reports/wheel/report.html").exists()
    where = [sys.executable, "-c", "import ich; print(ich.__file__)"]
    ours = subprocess.check_output(where, cwd=empty, env={**os.environ, **env}, text=True)
    assert ours.startswith(str(site))


# The README, docs/ and CONTRIBUTING.md

DOCUMENTS = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md"))]
DOCUMENTS += REPOSITORY.glob("CONTRIBUTING.md")
# A command at the start of a line or of a piece of code, `python -m ich.NAME` or `ich NAME`.
COMMAND = re.compile(r"(?:^|`)(?:[A-Z_]+=\S* )*(?:python -m ich\.|ich )([a-z]+) ?([^`\n]*)", re.M)


def documents() -> str:
    return "\n".join(path.read_text() for path in DOCUMENTS)


def documented(name: str) -> list[list[str]]:
    """The arguments of each documented command of this name, but for those that are cut short."""
    found = [text for command, text in COMMAND.findall(documents()) if command == name]
    return [shlex.split(text, comments=True) for text in found if not text.endswith("...")]


def test_every_link_of_the_documents_exists() -> None:
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#]+)", path.read_text()):
            assert link.startswith("http") or (path.parent / link).exists(), f"{path.name}: {link}"


def test_every_make_target_and_command_of_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z-]+)\b`", documents())) <= targets
    assert set(re.findall(r"^make ([a-z-]+)\b", documents(), re.M)) <= targets
    assert {name for name, _ in COMMAND.findall(documents())} <= {*MODULES, "completion"}


def test_every_documented_sweep_composes() -> None:
    commands = documented("sweep")
    assert len(commands) >= 4
    register_schemas()
    register_resolvers()
    for command in commands:
        words = [w for w in command if w != "-m"]
        words = [w for w in words if not re.search(r"=(tag|choice|interval)\(", w)]
        overrides = [re.sub(r"=(?!\[)([^,]*),.*", r"=\1", w) for w in words]  # the first job
        # The network that a reader is shown how to add is not there.
        overrides = ["model=resnet50" if w == "model=densenet121" else w for w in overrides]
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            compose("config", overrides=overrides)


@pytest.mark.parametrize(("module", "least"), [("prepare", 4), ("evaluate", 3)])
def test_every_documented_command_with_one_config_composes(module: str, least: int) -> None:
    commands = documented(module)
    assert len(commands) >= least
    register_schemas()
    for command in commands:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            compose(module, overrides=command)


@pytest.mark.parametrize("module", ["predict", "export"])
def test_every_other_documented_command_parses(module: str) -> None:
    parse = importlib.import_module(f"ich.{module}").parse
    assert documented(module)
    for command in documented(module):
        parse(command)


def test_the_documented_onnx_example_runs(trained: Path, tmp_path: Path) -> None:
    run = next((trained / "multirun_reports" / "s").glob("*seed=0"))
    words = ("--format", "onnx", "-o", tmp_path / "exports" / "best", "--resamples", 0)
    run_module("export", "--model", run, *words, cwd=trained).check_returncode()
    script = [sys.executable, "-I", "-c", documented_script("use_onnx.py")]
    done = subprocess.run(script, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "'subdural': 0." in done.stdout


def documented_script(name: str) -> str:
    found = re.search(rf"```python\n(# {name}.*?)```", documents(), re.S)
    assert found
    return found[1]


def test_the_documented_cq500_labels_on_a_stand_in(phantom: Path, tmp_path: Path) -> None:
    files = sorted((phantom / "stage_2_train").glob("*.dcm"))[:12]
    for n, file in enumerate(files):
        place = tmp_path / f"CQ500CT{n // 2} CQ500CT{n // 2}" / "Unknown Study" / "CT Plain"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place / f"CT{n % 2:06d}.dcm")
    kinds = ["ICH", "IPH", "IVH", "SDH", "EDH", "SAH"]
    reads = pd.DataFrame({f"R{r}:{k}": [0] * 6 for r in (1, 2, 3) for k in kinds})
    reads.loc[:2, [f"R{r}:{k}" for r in (1, 3) for k in ("ICH", "SDH")]] = 1
    reads.loc[4, ["R2:ICH", "R2:SDH"]] = 1  # one of three: no majority
    reads.insert(0, "name", [f"CQ500-CT-{n}" for n in range(6)])
    reads.to_csv(tmp_path / "reads.csv", index=False)
    script = [sys.executable, "-c", documented_script("cq500.py")]
    subprocess.run(script, cwd=tmp_path, check=True)
    table = pd.read_csv(tmp_path / "labels.csv")
    assert table["SDH"].tolist() == [1] * 6 + [0] * 6
    assert table["patient_id"].nunique() == 6
    prepare_folder(tmp_path, ".", "data.any_label=ICH", "protocol.oversample=EDH")


def test_the_documented_ct_ich_conversion_on_a_stand_in(tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(0), []
    (tmp_path / "ct_scans").mkdir()
    for patient in (49, 50, 51, 52):
        volume = rng.integers(-1024, 2000, (48, 48, 3)).astype(np.int16)
        nibabel.save(
            nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / f"ct_scans/{patient:03d}.nii"
        )
        names = ("Intraventricular", "Intraparenchymal", "Subarachnoid", "Epidural", "Subdural")
        for n in (1, 2, 3):
            found = {k: int(n == 2 and k == "Subdural") for k in names}
            rows.append({"PatientNumber": patient, "SliceNumber": n, **found})
    pd.DataFrame(rows).to_csv(tmp_path / "hemorrhage_diagnosis_raw_ct.csv", index=False)
    subprocess.run([sys.executable, "-c", documented_script("ct_ich.py")], cwd=tmp_path, check=True)
    hu = read_hu((tmp_path / "dicom" / "052_03.dcm").read_bytes())
    assert np.array_equal(hu, np.rot90(volume[:, :, 2]))
    prepare_folder(tmp_path, "dicom", "data.any_label=any", "protocol.oversample=null")


def prepare_folder(folder: Path, root: str, *overrides: str) -> None:
    own = ("data=folder", f"data.root={root}", "data.labels=labels.csv", "protocol=sound")
    done = run_module("prepare", *own, "data.cache_size=32", *overrides, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "12 slices decoded, 0 in quarantine" in done.stdout
    assert list(folder.glob("multirun_reports/data/folder-*/data_report.html"))


def test_every_command_package_and_config_group_is_documented() -> None:
    for module in MODULES:
        where = f"`{module}.py`" if floor_of(module) == ENTRY else f"`ich/{floor_of(module)}`"
        assert where in documents(), module
    for group in (p.name for p in CONF_DIR.iterdir() if p.is_dir() and p.name != "hydra"):
        assert f"`{group}`" in documents(), group


@pytest.mark.parametrize("path", ["Makefile", "pyproject.toml", "constraints.txt", ".ci/run"])
def test_files_a_fresh_clone_needs_are_there(path: str) -> None:
    assert (REPOSITORY / path).exists()
