"""Sweeps as their user starts them, with faults: what the tests of faults and of clusters share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from commands import start_module

from ich.base.results import RunPaths, SweepPaths

# What makes a sweep or a training small; of a key that stands twice, Hydra takes the last value.
TINY = ["model.pretrained=false", "data.image_size=32", "data.cache_size=32", "data.workers=1"]
SMALL = [*TINY, "train.precision=fp32", "data.subset=0.5", "train.epochs=3", "train.batch_size=8"]
LOCAL = ["hydra.launcher.cpu_jobs=2"]


def saboteur(faults: Mapping[str, tuple[str, float]]) -> dict[str, str]:
    """The environment in which jobs meet these faults, by name; see saboteur/sitecustomize.py."""
    first = Path(__file__).parent / "saboteur"
    path = f"{first}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {"PYTHONPATH": path, "SABOTAGE": json.dumps(faults)}


class Folder:
    """A project folder in which sweeps over the seed are run."""

    def __init__(self, root: Path, phantom: Path):
        self.root, self.data, self.launcher = root, f'data.root="{phantom}"', LOCAL
        self.sweep = SweepPaths(root / "multirun_reports" / "s")

    def start(
        self,
        seeds: int | Sequence[int],
        *overrides: str,
        sabotage: Mapping[int, tuple[str, float]] = {},
    ) -> subprocess.Popen[str]:
        seeds = range(seeds) if isinstance(seeds, int) else seeds
        env = saboteur({self.job(seed): fault for seed, fault in sabotage.items()})
        env["ICH_TEST"] = str(self.root)  # by which its processes are found
        swept = ("name=s", "model=mobilenet_v2", "seed=" + ",".join(map(str, seeds)))
        own = (*swept, self.data, *SMALL, *self.launcher, *overrides)
        return start_module("sweep", "-m", *own, cwd=self.root, env=env)

    def run(self, *args: object, **kwargs: object) -> tuple[int, str]:
        process = self.start(*args, **kwargs)  # type: ignore[arg-type]
        output, _ = process.communicate(timeout=500)
        return process.returncode, output

    def job(self, seed: int) -> str:
        return f"mobilenet_v2,seed={seed}"

    def of(self, seed: int) -> RunPaths:
        return self.sweep.run(self.job(seed))

    def table(self) -> pd.DataFrame:
        table = pd.read_csv(self.sweep.csv)
        return table[table["job"].notna()].reset_index(drop=True)

    def processes(self) -> dict[int, list[str]]:
        """The command of every living process that a sweep of this folder started, by its id."""
        mark = f"ICH_TEST={self.root}".encode()
        commands = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes():
                    words = (process / "cmdline").read_text().split("\0")
                    commands[int(process.name)] = words
            except OSError:
                continue
        return commands

    def trainings(self) -> list[list[str]]:
        """The commands of the jobs that run."""
        return [words for words in self.processes().values() if "ich.train" in words]

    def kill(self) -> None:
        """Ends what a failed test has left."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def digests(self, seed: int) -> dict[str, tuple[str, int]]:
        return {
            p.name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
            for p in self.of(seed).root.iterdir()
            if p.name not in (".lock", "tracking.json")
        }


def wait_for(condition: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def alive(group: int) -> bool:
    """Whether a process of the group lives; zombies do not count."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = status.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state not in "ZX":
            return True
    return False
