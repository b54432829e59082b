"""A sweep is opened again though its state was damaged: what cannot be read costs itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from made_up import FIT
from sweeps import SMALL

from ich.base.config import Config, UserError
from ich.base.records import FINISHED, RunResult
from ich.base.results import State, SweepPaths
from ich.data.cohorts import CohortFiles, cohort_sizes, load_cohort, open_store
from ich.data.dataset import load_dataset
from ich.launch import preflight

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "NUL": lambda data: b"\0" * len(data),
    "garbage": lambda data: bytes(b ^ 0xA5 for b in data),
    "empty": lambda data: b"",
}


@pytest.fixture
def config(composed: Callable[..., Config], phantom: Path) -> Config:
    return composed("model=mobilenet_v2", *SMALL, f'data.root="{phantom}"', "tracking=none")


@pytest.fixture
def sweep(config: Config) -> Iterator[SweepPaths]:
    """With one job that is finished."""
    sweep, (job,) = launch(config)
    run = sweep.run(config.job)
    run.root.mkdir()
    run.write_config(config)
    run.write_origin(job.origin)
    run.best.write_bytes(b"weights")
    run.write_result(RunResult(FINISHED, "", config.job, "mobilenet_v2", FIT))
    yield sweep
    release()


def release() -> None:
    """What the end of a process does."""
    for handle in preflight._locks.values():
        handle.close()
    preflight._locks.clear()


def launch(config: Config) -> tuple[SweepPaths, list[preflight.Job]]:
    release()
    return preflight.open_sweep([config])


def test_a_finished_sweep_reads_the_headers_that_its_report_asks_for(
    config: Config, sweep: SweepPaths
) -> None:
    files = CohortFiles(Path(config.data.cache_dir), sweep.run(config.job).read_origin().cohort)
    asking = replace(config, report=replace(config.report, subgroups=["tilt"]))
    assert not files.header_facts.exists()
    _, (job,) = launch(asking)
    assert job.state is State.done
    assert set(pd.read_csv(files.header_facts)["tilt"]) == {"none", "tilted"}
    files.rows.unlink()
    files.header_facts.unlink()
    _, (job,) = launch(asking)  # whose cache is gone
    assert job.state is State.done
    with pytest.raises(UserError, match="names 'gantry', which is no column"):
        launch(replace(config, report=replace(config.report, subgroups=["gantry"])))


@pytest.mark.parametrize("damage", ["cut", "NUL"])
def test_a_launch_in_a_folder_whose_record_is_damaged_goes_on_and_names_it(
    config: Config, sweep: SweepPaths, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    sweep.record.write_bytes(DAMAGE[damage](sweep.record.read_bytes()))
    _, (job,) = launch(config)
    assert job.state is State.done
    assert f"{sweep.record} is damaged" in caplog.text
    assert sweep.read_record().origins == {config.job: job.origin}


def test_a_damaged_cohort_is_made_again_and_named(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(config.data)
    _, key = load_cohort(config, store)
    files = CohortFiles(Path(config.data.cache_dir), key)
    whole = {path: path.read_bytes() for path in (files.rows, files.facts)}
    for path, before in whole.items():
        damaged = {name: damage(before) for name, damage in DAMAGE.items()}
        if path == files.facts:
            damaged["a field less"] = before.replace(b'"imbalance"', b'"unknown"')
            damaged["another count"] = before.replace(b'"train": ', b'"train": 1', 1)
            damaged["no list"] = b'{"labels": 7}'
        for name, data in damaged.items():
            path.write_bytes(data)
            load_cohort(config, store)
            assert {p: p.read_bytes() for p in whole} == whole, (path.name, name)
    assert f"the cohort in {files.rows} and {files.facts.name} is damaged" in caplog.text
    assert f"{files.facts} is damaged" in caplog.text
    files.rows.unlink()
    load_cohort(config, store)
    assert {p: p.read_bytes() for p in whole} == whole
    assert files.data() is not None
    files.facts.write_bytes(whole[files.facts].replace(b'"count": ', b'"count": "x", "more": '))
    assert files.data() is None


def test_a_plan_and_a_job_read_a_damaged_cohort_without_a_traceback(config: Config) -> None:
    sizes = cohort_sizes(config)
    load_dataset(config)
    (rows,) = Path(config.data.cache_dir).glob("cohort-*.csv.gz")
    assert cohort_sizes(config).rows == sizes.rows
    rows.write_bytes(rows.read_bytes()[:-20])
    assert cohort_sizes(config).rows == sizes.rows
    with pytest.raises(UserError, match="is not made yet .*is damaged .*Run `ich prepare`"):
        load_dataset(config, build=False)


def test_what_a_record_names_is_read_and_never_written_to(config: Config) -> None:
    """As by a report on a folder of somebody else's, which shows slices of its cache."""
    load_dataset(config)
    folder = Path(config.data.cache_dir)
    before = {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}
    load_dataset(config, build=False)
    assert {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]} == before
    config.data.cache_dir = str(folder.parent / "elsewhere")
    with pytest.raises(UserError, match="is not made yet"):
        load_dataset(config, build=False)
    assert not (folder.parent / "elsewhere").exists()
