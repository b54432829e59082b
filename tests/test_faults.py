"""A sweep while things go wrong (FAULTS 1 to 8, 12, 14, 31, 33, 35): slow, `make test-faults`."""

from __future__ import annotations

import signal
import sqlite3
import time

import pytest
from sweeps import Folder, wait_for

from ich.base.results import RunPaths

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def test_eight_jobs_and_ten_kinds_of_faults(folder: Folder) -> None:
    """Every fault is named, no job is lost to another's, and none that finished runs twice."""
    first = {
        0: ("raise", 3),
        1: ("exit0", 3),
        2: ("exit3", 3),
        3: ("SIGKILL", 40),
        4: ("SIGSEGV", 3),
        5: ("SIGTERM", 40),
        6: ("hang", 3),
    }
    status, output = folder.run(8, "sweep.time_limit=0.5", sabotage=first)
    table = folder.table()
    assert status == 1, output
    assert table["job"].tolist() == [folder.job(n) for n in range(8)]
    wanted = ["failed"] * 5 + ["killed", "failed", "finished"]
    assert table["status"].tolist() == wanted, output
    named = [
        "RuntimeError: a bug in the training",
        "sys.exit(0)",
        "sys.exit(3)",
        "ended by SIGKILL (out of memory?)",
        "ended by SIGSEGV",
        "ended by SIGTERM or an interrupt",
        "exceeded its time limit of 0.5 minutes",
    ]
    for reason, part in zip(table["reason"], named, strict=False):
        assert part in reason
    assert "a bug in the training" in folder.of(0).log.read_text()
    assert "Traceback" in folder.of(0).log.read_text()
    assert "Traceback" not in output
    assert not folder.processes()
    healthy = folder.digests(7)

    # Again, with three more: and a database that is locked all the while.
    with sqlite3.connect(folder.root / "mlflow.db", isolation_level=None) as db:
        db.execute("BEGIN EXCLUSIVE")
        second = {0: ("nan", 3), 1: ("out of memory", 3)}
        newest = max(folder.of(3).root.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime_ns)
        newest.write_bytes(newest.read_bytes()[:-1])
        status, output = folder.run(8, sabotage=second)
    table = folder.table()
    assert status == 1, output
    assert table["status"].tolist() == ["failed"] * 2 + ["finished"] * 6, output
    assert "not finite in epoch 1, step 3" in table["reason"][0]
    assert "train.batch_size" in table["reason"][1]
    assert "is cut or damaged" in folder.of(3).log.read_text()
    assert folder.of(5).read_result().fit.resumed == 1
    assert folder.digests(7) == healthy

    status, output = folder.run(8)
    assert status == 0, output
    assert set(folder.table()["status"]) == {"finished"}
    assert folder.digests(7) == healthy
    assert not folder.processes()
    with sqlite3.connect(folder.root / "mlflow.db") as db:
        ended = dict(db.execute("SELECT name, status FROM runs ORDER BY start_time"))
        assert ended == {"s": "FINISHED"} | {folder.job(n): "FINISHED" for n in range(8)}
        twice = "SELECT 1 FROM metrics GROUP BY run_uuid, key, step HAVING count(*) > 1"
        assert db.execute(twice).fetchall() == []


@pytest.mark.parametrize(("how", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_sweep_that_is_ended_ends_its_jobs_and_goes_on_later(
    folder: Folder, how: signal.Signals, status: int
) -> None:
    """FAULTS 5: within 30 s, nothing left behind, with its table."""
    slow = dict.fromkeys(range(2), ("slow", 0))
    process = folder.start(3, "train.epochs=4", sabotage=slow)
    wait_for(lambda: list(folder.of(0).root.glob("checkpoint-*")))
    begin = time.monotonic()
    process.send_signal(how)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - begin < 30
    assert process.returncode == status, output
    assert not folder.processes()
    assert folder.table()["status"].tolist() == ["killed", "killed", "not started"]
    with sqlite3.connect(folder.root / "mlflow.db") as db:
        ended = dict(db.execute("SELECT name, status FROM runs"))
        assert ended == {"s": "KILLED", folder.job(0): "KILLED", folder.job(1): "KILLED"}
    status, output = folder.run(3, "train.epochs=4")
    assert status == 0, output
    assert folder.of(0).read_result().fit.resumed == 1


def test_a_sweep_that_is_killed_leaves_no_job_alive_and_goes_on_later(folder: Folder) -> None:
    """FAULTS 6."""
    process = folder.start(2, "train.epochs=4", sabotage={0: ("slow", 0), 1: ("hang", 3)})
    wait_for(lambda: list(folder.of(0).root.glob("checkpoint-*")))
    process.kill()
    process.communicate()
    wait_for(lambda: not folder.processes(), 30)
    status, output = folder.run(2, "train.epochs=4")
    assert status == 0, output
    assert folder.of(0).read_result().fit.resumed == 1
    with sqlite3.connect(folder.root / "mlflow.db") as db:
        assert {s for (s,) in db.execute("SELECT status FROM runs")} <= {"FINISHED", "KILLED"}


def test_a_failed_job_is_tried_again_from_its_checkpoint(folder: Folder) -> None:
    """`sweep.retry`: the saboteur counts steps of a process, so the second attempt passes them."""
    steps = {0: ("SIGKILL", 40)}
    status, output = folder.run(2, "sweep.retry=1", sabotage=steps)
    assert status == 0, output
    assert folder.of(0).read_result().fit.resumed == 1


def test_the_first_failure_stops_the_sweep_if_it_is_to(folder: Folder) -> None:
    status, output = folder.run(
        3, "sweep.on_failure=stop", "hydra.launcher.cpu_jobs=1", sabotage={0: ("raise", 1)}
    )
    assert status == 1, output
    table = folder.table()
    assert table["status"].tolist() == ["failed", "not started", "not started"]
    assert "sweep.on_failure=stop" in table["reason"][1]
    status, output = folder.run(3, "sweep.on_failure=stop")
    assert status == 0, output


def test_a_changed_configuration_is_a_new_run_and_the_old_one_is_kept(folder: Folder) -> None:
    """FAULTS 9."""
    assert folder.run(2)[0] == 0
    before = folder.of(0).best.read_bytes()
    assert folder.run(2, "optimizer.lr=1e-3")[0] == 0
    assert folder.of(0).best.read_bytes() != before
    kept = RunPaths(folder.sweep.root / "superseded" / f"{folder.job(0)}.1")
    assert kept.best.read_bytes() == before
    assert len(folder.table()) == 2
    with sqlite3.connect(folder.root / "mlflow.db") as db:
        old = "SELECT count(*) FROM tags WHERE key = 'ich.superseded' AND value = 'true'"
        assert db.execute(old).fetchone() == (2,)
