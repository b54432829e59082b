"""Finished sweeps that nobody trained: their predictions are drawn, their files are real."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np

from ich.base.config import Config, to_dict, to_yaml
from ich.base.records import (
    FAILED,
    FINISHED,
    CohortSummary,
    FitResult,
    RunResult,
    SweepRecord,
)
from ich.base.results import RunPaths, SweepPaths
from ich.data.phantom.spec import LABELS
from ich.scoring.metrics import always_negative, multilabel_metrics
from ich.scoring.uncertainty import ScoredRows

LEAK = {"image": 0.1, "study": 0.9, "patient": 0.9}
COHORT = CohortSummary({"images": 30, "train": 20, "val": 10}, {}, "val", LEAK, protocol="report")
FIT = FitResult(
    scores={"accuracy": 0.9, "auc": 0.8},
    val_scores={"accuracy": 0.9, "auc": 0.8},
    best_epoch=2,
    auc_top=0.8,
    labels=("epidural", "any"),
    params=10,
    params_imagenet=20,
    epochs=2,
    minutes=1.0,
    images_per_s=5.0,
    device="CPU, 2 threads",
    cohort=COHORT,
    always_negative={"accuracy": 0.88, "auc": 0.5},
)
MILLIONS = {"vgg16": 14.72, "resnet50": 23.52, "mobilenet_v2": 2.23, "xception": 20.82}


def cohort(seed: int = 0, patients: int = 60, slices: int = 12) -> dict[str, np.ndarray]:
    """Targets of `patients` studies, each with its own bleeds."""
    rng = np.random.default_rng(seed)
    bleeds = rng.random((patients, 1, len(LABELS))) < 0.35
    target = (bleeds & (rng.random((patients, slices, len(LABELS))) < 0.5)).astype(np.float32)
    target[..., LABELS.index("any")] = np.delete(target, LABELS.index("any"), -1).max(-1)
    rows = patients * slices
    return {
        "image_id": np.array([f"ID_{seed}_{n:05d}" for n in range(rows)]),
        "target": target.reshape(rows, -1),
        "patient": np.repeat(np.arange(patients), slices),
        "study": np.repeat(np.arange(patients), slices),
    }


def write_sweep(
    root: Path,
    jobs: Mapping[str, float],
    composed: Callable[..., Config],
    rows: Mapping[str, dict[str, np.ndarray]] | None = None,
    failed: Sequence[str] = (),
) -> SweepPaths:
    """Writes a sweep's folder.

    Args:
        root: its folder.
        jobs: per job, how far its logits lie apart for positives and negatives, in their noise.
        composed: the fixture.
        rows: per job, of `cohort`, where it is not the common one.
        failed: jobs that did not finish.
    """
    sweep = SweepPaths(root)
    common = cohort()
    configs = {}
    for number, (job, signal) in enumerate(jobs.items()):
        run = sweep.run(job)
        run.root.mkdir(parents=True)
        model, *parts = job.split(",")
        own = ("model.pretrained=false", f"job='{job}'", f"name='{root.name}'")
        config = composed(f"model={model}", *parts, *own)
        run.config.write_text(to_yaml(config))
        configs[job] = to_dict(config)
        if job in failed:
            run.write_result(RunResult(FAILED, "ended by SIGKILL", job))
            continue
        _write_run(run, model, job, (rows or {}).get(job, common), signal, number)
    sweep.write_record(
        SweepRecord(
            name=root.name,
            jobs=tuple(jobs),
            started="2026-11-25 12:00",
            command="ich sweep -m ...",
            configs=configs,
        )
    )
    return sweep


def _write_run(
    run: RunPaths, model: str, job: str, rows: dict[str, np.ndarray], signal: float, seed: int
) -> None:
    rng = np.random.default_rng(100 + seed)
    target = rows["target"]
    # Networks err on the same patients: most of the noise is the slices' own.
    shared = np.random.default_rng(7).normal(size=target.shape)
    logits = signal * (target - 0.6) + 0.9 * shared + 0.4 * rng.normal(size=target.shape)
    logits = logits.astype(np.float32)
    arrays = {f"val_{k}": v for k, v in rows.items()} | {"val_logits": logits}
    np.savez_compressed(run.predictions, labels=np.array(LABELS), **arrays)
    scores = multilabel_metrics(logits, target, LABELS)
    params = int(1e6 * MILLIONS.get(model, 5))
    fit = replace(
        FIT,
        scores=scores,
        val_scores=scores,
        auc_top=scores["auc"],
        labels=LABELS,
        params=params,
        params_imagenet=params + 1000,
        minutes=1.0 + seed,
        images_per_s=100.0 / (1 + seed),
        precision="fp32",
        always_negative=always_negative(target, LABELS),
        cohort=replace(COHORT, steps={"images": len(target), "train": 10, "val": len(target)}),
    )
    run.write_result(RunResult(FINISHED, "", job, model, fit))
    lines = [
        {
            "step": n,
            "time": 1e9 + n,
            "train/lr": 1e-4,
            "train/loss": 1 / n,
            "val/accuracy": scores["accuracy"],
            "val/auc": 0.4 * n,
        }
        for n in (1, 2)
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def binormal(
    rng: np.random.Generator,
    aucs: Sequence[float],
    patients: int,
    prevalence: float = 0.3,
    correlation: float = 0.6,
) -> list[ScoredRows]:
    """What networks of known AUC and of equally correlated scores say of one row per patient."""
    target = (rng.random(patients) < prevalence).astype(float)
    common = rng.normal(size=patients)
    rows = []
    for auc in aucs:
        # Of two normal distributions of variance 1 the area is Phi(distance / sqrt 2).
        distance = 2**0.5 * NormalDist().inv_cdf(auc)
        own = rng.normal(size=patients)
        score = correlation**0.5 * common + (1 - correlation) ** 0.5 * own + distance * target
        rows.append(ScoredRows(("any",), target[:, None], score[:, None], np.arange(patients)))
    return rows


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)
