"""Where MLflow's records and artifacts are: named by config, environment or folder, and moved."""

from __future__ import annotations

import shutil
import subprocess
from collections import OrderedDict
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ich.base.config import TrackingConfig, UserError
from ich.base.entry import masked, one_line
from ich.tracking.places import resolve_place
from ich.tracking.store import MlflowStore, remedy

HERE = TrackingConfig(mlflow=True)


@pytest.fixture
def project(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder, in which the test is."""
    root = tmp_path / "a"
    root.mkdir()
    shutil.copy(database, root)
    monkeypatch.chdir(root)
    return root


def log_model(store: MlflowStore) -> str:
    """A run with weights, as a version of the model with the alias `s`."""
    run = store.open_run("job", {})
    weights = Path("model", "data", "best.safetensors")
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_text("weights")
    store.log_artifact(run, Path("model"))
    shutil.rmtree("model")
    store.set_alias("s", store.register(run, {}))
    return run


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# A project that was copied or moved (FAULTS 38)


@pytest.mark.parametrize("how", ["copied", "moved", "copied without artifacts"])
@pytest.mark.parametrize("is_tagged", [True, False])
def test_a_copied_or_moved_project_keeps_its_artifacts_in_its_own_folder(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
    is_tagged: bool,
) -> None:
    store = MlflowStore(HERE)
    run = log_model(store)
    if not is_tagged:  # as an earlier version of ich left it
        store.client.delete_experiment_tag(store.experiment_id, "ich.database")
    before, other = files(project), project.parent / "b c"
    leave = shutil.ignore_patterns("mlartifacts" if "without" in how else "")
    (shutil.move if how == "moved" else shutil.copytree)(
        project, other, **({} if how == "moved" else {"ignore": leave})
    )
    monkeypatch.chdir(other)
    # As in another process: MLflow remembers where each run's artifacts were.
    monkeypatch.setattr(
        "mlflow.tracking._tracking_service.utils._artifact_repos_cache", OrderedDict()
    )
    store = MlflowStore(HERE)
    assert caplog.text.count(f"came from {project}: its artifacts are now") == 1
    if "without" in how:
        with pytest.raises(UserError, match="whose files are no longer in .*/b c/mlartifacts/"):
            store.fetch("models:/ich@s")
    else:
        assert store.fetch("models:/ich@s") == other / "mlartifacts" / run / "artifacts"
    again = store.open_run("job", {})
    for each in (run, again):
        store.log_artifact(each, other / "mlflow.db")
        assert (other / "mlartifacts" / each / "artifacts" / "mlflow.db").exists()
    version = store.client.get_model_version_by_alias("ich", "s")
    assert version.source == (other / "mlartifacts" / run / "artifacts" / "model").as_uri()
    assert store.client.get_model_version_download_uri("ich", "1") == version.source
    assert files(project) == ([] if how == "moved" else before)
    MlflowStore(HERE)
    assert caplog.text.count("came from") == 1


def test_artifacts_outside_the_project_stay_where_they_are(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = TrackingConfig(mlflow=True, artifacts=str(project.parent / "big disk"))
    run = log_model(MlflowStore(cfg))
    monkeypatch.chdir(shutil.move(project, project.parent / "b"))
    assert MlflowStore(cfg).fetch(run) == project.parent / "big disk" / run / "artifacts"


def test_a_database_that_projects_share_is_not_taken_for_a_moved_one(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An earlier version kept artifacts in the folder of the launch, wherever the database was."""
    monkeypatch.chdir(project.parent)
    uri = f"sqlite:///{project}/mlflow.db"
    client = MlflowClient(uri)
    client.create_experiment("ich", (project.parent / "mlartifacts").as_uri())
    (project.parent / "mlartifacts").mkdir()
    store = MlflowStore(TrackingConfig(mlflow=True, uri=uri))
    assert store.fetch(log_model(store)).is_relative_to(project.parent / "mlartifacts")
    assert "came from" not in caplog.text


def test_artifacts_of_a_new_experiment_lie_beside_its_database(project: Path) -> None:
    store = MlflowStore(TrackingConfig(mlflow=True, uri="sqlite:///sub/team.db"))
    log_model(store)
    assert {p.name for p in (project / "sub").iterdir()} >= {"team.db", "mlartifacts"}
    assert not (project / "mlartifacts").exists()


def test_another_place_for_the_artifacts_of_an_experiment_is_refused(project: Path) -> None:
    log_model(MlflowStore(HERE))
    big = TrackingConfig(mlflow=True, artifacts="big")
    with pytest.raises(UserError, match="tracking.artifacts is 'big', but the MLflow ex"):
        _ = MlflowStore(big).experiment_id
    assert not Path("big").exists()
    same = TrackingConfig(mlflow=True, artifacts="./mlartifacts/")
    assert MlflowStore(same).experiment_id
    log_model(MlflowStore(TrackingConfig(mlflow=True, artifacts="big", experiment="new")))
    assert Path("big").is_dir()


# Paths in URIs (FAULTS 42)

ODD = [
    "what?now",
    "a#b",
    "100%41",
    "50% off",
    "with blank",
    "Hämorrhagie",
    "a&b=c",
    "quo'te\"",
    "c:d",
]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("is_named", [False, True])
def test_a_folder_of_any_name_holds_what_is_made_in_it(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_named: bool
) -> None:
    root = tmp_path / name
    root.mkdir()
    shutil.copy(database, root)
    monkeypatch.chdir(root)
    uri = None
    if is_named:  # from a folder beside it
        monkeypatch.chdir(tmp_path)
        escaped = str(root).replace("%", "%25").replace("?", "%3F")
        uri = f"sqlite:///{escaped}/mlflow.db"
    store = MlflowStore(TrackingConfig(mlflow=True, uri=uri, artifacts=str(root / "big?")))
    run = log_model(store)
    assert store.fetch("models:/ich@s") == root / "big?" / run / "artifacts"
    assert (store.fetch(run) / "model" / "data" / "best.safetensors").read_text() == "weights"
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert {p.name for p in root.iterdir()} == {"mlflow.db", ".mlflow.db.lock", "big?"}


def test_a_question_mark_that_would_end_a_path_is_refused(tmp_path: Path) -> None:
    cfg = TrackingConfig(mlflow=True, uri=f"sqlite:///{tmp_path}/what?now/m.db")
    with pytest.raises(UserError, match=r"everything from the \? on would be settings"):
        MlflowStore(cfg)
    assert list(tmp_path.iterdir()) == []
    place = resolve_place(TrackingConfig(uri=f"sqlite:///{tmp_path}/m.db?timeout=60"))
    assert place.database == tmp_path / "m.db"


def test_a_folder_that_mlflow_could_not_name_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "caf\udce9"
    with pytest.raises(UserError, match=r"caf\\udce9' is not UTF-8"):
        resolve_place(HERE, folder)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    place = resolve_place(TrackingConfig(uri="sqlite:///~/m.db", artifacts="~/big"))
    assert place.database == tmp_path / "m.db"
    assert place.artifacts == (tmp_path / "big").as_uri()
    assert resolve_place(TrackingConfig(artifacts="s3://bucket/x")).artifacts == "s3://bucket/x"


# The environment (FAULTS 42)


def test_mlflows_variables_count_where_the_config_says_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/team.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "stroke")
    place = resolve_place(HERE)
    assert (place.database, place.experiment) == (project / "team.db", "stroke")
    assert str(place) == "team.db (MLFLOW_TRACKING_URI)"
    said = TrackingConfig(mlflow=True, uri="http://host:5000", experiment="mine")
    assert (resolve_place(said).uri, resolve_place(said).experiment) == (said.uri, "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is './mlruns', but MLflow no longer"):
        resolve_place(HERE)


