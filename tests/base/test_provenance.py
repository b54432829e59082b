"""What a run was made with: code, commit, diff, versions."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import ich
from ich.base import provenance


def git(folder: Path, *args: str) -> None:
    who = ["-c", "user.name=a person", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *args], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package in a repository, one file committed."""
    folder = tmp_path / "repository" / "package"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("x = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_the_commit_and_what_was_changed_since(package: Path) -> None:
    clean = provenance.git_state(package)
    assert clean is not None
    assert len(clean.commit) == 40
    assert not clean.changed
    assert provenance.git_diff(package) == ""
    (package / "a.py").write_text("x = 2\n")
    (package / "b.py").write_text("y = 3\n")
    assert provenance.git_state(package) == replace(clean, changed=True)
    diff = provenance.git_diff(package)
    assert "-x = 1\n+x = 2" in diff
    assert "+++ b/b.py\n@@ -0,0 +1,1 @@\n+y = 3" in diff


def test_the_commit_and_the_diff_restore_the_code(package: Path, tmp_path: Path) -> None:
    (package / "sub").mkdir()
    (package / "a.py").write_text("x = 2  # no newline at the end")
    (package / "b.py").write_text("--- y\n\n+++ z\x0c\r\n")
    (package / "empty.py").write_text("")
    (package / "sub" / "c.yaml").write_text("z: ü")
    (tmp_path / "launch.diff").write_text(provenance.git_diff(package), newline="")
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(package), str(other))
    git(other, "apply", str(tmp_path / "launch.diff"))
    for name in ("a.py", "b.py", "empty.py", "sub/c.yaml"):
        assert (other / name).read_bytes() == (package / name).read_bytes(), name


def test_a_package_that_git_does_not_track_has_no_commit(package: Path) -> None:
    installed = package / "site-packages" / "ich"
    installed.mkdir(parents=True)
    (installed / "a.py").write_text("")
    assert provenance.git_state(installed) is None
    assert provenance.git_diff(installed) == ""


def test_without_git_nothing_is_known_and_nothing_fails(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state(package) is None
    assert provenance.git_diff(package) == ""


def test_other_code_has_another_version(package: Path) -> None:
    before = provenance.code_version(package)
    provenance.code_version.cache_clear()
    assert provenance.code_version(package) == before
    provenance.code_version.cache_clear()
    (package / "a.py").write_text("x = 2\n")
    assert provenance.code_version(package) != before


def test_the_version_is_of_this_package_with_all_its_sub_packages(tmp_path: Path) -> None:
    copy = tmp_path / "ich"
    shutil.copytree(Path(ich.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert provenance.code_version() == provenance.code_version(copy)
    (copy / "sub" / "package").mkdir(parents=True)
    (copy / "sub" / "package" / "module.py").write_text("x = 1\n")
    with_it = _version(copy)
    assert with_it != provenance.code_version()
    (copy / "sub" / "package" / "module.py").write_text("x = 2\n")
    changed = _version(copy)
    assert changed != with_it
    (copy / "sub" / "package" / "module.py").rename(copy / "sub" / "module.py")
    assert _version(copy) not in (with_it, changed)


def _version(package: Path) -> str:
    provenance.code_version.cache_clear()
    return provenance.code_version(package)


def test_the_record_is_json_and_names_neither_person_nor_machine(package: Path) -> None:
    record = json.dumps(provenance.record(package).to_json())
    assert '"torch"' in record
    for private in (str(package), str(Path.home()), "a person", "a@b"):
        assert private not in record
