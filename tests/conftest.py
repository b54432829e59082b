"""Fixtures: a small phantom made once, the real data where it is at hand, composed configs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a network
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("MLFLOW_TRACKING_URI", None)  # of whoever runs the tests
os.environ.pop("MLFLOW_EXPERIMENT_NAME", None)
if "PYTEST_XDIST_WORKER" in os.environ:  # the threads of several workers would spin each other
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

from canaries import Canaries
from commands import run_module
from hydra import compose, initialize_config_dir
from mlflow import MlflowClient
from omegaconf import OmegaConf
from sweeps import SMALL, Folder

from ich.base.config import CONF_DIR, Config, register_schemas, to_dataclass
from ich.base.files import lock
from ich.data.phantom.files import write_phantom
from ich.data.phantom.spec import PhantomSpec
from ich.launch.composing import register_resolvers

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("ICH_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))


MadeOnce = Callable[[str, Callable[[Path], object]], Path]

# Files that take longest, by `make check` on two cores: a worker that meets one of them last works
# on alone.
_LONG = ("test_faults", "test_clusters", "test_predict", "test_sweep", "test_checkpoint")
_LONG += ("test_bench", "test_report", "test_protocol", "test_rerun", "test_documents")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: n for n, name in enumerate(_LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Gives a folder by its name; the first of the workers that asks for it makes what is in it.

    So nothing there is changed afterwards.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        place, made = base / name, base / f".{name}.made"
        with lock(base / f".{name}.lock"):
            if not made.exists():
                place.mkdir(exist_ok=True)
                make(place)
                made.touch()
        return place

    return folder


@pytest.fixture(scope="session")
def phantom(made_once: MadeOnce) -> Path:
    """Eight patients at 64 x 64, in the RSNA layout; the path has a space and a quote in it."""
    name, spec = "it's a phantom", PhantomSpec(patients=8, seed=1, size=64)
    return made_once("data set", lambda out: write_phantom(out / name, spec, workers=1)) / name


@pytest.fixture(scope="session")
def canaries(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Canaries:
    """The phantom with identifiers in every header."""
    return Canaries(phantom, tmp_path_factory.mktemp("canaries") / "set")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; tests that need it are skipped where it is absent."""
    if not (SHARED / "rsna_mini.zip").exists():
        pytest.skip(f"no real data: {SHARED} is absent (set ICH_SHARED_DATA)")
    return SHARED


@pytest.fixture(scope="session")
def database(made_once: MadeOnce) -> Path:
    """An empty MLflow database, to be copied: MLflow takes seconds to make the tables of one."""

    def make(out: Path) -> None:
        MlflowClient(f"sqlite:///{out / 'mlflow.db'}").search_experiments()

    return made_once("database", make) / "mlflow.db"


@pytest.fixture(scope="session")
def trained(phantom: Path, made_once: MadeOnce) -> Path:
    """A project folder with a finished sweep of two seeds, `multirun_reports/s`, and its MLflow
    database. Two epochs at 32 pixels, slices decoded at 48."""

    def make(out: Path) -> None:
        swept = ("-m", "name=s", "model=mobilenet_v2", "seed=0,1", f'data.root="{phantom}"')
        own = ("data.cache_size=48", "train.epochs=2", "data.subset=1.0")
        done = run_module("sweep", *swept, *SMALL, *own, cwd=out)
        assert done.returncode == 0, done.stdout + done.stderr

    return made_once("trained", make)


@pytest.fixture
def folder(tmp_path: Path, phantom: Path, database: Path) -> Iterator[Folder]:
    if not Path("/proc/self/environ").exists():
        pytest.skip("finds processes in /proc, which only Linux has")
    shutil.copy(database, tmp_path)
    folder = Folder(tmp_path, phantom)
    yield folder
    folder.kill()


@pytest.fixture(scope="session")
def compose_in() -> Callable[..., Config]:
    """Composes conf/ with overrides, as the sweep does, with its folders under a given one."""

    def make(folder: Path, *overrides: str) -> Config:
        register_schemas()
        register_resolvers()
        own = [
            f"data.cache_dir={folder / 'cache'}",
            f"sweep.output={folder / 'out'}",
            "name=test",
            "job=job",
        ]
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = compose("config", overrides=[*own, *overrides])
        return to_dataclass(OmegaConf.create(OmegaConf.to_container(cfg)))

    return make


@pytest.fixture
def composed(compose_in: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """The same, under tmp_path."""
    return partial(compose_in, tmp_path)
