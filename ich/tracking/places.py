"""Where MLflow keeps its records and artifacts: named by the config, the environment or the folder.

MLflow writes absolute places into its database. `follow_project` rewrites them where a project was
copied or moved, so that nothing is written into, or looked for in, the folder that it was in.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from ich.base.config import TrackingConfig, UserError
from ich.base.entry import masked

# MLflow's own, which count where the config says nothing.
URI_VARIABLE, EXPERIMENT_VARIABLE = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
_EXPERIMENT, _DATABASE, _ARTIFACTS = "ich", "mlflow.db", "mlartifacts"
_PLACE_TAG = "ich.database"  # of an experiment: where its database was when last looked at
_LOCK_SECONDS = 5  # as MLflow itself waits for a locked database

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """One tracking store and the experiment in it.

    uri: as MLflow takes it. source: the setting or variable that names it, empty for neither.
    experiment: its name. database: the file, if it is one of SQLite. artifacts: the URI of a new
    experiment's; None leaves it to the server. wanted: `tracking.artifacts` as it is given.
    """

    uri: str
    source: str
    experiment: str
    database: Path | None
    artifacts: str | None
    wanted: str | None

    def __str__(self) -> str:
        """As a person may see it: without a password."""
        name = f" ({self.source})" if self.source else ""
        if self.database is None:
            return f"{masked(self.uri)}{name}"
        return f"{Path(os.path.relpath(self.database))}{name}"


def tracking_environment() -> dict[str, str]:
    """MLflow's variables as they are here, for a process that does not inherit them."""
    return {k: os.environ[k] for k in (URI_VARIABLE, EXPERIMENT_VARIABLE) if k in os.environ}


def resolve_place(cfg: TrackingConfig, folder: Path | None = None) -> Place:
    """The store that a config means.

    Args:
        cfg: what it says counts; else the environment; else a database in the folder.
        folder: the project's, absolute, where relative paths start; None is this one.

    Raises:
        UserError: a store that MLflow cannot write to, or a place it cannot keep.
    """
    folder = folder or Path.cwd()
    given, source = cfg.uri, "tracking.uri"
    if not given:
        given, source = os.environ.get(URI_VARIABLE), URI_VARIABLE
    experiment = cfg.experiment or os.environ.get(EXPERIMENT_VARIABLE) or _EXPERIMENT
    if not given:
        database = folder / _DATABASE
        uri, source = sqlite_uri(database), ""
    elif given.startswith("sqlite:///"):
        uri, database = _read_sqlite_uri(given, source, folder)
    elif given.startswith("file:") or ("://" not in given and given != "databricks"):
        raise UserError(
            f"{source} is {given!r}, but MLflow no longer writes to plain folders. Use "
            f"sqlite:///FILE, a server's http://HOST:PORT, or tracking=none."
        )
    else:
        return Place(given, source, experiment, None, cfg.artifacts, cfg.artifacts)
    # Beside the database, not in this folder: several projects may share one.
    own = _artifact_uri(cfg.artifacts, folder) or _file_uri(database.parent / _ARTIFACTS)
    return Place(uri, source, experiment, database, own, cfg.artifacts)


def _read_sqlite_uri(uri: str, source: str, folder: Path) -> tuple[str, Path]:
    """A given URI as MLflow is to have it, and the file that it names."""
    from sqlalchemy.engine import make_url

    url = make_url(uri)
    if "?" in uri and not url.query:  # what follows would be lost, and the database lie elsewhere
        raise UserError(
            f"{source} is {uri!r}, in which everything from the ? on would be settings of the "
            f"database. Where it belongs to a path, write %3F, and for a % write %25."
        )
    path = Path(url.database or "").expanduser()
    if url.query:
        return uri, folder / unquote(str(path).removeprefix("file:"))
    return sqlite_uri(folder / path), folder / path


def sqlite_uri(path: Path) -> str:
    """The URI of a database file, which SQLAlchemy reads as this very path."""
    from sqlalchemy.engine import make_url

    _require_utf8(path)
    # Escaped only where it must be: SQLAlchemy 2.0 reads no escapes. From this folder at the last,
    # since MLflow takes equal URIs for one database, whatever folder they start in.
    forms = (str(path), quote(str(path), safe="/ "), os.path.relpath(path))
    for uri in (f"sqlite:///{form}" for form in forms):
        url = make_url(uri)
        if not url.query and "?" not in uri and Path(url.database or "").absolute() == path:
            return uri
    raise UserError(
        f"the MLflow database is to be {str(path)!r}, and this version of SQLAlchemy has no name "
        f"for such a path. Choose a folder without ? and %."
    )


