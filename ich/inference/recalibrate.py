"""A network for a site: `ich evaluate ... recalibrate=true`, and what it leaves to use.

Temperature and shift are a scale and an offset of each output, which the last layer takes in: what
is left is a run's folder like any other, for `predict`, `export` and `serve`, whose weights say on
whom they were fitted.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ich.base.config import EvaluateConfig, UserError
from ich.base.files import csv_text, replacing, write_text
from ich.base.results import RunPaths
from ich.inference.ensemble import Ensemble, Member
from ich.scoring.evaluation import Evaluation, metrics_table
from ich.scoring.predictions import read_arrays
from ich.scoring.recalibration import (
    Recalibration,
    fit_recalibration,
    of_rows,
    recalibrated,
    split_patients,
)
from ich.scoring.uncertainty import MIN_GROUPS
from ich.training.model import load_trained, save_weights

FOLDER = "recalibrated"


@dataclass(frozen=True)
class Site:
    """What came of a recalibration. table: of the patients that it was not fitted on, as
    `metrics_table` has it, `here` after it and `validation` before. notes: what a reader must
    know."""

    table: pd.DataFrame
    notes: list[str]


def check_model(model: Ensemble) -> Member:
    """The one network that is recalibrated.

    Raises:
        UserError: there are several, or it has a head over studies.
    """
    if len(model.members) > 1:
        raise UserError(
            f"recalibrate is true, and the model is {len(model.members)} networks. One can be "
            f"recalibrated: give one of them, or leave recalibrate out."
        )
    if model.has_head:
        raise UserError(
            "recalibrate is true, and the model has a head over whole studies, which has no last "
            "layer that could take a temperature in. Recalibrate the network of context=slice, or "
            "leave recalibrate out."
        )
    return model.members[0]


def recalibrate(
    config: EvaluateConfig, model: Ensemble, evaluation: Evaluation, folder: Path
) -> Site:
    """Fits on half of the patients, scores the others before and after, and writes
    `recalibration.csv` and the folder of the recalibrated run.

    Raises:
        UserError: there are too few patients, or no label with both classes.
    """
    here = evaluation.here
    if here.scored.group_count < 2 * MIN_GROUPS:
        raise UserError(
            f"recalibrate is true, and the scored rows are of {here.scored.group_count} "
            f"{here.unit}. At least {2 * MIN_GROUPS} are needed, half to fit on and half to try."
        )
    inside = split_patients(here)
    fitted_on, tried_on = of_rows(here, inside), of_rows(here, ~inside)
    found = fit_recalibration(fitted_on)
    if not found.temperature:
        raise UserError(
            "recalibrate is true, and no label has both classes among the patients to fit on. Give "
            "scans with and without findings."
        )
    after = evaluation.thresholds | found.threshold
    compared = Evaluation(
        evaluation.model, recalibrated(tried_on, found), tried_on, after, [], evaluation.left_out
    )
    compared = replace(compared, other_thresholds=evaluation.thresholds)
    table = metrics_table(compared, config.resamples)
    write_text(folder / "recalibration.csv", csv_text(table))
    text = "; ".join(_fit_texts(found))
    about = (
        f"Recalibrated on {fitted_on.scored.group_count:,} {here.unit} "
        f"({len(fitted_on.image_id):,} rows) of data={config.data.source.value}{_flips(config)}: "
        f"{text}."
    )
    write_recalibrated(model.members[0], found, about, folder / FOLDER)
    notes = [
        about,
        f"The numbers below are of the other {tried_on.scored.group_count:,} {here.unit}.",
        f"The recalibrated network is the folder {FOLDER} beside this page, for --model of ich "
        f"predict and ich export.",
    ]
    return Site(table, notes)


def _fit_texts(found: Recalibration) -> Iterator[str]:
    for label, temperature in found.temperature.items():
        yield f"{label} temperature {temperature:.3g}, shift {found.shift[label]:+.3g}"


def _flips(config: EvaluateConfig) -> str:
    return ", averaged over flips" if config.tta != "none" else ""


def write_recalibrated(member: Member, by: Recalibration, about: str, folder: Path) -> None:
    """Writes a run's folder whose weights give the recalibrated logits.

    Args:
        member: the network, with its run or without.
        about: on whom it was fitted, for the weights and the model card.
    """
    target = RunPaths(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model, metadata = load_trained(member.weights)  # as it was saved, its normalizations not folded
    labels = metadata.labels
    zero = np.zeros((1, len(labels)))
    shift = torch.from_numpy(by.apply(zero, labels)[0]).float()
    scale = torch.from_numpy(by.apply(zero + 1, labels)[0]).float() - shift
    with torch.no_grad():
        model.head.weight.mul_(scale[:, None])
        model.head.bias.mul_(scale).add_(shift)
    thresholds = metadata.thresholds | by.threshold
    save_weights(model, target.best, replace(metadata, thresholds=thresholds, recalibration=about))
    if member.run:
        run = member.run
        files = (run.config, run.result, run.origin, run.provenance)
        for path in (path for path in files if path.is_file()):
            shutil.copyfile(path, folder / path.name)
        if run.predictions.is_file():
            _write_predictions(run, target, by)


def _write_predictions(run: RunPaths, target: RunPaths, by: Recalibration) -> None:
    arrays = read_arrays(run.predictions)
    labels = tuple(str(k) for k in arrays["labels"])
    for name in [name for name in arrays if name.endswith("_logits")]:
        arrays[name] = by.apply(arrays[name], labels).astype(np.float32)
    with replacing(target.predictions) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
