"""Policy: the README, docs/ and CONTRIBUTING.md tell the truth, and all of it.

Their commands compose and parse, their scripts run, their links and anchors hold, and what they
list is what the code has.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import yaml
from commands import run_module
from hydra import compose, initialize_config_dir
from markdown.extensions.toc import slugify
from omegaconf import OmegaConf

from ich.base.config import (
    CONF_DIR,
    Config,
    EvaluateConfig,
    PrepareConfig,
    flatten_values,
    register_schemas,
)
from ich.base.entry import Status
from ich.cli import COMMANDS, HYDRA
from ich.data.dicom import read_hu
from ich.launch.composing import register_resolvers
from ich.pages.answers.pairs import pairs_table
from ich.pages.columns import COLUMNS, metrics_table
from ich.scoring.comparison import Comparison
from ich.scoring.evaluation import DECISIONS
from ich.scoring.metrics import all_metrics
from ich.scoring.uncertainty import ScoredRows, bootstrap

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
DOCUMENTS = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
DOCUMENTS += REPOSITORY.glob("CONTRIBUTING.md")
# A command at the start of a line or of a piece of code, `python -m ich.NAME` or `ich NAME`.
COMMAND = re.compile(r"(?:^|`)(?:[A-Z_]+=\S* )*(?:python -m ich\.|ich )([a-z]+) ?([^`\n]*)", re.M)


def documents() -> str:
    return "\n".join(path.read_text() for path in DOCUMENTS)


def documented(name: str) -> list[list[str]]:
    """The arguments of each documented command of this name, but for mere mentions of it."""
    found = {text for command, text in COMMAND.findall(documents()) if command == name}
    given = [text for text in sorted(found - {"", "--help", "--cfg job"}) if text[-3:] != "..."]
    return [shlex.split(text.partition(" | ")[0], comments=True) for text in given]


def test_the_readme_is_read_in_minutes() -> None:
    assert len((REPOSITORY / "README.md").read_text().split()) <= 1800


# Links and anchors


def headings(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return [re.sub(r"[`*]", "", heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)]


def anchor_on_a_code_host(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_every_link_and_anchor_of_the_documents_exists() -> None:
    for path in DOCUMENTS:
        found = re.findall(r"\]\(([^)\s]+)\)|\b(?:src|srcset|href)=\"([^\"]+)\"", path.read_text())
        for link in (markdown or html for markdown, html in found):
            if link.startswith("http"):
                continue
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), f"{path.name}: {link}"
            if anchor:
                anchors = map(anchor_on_a_code_host, headings(target))
                assert anchor in anchors, f"{path.name}: {link}"


def test_a_heading_has_the_same_anchor_on_a_code_host_and_in_the_site() -> None:
    for path in DOCUMENTS:
        anchors = [anchor_on_a_code_host(heading) for heading in headings(path)]
        assert anchors == [slugify(heading, "-") for heading in headings(path)]
        assert len(set(anchors)) == len(anchors), path.name  # else a host numbers them


def test_every_file_named_in_docs_exists() -> None:
    folders = "ich|conf|tests|docs|hydra_plugins|multirun_reports/(?:examples|benchmarks)"
    for path in DOCS.glob("*.md"):
        for name in re.findall(rf"`((?:{folders})(?:/[\w./-]+)?)`", path.read_text()):
            assert (REPOSITORY / name).exists() or "densenet121" in name, f"{path.name}: {name}"


def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {p.stem for p in tmp_path.glob("*.html")}
    assert pages >= {p.stem for p in DOCS.glob("*.md")}
    for page in tmp_path.glob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(http[^\" >]*)", page.read_text()
        )
        assert not loaded, page.name


# Commands


def test_every_make_target_and_command_of_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z-]+)\b`", documents())) <= targets
    assert set(re.findall(r"^make ([a-z-]+)\b", documents(), re.M)) <= targets
    assert {name for name, _ in COMMAND.findall(documents())} <= {*COMMANDS}


def test_every_documented_sweep_composes() -> None:
    commands = documented("sweep")
    assert len(commands) >= 4
    register_schemas()
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        for command in commands:
            words = [w for w in command if w != "-m"]
            words = [w for w in words if not re.search(r"=(tag|choice|interval)\(", w)]
            overrides = [re.sub(r"=(?!\[)([^,]*),.*", r"=\1", w) for w in words]  # the first job
            # The network that a reader is shown how to add is not there.
            overrides = ["model=resnet50" if w == "model=densenet121" else w for w in overrides]
            compose("config", overrides=overrides)


@pytest.mark.parametrize(("module", "least"), [("prepare", 4), ("evaluate", 3)])
def test_every_documented_command_with_one_config_composes(module: str, least: int) -> None:
    commands = documented(module)
    assert len(commands) >= least
    register_schemas()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        for command in commands:
            compose(module, overrides=command)


@pytest.mark.parametrize("module", sorted({*COMMANDS} - {*HYDRA, "train"}))
def test_every_other_documented_command_parses(module: str) -> None:
    parser = importlib.import_module(f"ich.{module}").parser()
    assert documented(module)
    for command in documented(module):
        parser.parse_args(command)


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


# Lists


def listed(page: str, name: str, column: int = 0) -> list[str]:
    """A column of the table that follows `<!-- name -->`, as text."""
    text = (DOCS / page).read_text().partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > 2, name
    return [row[column].strip("| ") for row in rows if not row[0].startswith(("| ---", "| metric"))]


def in_code(cells: list[str]) -> set[str]:
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def of_any_label(names: Iterable[str]) -> set[str]:
    """Of metrics of the labels `any` and `sdh`, with the latter's name left open."""
    return {n.replace("_sdh", "_<label>") for n in names if not n.endswith("_any")}