def _artifact_uri(artifacts: str | None, folder: Path) -> str | None:
    if artifacts is None or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", artifacts):
        return artifacts
    return _file_uri(Path(os.path.normpath(folder / Path(artifacts).expanduser())))


def _file_uri(path: Path) -> str:
    _require_utf8(path)
    return path.as_uri()


def _require_utf8(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"the name of the folder {str(path.parent)!r} is not UTF-8, so MLflow would keep "
            f"artifacts in another. Rename it, or use tracking=none."
        ) from None


def local_path(uri: str) -> Path | None:
    """The path of a file URI, or of a text that is an absolute path; None for anything else."""
    if uri.startswith("file:"):
        return Path(unquote(urlsplit(uri).path))
    return Path(uri) if uri.startswith("/") else None


def is_same_place(one: str, other: str) -> bool:
    """Whether two artifact locations are one; a relative one is a server's, which it completes."""
    paths = local_path(one), local_path(other)
    if None not in paths:
        return paths[0] == paths[1]
    first, second = one.rstrip("/"), other.rstrip("/")
    return first == second or (":" not in second and first.endswith(f"/{second}"))


# --- A project that was moved or copied ----------------------------------------------------------


def place_tag(database: Path) -> dict[str, str]:
    """The tag by which a later start finds out whether the database was moved or copied."""
    return {_PLACE_TAG: str(database)}


def follow_project(place: Place) -> None:
    """Makes a database's places of artifacts those of the folder that it lies in now.

    Places outside the project's folder stay as they are.

    Raises:
        sqlite3.Error: as of a database that is locked.
    """
    database = place.database
    if database is None or not database.is_file():
        return
    with closing(sqlite3.connect(database, timeout=_LOCK_SECONDS)) as db:
        moved = dict(_moved_experiments(db, place))
        if not moved:
            return
        with db:  # one transaction
            for experiment, old in moved.items():
                _rewrite(db, experiment, old, database.parent)
                row = (_PLACE_TAG, str(database), experiment)
                columns = "(key, value, experiment_id)"
                db.execute(
                    f"INSERT OR REPLACE INTO experiment_tags {columns} VALUES (?, ?, ?)", row
                )
    olds = ", ".join(sorted({str(old) for old in moved.values()}))
    log.warning(
        "MLflow's database came from %s: its artifacts are now looked for, and written, in %s",
        *(olds, database.parent),
    )


def _moved_experiments(db: sqlite3.Connection, place: Place) -> Iterator[tuple[int, Path]]:
    """Experiments whose database was in another folder, and that folder."""
    assert place.database is not None
    here = place.database.parent
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiment_tags'").fetchone():
        return  # not MLflow's yet
    rows = db.execute(
        "SELECT e.experiment_id, e.artifact_location, t.value FROM experiments e LEFT JOIN "
        "experiment_tags t ON t.experiment_id = e.experiment_id AND t.key = ?",
        (_PLACE_TAG,),
    )
    for experiment, location, recorded in rows.fetchall():
        old = Path(recorded).parent if recorded else _untagged_origin(location, place)
        if old and old != here and not (old.exists() and here.exists() and old.samefile(here)):
            yield experiment, old


def _untagged_origin(location: str | None, place: Place) -> Path | None:
    """The folder of a project that an earlier version of ich began, by where its artifacts were."""
    path = local_path(location or "")
    if path is None or path.name != _ARTIFACTS or place.database is None:
        return None
    # That version kept artifacts in the folder of the launch. Was the database named by a URI, it
    # may always have been elsewhere: then only an original beside them, or their absence, tells.
    origin = path.parent
    is_elsewhere = bool(place.source) and path.exists()
    return None if is_elsewhere and not (origin / place.database.name).is_file() else origin


def _rewrite(db: sqlite3.Connection, experiment: int, old: Path, new: Path) -> None:
    """Replaces the beginning of every place of an experiment's artifacts."""
    runs = "SELECT run_uuid FROM runs WHERE experiment_id = ?"
    for table, column, condition in (
        ("experiments", "artifact_location", "experiment_id = ?"),
        ("runs", "artifact_uri", "experiment_id = ?"),
        ("model_versions", "source", f"run_id IN ({runs})"),
        ("model_versions", "storage_location", f"run_id IN ({runs})"),
    ):
        query = f"SELECT rowid, {column} FROM {table} WHERE {condition}"
        for row, uri in db.execute(query, (experiment,)).fetchall():
            path = local_path(uri or "")
            if path and path.is_relative_to(old):
                place = (new / path.relative_to(old)).as_uri()
                db.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (place, row))
