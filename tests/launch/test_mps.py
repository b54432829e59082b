"""NVIDIA's MPS, by a program that behaves as its manual says: started for a sweep, and gone with
it, however that ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sweeps import SMALL, wait_for

import ich
from ich.base.results import SweepPaths
from ich.launch.mps import multi_process_service

# In the foreground a daemon with one server; without arguments it passes on what it is told. Its
# place is as told by the environment; `started` says which processes there are.
CONTROL = r"""#!/bin/sh
pipes=${CUDA_MPS_PIPE_DIRECTORY:-FAKE/usual}
if [ "$1" = -f ]; then
    [ -e FAKE/broken ] && { echo; echo "Insufficient privileges"; exit 1; }
    sleep 600 & server=$!
    trap 'kill $server; exit 0' TERM
    mkdir -p "$pipes"; : > "$pipes/control"
    echo "$$ $server $PPID $CUDA_VISIBLE_DEVICES $CUDA_MPS_LOG_DIRECTORY" > FAKE/writing
    mv FAKE/writing FAKE/started
    while [ ! -e "$pipes/quit" ]; do sleep 0.1; done
    kill $server; rm "$pipes/control" "$pipes/quit"; exit 0
fi
[ -e "$pipes/control" ] || { echo "Cannot find MPS control daemon process"; exit 1; }
read command
echo "$command" >> FAKE/told
case "$command" in quit*) : > "$pipes/quit";; esac
"""

SWEEP = """
import signal, sys, time
from ich.launch.mps import multi_process_service

def end(number, _):
    raise SystemExit(128 + number)

signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, signal.default_int_handler)
with multi_process_service(["GPU-a"]) as (environment, said):
    print(said, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a machine's MPS."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("finds processes in /proc, which only Linux has")
    program = tmp_path / "bin" / "nvidia-cuda-mps-control"
    program.parent.mkdir()
    program.write_text(CONTROL.replace("FAKE", str(tmp_path)))
    program.chmod(0o755)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    return tmp_path


def started(fake: Path) -> list[str]:
    """The daemon, its server, its keeper, the GPUs it sees, where it writes."""
    return (fake / "started").read_text().split()


def lives(process: str) -> bool:
    try:
        return Path("/proc", process, "stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def nothing_is_left(fake: Path) -> bool:
    return not any(map(lives, started(fake)[:3])) and not any((fake / "scratch").iterdir())


def test_a_sweep_has_a_daemon_of_its_own_in_a_place_of_its_own(fake: Path) -> None:
    with multi_process_service(["GPU-a", "GPU-b"]) as (environment, said):
        assert said == "with an MPS daemon of this sweep's own"
        daemon, server, _, gpus, logs = started(fake)
        assert lives(daemon)
        assert lives(server)
        assert gpus == "GPU-a,GPU-b"
        place = {"CUDA_MPS_PIPE_DIRECTORY": logs, "CUDA_MPS_LOG_DIRECTORY": logs}
        assert environment == place
        assert Path(logs).parent == fake / "scratch"
        assert Path(logs).stat().st_mode & 0o77 == 0
    assert nothing_is_left(fake)
    # Jobs that still write a checkpoint have the time that a killed sweep's have.
    assert (fake / "told").read_text().splitlines()[-1] == "quit -t 20"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_daemon_ends_with_its_sweep_however_that_ends(fake: Path, number: int) -> None:
    command = [sys.executable, "-c", SWEEP]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as sweep:
        assert sweep.stdout is not None
        assert b"own" in sweep.stdout.readline()
        sweep.send_signal(number)
        sweep.wait()
    wait_for(lambda: nothing_is_left(fake), 60)


def test_a_daemon_ends_with_its_keeper(fake: Path) -> None:
    with multi_process_service(["GPU-a"]):
        daemon, server, keeper, *_ = started(fake)
        os.kill(int(keeper), signal.SIGKILL)
        wait_for(lambda: not lives(daemon) and not lives(server), 60)


def test_a_users_own_daemon_is_used_and_left_alone(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(fake / "own"))
    with subprocess.Popen(["nvidia-cuda-mps-control", "-f"]) as own:
        wait_for((fake / "started").exists, 60)
        with multi_process_service(["GPU-a"]) as found:
            assert found == ({}, "with the MPS daemon that was running already")
        assert own.poll() is None
        assert (fake / "told").read_text() == "get_server_list\n"
        own.terminate()


def test_without_mps_and_where_it_does_not_start_jobs_share_a_gpu_all_the_same(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake / "broken").touch()
    with multi_process_service(["GPU-a"]) as found:
        assert found == ({}, "without MPS, which did not start (Insufficient privileges)")
    assert not any((fake / "scratch").iterdir())
    monkeypatch.setenv("PATH", str(fake))
    with multi_process_service(["GPU-a"]) as found:
        assert found == ({}, "without MPS (nvidia-cuda-mps-control is not installed)")


# In every process of the sweep: no cuDNN, as the pretended GPU asks for, numbers that need not be
# finite, for they mean nothing, and two jobs that pay, whatever is measured.
PRETENDED = """
import sys
words = {word for word in sys.orig_argv if word.startswith("ich.")}
if words & {"ich.train", "ich.training.timing", "ich.launch.side_by_side"}:
    import torch
    torch.backends.cudnn.enabled = False
    from ich.training import trainer
    trainer._require_finite = lambda *_: None
if "ich.sweep" in words:
    from ich.launch import side_by_side
    side_by_side._GAIN = 0.01
"""
SMI = """#!/bin/sh
case "$1" in
    *memory.free*) echo "0, GPU-a, 40000 MiB";;
    *compute_cap*) echo 9.0;;
    *) echo "Pretended GPU, 81559 MiB";;
esac
"""
EMULATE = Path(__file__).resolve().parents[3] / "shared" / "gpu" / "emulate.sh"


@pytest.mark.faults
@pytest.mark.skipif(not EMULATE.exists(), reason="no pretended GPU: ../shared/gpu is absent")
@pytest.mark.skipif(not shutil.which("g++"), reason="no pretended GPU: g++ is absent")
def test_a_whole_sweep_shares_a_pretended_gpu_and_leaves_nothing_when_it_is_killed(
    fake: Path, phantom: Path
) -> None:
    (fake / "bin" / "nvidia-smi").write_text(SMI)
    (fake / "bin" / "nvidia-smi").chmod(0o755)
    (fake / "site").mkdir()
    (fake / "site" / "sitecustomize.py").write_text(PRETENDED)
    here = f"{fake / 'site'}{os.pathsep}{Path(ich.__file__).parents[1]}"
    swept = ("name=s", "model=mobilenet_v2", "seed=0,1,2,3", f'data.root="{phantom}"', *SMALL)
    own = ("train.epochs=5000", "tracking=none", "hydra.launcher.jobs_per_gpu=auto")
    command = [str(EMULATE), sys.executable, "-m", "ich.sweep", "-m", *swept, *own]
    # The pretended GPU is made in the folder for temporary files, once.
    place = {"TMPDIR": tempfile.gettempdir(), "ICH_PYTHON": sys.executable}
    with (fake / "log").open("w") as log:
        sweep = subprocess.Popen(
            command,
            cwd=fake,
            env={**os.environ, **place, "PYTHONPATH": here},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    runs = SweepPaths(fake / "multirun_reports" / "s")
    try:
        wait_for(lambda: sweep.poll() is not None or len([*runs.root.glob("*/progress.json")]) == 2)
        said = (fake / "log").read_text()
        if sweep.poll() is not None and "cuda_runtime_api.h" in said:
            pytest.skip("no pretended GPU: the headers of torch's CUDA wheels are absent")
        assert sweep.poll() is None, said
        assert "jobs_per_gpu=auto: 2 on each GPU, with an MPS daemon of this sweep's own" in said
        assert runs.read_record().sharing.startswith("2 on each GPU")
        processes = trainings(fake)
        assert [*processes.values()] == [("GPU-a", started(fake)[4], "2")] * 2
        sweep.kill()
        wait_for(lambda: not any(lives(process) for process in processes), 60)
        wait_for(lambda: not any(map(lives, started(fake)[:3])), 60)
        assert not Path(started(fake)[4]).exists()
    finally:
        sweep.kill()
        sweep.wait()


def trainings(fake: Path) -> dict[str, tuple[str, ...]]:
    """What the trainings of this sweep were given, by their ids."""
    names = ("CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY", "ICH_JOBS_PER_GPU")
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            words = (process / "cmdline").read_text().split("\0")
            given = (process / "environ").read_text().split("\0")
            variables = dict(v.split("=", 1) for v in given if "=" in v)
            if "ich.train" in words and (process / "cwd").resolve() == fake:
                found[process.name] = tuple(variables.get(name, "") for name in names)
    return found
