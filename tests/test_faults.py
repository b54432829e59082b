"""A sweep while things go wrong, whole and for real: slow, `make test-faults`.

What each fault does to one job is tested with children of ten lines, in tests/launch/test_jobs.py.
"""

from __future__ import annotations

import signal
import sqlite3

import pytest
from canaries import Canaries
from sweeps import LOCAL, Folder, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]


def runs_in(folder: Folder) -> dict[str, str]:
    """How each MLflow run ended, by its name."""
    with sqlite3.connect(folder.root / "mlflow.db") as db:
        return dict(db.execute("SELECT name, status FROM runs ORDER BY start_time"))


def test_eight_jobs_and_ten_kinds_of_faults(folder: Folder, canaries: Canaries) -> None:
    """FAULTS 1 to 4, 8, 12, 14, 31, 33, 35, 36: every fault is named, no job is lost to another's,
    none that finished runs twice, and no identifier of the headers is in anything that is kept."""
    folder.data, folder.launcher = f"data.root={canaries.root}", [*LOCAL, "protocol=sound"]
    # Ten steps an epoch, three epochs. The hanging job comes first: it holds one of the two places
    # to its time limit, of which the others take a tenth.
    first = {
        0: ("hang", 3),
        1: ("exit0", 3),
        2: ("exit3", 3),
        3: ("SIGKILL", 25),
        4: ("SIGSEGV", 3),
        5: ("SIGTERM", 25),
        6: ("raise", 3),
    }
    status, output = folder.run(8, "sweep.time_limit=1", sabotage=first)
    table = folder.table()
    assert status == 1, output
    assert table["job"].tolist() == [folder.job(n) for n in range(8)]
    wanted = ["failed"] * 5 + ["killed", "failed", "finished"]
    assert table["status"].tolist() == wanted, output
    named = [
        "exceeded its time limit of 1 minutes",
        "sys.exit(0)",
        "sys.exit(3)",
        "ended by SIGKILL (out of memory?)",
        "ended by SIGSEGV",
        "ended by SIGTERM or an interrupt",
        "RuntimeError: a bug in the training",
    ]
    for reason, part in zip(table["reason"], named, strict=False):
        assert part in reason
    assert "a bug in the training" in folder.of(6).log.read_text()
    assert "Traceback" in folder.of(6).log.read_text()
    assert "Traceback" not in output
    assert not folder.processes()
    assert canaries.seen_in(folder.root, output) == []  # checkpoints of killed jobs among it
    healthy = folder.digests(7)

    # Five of them again, with three more: and a database that is locked all the while. Of the
    # others, which left nothing to go on from, job 1 begins anew as well.
    again = (1, 3, 5, 6, 7)
    with sqlite3.connect(folder.root / "mlflow.db", isolation_level=None) as db:
        db.execute("BEGIN EXCLUSIVE")
        second = {6: ("nan", 3), 1: ("out of memory", 3)}
        newest = max(folder.of(3).root.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime_ns)
        newest.write_bytes(newest.read_bytes()[:-1])
        status, output = folder.run(again, sabotage=second)
    table = folder.table().set_index("job")
    assert status == 1, output
    ended = {folder.job(n): "failed" if n in (1, 6) else "finished" for n in again}
    assert table["status"].to_dict() == ended, output
    assert "not finite in epoch 1, step 3" in table["reason"][folder.job(6)]
    assert "train.batch_size" in table["reason"][folder.job(1)]
    assert "is cut or damaged" in folder.of(3).log.read_text()
    assert [folder.of(n).read_result().fit.resumed for n in (3, 5)] == [1, 1]
    assert folder.digests(7) == healthy

    status, output = folder.run(again)
    assert status == 0, output
    assert folder.table()["status"].tolist() == ["finished"] * 5
    assert folder.digests(7) == healthy
    assert not folder.processes()
    never = {folder.job(n): "FAILED" for n in (0, 2, 4)}
    assert runs_in(folder) == {"s": "FINISHED"} | dict.fromkeys(ended, "FINISHED") | never
    with sqlite3.connect(folder.root / "mlflow.db") as db:
        twice = "SELECT 1 FROM metrics GROUP BY run_uuid, key, step HAVING count(*) > 1"
        assert db.execute(twice).fetchall() == []
    assert canaries.seen_in(folder.root, output) == []
    for kept in ("s/comparison.csv", "s/figures/learning_curves.png"):
        assert (folder.root / "multirun_reports" / kept).exists()
    assert folder.of(7).predictions.exists()


def test_a_sweep_that_is_ended_ends_its_jobs_and_goes_on_later(folder: Folder) -> None:
    """FAULTS 5 and 6: by SIGTERM, by Ctrl-C, and killed, one after the other. Its jobs end in 30 s,
    a hanging one too, and nothing is left; told to end, the sweep writes its table."""
    # A second a step: neither is done before the other one has begun.
    slow = {0: ("slow", 1), 1: ("slow", 1)}
    rounds = [
        (signal.SIGTERM, 143, slow),
        (signal.SIGINT, 130, slow),
        # At its first step: before a later one an epoch may end, which writes a checkpoint.
        (signal.SIGKILL, -9, slow | {1: ("hang", 1)}),
    ]
    for how, status, sabotage in rounds:
        process = folder.start(3, sabotage=sabotage)
        wait_for(lambda: all(folder.of(n).progress.exists() for n in (0, 1)))
        process.send_signal(how)
        wait_for(lambda: not folder.trainings(), 30)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == status, output
        if how is signal.SIGKILL:
            break
        assert not folder.processes()
        assert folder.table()["status"].tolist() == ["killed", "killed", "not started"]
        assert runs_in(folder) == dict.fromkeys(["s", folder.job(0), folder.job(1)], "KILLED")
    wait_for(lambda: not folder.processes(), 30)
    status, output = folder.run(3)
    assert status == 0, output
    assert [folder.of(n).read_result().fit.resumed for n in range(3)] == [3, 2, 0]
    assert set(runs_in(folder).values()) <= {"FINISHED", "KILLED"}