def test_no_password_is_shown() -> None:
    cfg = TrackingConfig(uri="https://me:secret@host/mlflow")
    assert str(resolve_place(cfg)) == "https://***@host/mlflow (tracking.uri)"
    assert one_line("API request to https://me:secret@host/api failed") == (
        "API request to https://***@host/api failed"
    )
    assert masked("postgresql+psycopg2://u:p@h/db; http://plain/x@y") == (
        "postgresql+psycopg2://***@h/db; http://plain/x@y"
    )


# What MLflow says


def test_an_error_is_told_to_its_end_and_its_remedy_is_of_its_cause() -> None:
    long = "x" * 400
    proxy = f"API request failed {long} (Caused by ProxyError('Unable to connect to proxy'))"
    assert one_line(proxy).endswith("ProxyError('Unable to connect to proxy'))")
    assert "NO_PROXY" in remedy(one_line(proxy))
    assert "Start the server" in remedy("[Errno 111] Connection refused")
    assert (
        one_line("database is locked\n[SQL: INSERT ...]\n[parameters: 1]") == "database is locked"
    )
    assert len(one_line("y" * 9999)) < 3010


# The temporary folder, which others can write to


def test_no_file_of_a_known_name_is_opened_in_the_temporary_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's server opens a lock there, and would empty the file that it is a link to."""
    temporary = project / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    Path("mlflow.db").unlink()
    log_model(MlflowStore(HERE))
    assert list(temporary.iterdir()) == []
    repository = Path(__file__).parents[2]
    told = subprocess.run(
        ["make", "-n", "-o", ".venv/ready", "ui"], cwd=repository, capture_output=True, text=True
    )
    assert "TMPDIR=.ich-cache/tmp" in told.stdout