def test_every_column_and_metric_is_defined_in_the_docs() -> None:
    assert in_code(listed("results.md", "columns")) == {c.name for c in COLUMNS} | {"auc_<label>"}
    empty = Comparison("", [], [], 0, [])
    assert in_code(listed("results.md", "columns of metrics.csv")) == {*metrics_table(empty)}
    assert in_code(listed("results.md", "columns of pairs.csv")) == {*pairs_table(empty)}
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(20, 2)), rng.integers(0, 2, (20, 2))
    metrics = listed("results.md", "metrics")
    assert in_code(metrics) == of_any_label(all_metrics(logits, target, ("any", "sdh")))
    scored = ScoredRows(("any", "sdh"), target, logits, np.arange(20))
    with_interval = [
        cell
        for cell, mark in zip(metrics, listed("results.md", "metrics", 2), strict=True)
        if mark == "I"
    ]
    resampled = bootstrap(scored, np.ones((20, 1), np.float32))
    assert in_code(with_interval) == of_any_label(resampled)
    assert in_code(listed("results.md", "decisions")) == {f"{d}_<label>" for d in DECISIONS}


def test_exit_statuses_are_those_of_the_code() -> None:
    told = listed("troubleshooting.md", "statuses")
    assert told == ["status", *(str(int(status)) for status in Status)]


def test_every_setting_of_the_documents_exists() -> None:
    register_schemas()
    known = {f"hydra.{k}" for p in CONF_DIR.glob("hydra/*/*.yaml") for k in settings_of(p)}
    for schema in (Config, EvaluateConfig, PrepareConfig):
        known |= {*flatten_values(OmegaConf.to_container(OmegaConf.structured(schema)))}
    groups = (
        "data|protocol|augment|model|loss|optimizer|scheduler|train|tracking|sweep|report|hydra"
    )
    for path in DOCUMENTS:
        for key in re.findall(rf"`((?:{groups})\.(?!(?:py|html|md)`)[\w.]+)[`=]", path.read_text()):
            assert any(f"{k}.".startswith(f"{key}.") for k in known), f"{path.name}: {key}"


def settings_of(path: Path) -> Iterator[str]:
    values = yaml.safe_load(path.read_text())
    for key in flatten_values({k: v or None for k, v in values.items()}):  # also what is {}
        yield f"{path.parent.name}.{key}"


def test_tables_and_pictures_of_the_docs_are_those_of_the_committed_results() -> None:
    sys.path.insert(0, str(DOCS / "scripts"))  # it imports its neighbour
    try:
        generated = runpy.run_path(str(DOCS / "scripts" / "generate.py"))["generate"]()
        for path, text in generated:
            assert path.read_text() == text, f"{path.name}: python docs/scripts/generate.py"
    finally:
        sys.path.remove(str(DOCS / "scripts"))


# What is said to a user of a mistake, or of a file that cannot be used.
SAID = {"UserError", "BrokenArchive", "DicomError", "Unreadable", "DamagedError"}
VALUE = "\0"


def literal(node: ast.AST) -> str:
    """The text of an expression, with VALUE for what is not known before it runs."""
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    return str(node.value) if isinstance(node, ast.Constant) else VALUE


def test_every_message_of_the_code_has_its_remedy_in_the_docs() -> None:
    texts, messages = set(), set()
    for path in REPOSITORY.glob("ich/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            texts |= {literal(node)} if isinstance(node, ast.JoinedStr | ast.Constant) else set()
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in SAID and node.args:
                messages.add(literal(node.args[0]))
    # A value may stand in quotes or brackets.
    gap = rf"[\W{VALUE}]*{VALUE}[\W{VALUE}]*"
    told = [cell for cell in listed("troubleshooting.md", "messages") if "`" in cell]
    assert len(set(told)) == len(told)
    known = [
        re.compile(gap.join(re.escape(part.strip()) for part in message.split("…")))
        for cell in told
        for message in in_code([cell])
    ]
    for message in messages:
        if re.search(r"\w", message):
            assert any(k.search(message) for k in known), f"not in troubleshooting.md: {message}"
    for pattern in known:
        assert any(map(pattern.search, texts)), f"no longer said: {pattern.pattern}"


def test_every_command_package_and_config_group_is_documented() -> None:
    for module in {p.name for p in REPOSITORY.glob("ich/*.py")} - {"__init__.py"}:
        assert f"`{module}`" in documents(), module
    for package in (p.parent.name for p in REPOSITORY.glob("ich/*/__init__.py")):
        assert f"`ich/{package}`" in documents(), package
    for group in (p.name for p in CONF_DIR.iterdir() if p.is_dir() and p.name != "hydra"):
        assert f"`{group}`" in documents(), group
