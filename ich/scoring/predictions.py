"""What a finished run predicted, and every metric of it: of one run, whatever it is compared with.

A run leaves `predictions.npz`: logits and targets of its validation rows and, where its protocol
has a test set, of the test rows. This is its reader, and the resampling of one run's metrics.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ich.base.files import DamagedError, read_bytes, tell_damaged
from ich.base.results import RunPaths
from ich.scoring.metrics import all_metrics, best_thresholds, per_study
from ich.scoring.uncertainty import ScoredRows, bootstrap, group_rows

_LARGEST = 1 << 30  # bytes; predictions for all of RSNA 2019 have 100 MB


@dataclass(frozen=True)
class Predictions:
    """What a run predicted on the rows it was scored on, and on validation.

    scored: with patients, or images, as groups. unit: of resampling, "patients" or "images".
    image_id: str [N]. study: int64 [N], -1 if unknown.
    validation_rows: logits and targets of validation, by which thresholds are chosen; those scored
    where there is no test set.
    """

    scored: ScoredRows
    unit: str
    image_id: np.ndarray
    study: np.ndarray
    validation_rows: tuple[np.ndarray, np.ndarray]

    def select_labels(self, labels: Sequence[str]) -> Predictions:
        """The same of some labels, in their order."""
        columns, scored = [self.scored.labels.index(k) for k in labels], self.scored
        selected = replace(
            scored,
            labels=tuple(labels),
            target=scored.target[:, columns],
            logits=scored.logits[:, columns],
        )
        logits, target = self.validation_rows
        return replace(
            self, scored=selected, validation_rows=(logits[:, columns], target[:, columns])
        )

    def select_rows(self, kept: np.ndarray) -> Predictions:
        """Some of the scored rows, bool [N], with the groups' own numbers; validation is the
        same."""
        scored = self.scored
        part = replace(
            scored,
            target=scored.target[kept],
            logits=scored.logits[kept],
            group=scored.group[kept],
        )
        return replace(self, scored=part, image_id=self.image_id[kept], study=self.study[kept])

    @staticmethod
    def average(members: Sequence[Predictions]) -> Predictions:
        """The mean logits of several, which must be of the same rows."""
        first = members[0]
        scored = replace(first.scored, logits=np.mean([p.scored.logits for p in members], axis=0))
        logits = np.mean([p.validation_rows[0] for p in members], axis=0)
        return replace(first, scored=scored, validation_rows=(logits, first.validation_rows[1]))

    @cached_property
    def fingerprint(self) -> str:
        """Of the rows that were scored: runs that share it can be compared pairwise."""
        # With targets and patients: the same images with other labels are other rows.
        digest = hashlib.sha256(repr(self.scored.labels).encode())
        for array in (self.scored.target, self.scored.group, self.image_id.astype("U")):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:12]

    # Kept, here and below: tables, pages and figures all ask for them.
    @cached_property
    def metrics(self) -> dict[str, float]:
        """Of `ich.scoring.metrics.all_metrics`, per slice."""
        return all_metrics(self.scored.logits, self.scored.target, self.scored.labels)

    @cached_property
    def scored_studies(self) -> ScoredRows | None:
        """The scored rows per study; None where studies are unknown."""
        if not (self.study >= 0).any():
            return None
        scored = self.scored
        logits, target, first = per_study(scored.logits, scored.target, self.study)
        return ScoredRows(scored.labels, target, logits, scored.group[first])

    @cached_property
    def study_metrics(self) -> dict[str, float]:
        """The same per study; empty where studies are unknown."""
        studies = self.scored_studies
        return all_metrics(studies.logits, studies.target, studies.labels) if studies else {}

    @property
    def every_metric(self) -> dict[str, float]:
        """Both: per slice, and as `study_<metric>` per study."""
        return self.metrics | {f"study_{k}": v for k, v in self.study_metrics.items()}

    @cached_property
    def thresholds(self) -> dict[str, float]:
        """Per label the probability with the best F1 on validation; none without both classes."""
        thresholds = best_thresholds(*self.validation_rows, self.scored.labels)
        return {k: t for k, t in thresholds.items() if t is not None}


def read_predictions(run: RunPaths, split: str | None = None) -> Predictions | None:
    """A finished run's predictions; None if the file is gone or damaged.

    Args:
        run: its folder.
        split: whose rows; None for those that are scored, of the test set if there is one.
    """
    try:
        return _from_arrays(read_arrays(run.predictions), split)
    except FileNotFoundError:
        return None
    except DamagedError as error:
        why = str(error)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        why = f"{run.predictions} is damaged ({error})"
    tell_damaged(why)
    return None


def read_stages(run: RunPaths, predictions: Predictions) -> dict[str, Predictions]:
    """What a run with a head over studies predicted without it: `slice`, of its slice network, and
    `smoothed`, of that averaged over a slice and its neighbours; empty of any other run.

    Args:
        run: its folder.
        predictions: of its scored rows.
    """
    try:
        arrays = read_arrays(run.predictions)
    except (FileNotFoundError, DamagedError):
        return {}
    split, scored = _scored_split(arrays), predictions.scored
    logits = {stage: arrays.get(f"{split}_{stage}_logits") for stage in ("slice", "smoothed")}
    return {
        stage: replace(predictions, scored=replace(scored, logits=values))
        for stage, values in logits.items()
        if values is not None and values.shape == scored.logits.shape and values.dtype.kind == "f"
    }


def _scored_split(arrays: Mapping[str, np.ndarray]) -> str:
    return "test" if "test_logits" in arrays else "val"


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a `predictions.npz`; none is unpickled.

    Raises:
        FileNotFoundError: it is not there.
        DamagedError: it cannot be read.
    """
    data = read_bytes(path, _LARGEST)
    try:
        with np.load(io.BytesIO(data)) as file:
            # As the archive names the sizes, which bound what is inflated.
            if sum(member.file_size for member in file.zip.infolist()) > _LARGEST:
                raise ValueError("it holds too much")
            return {name: file[name] for name in file.files}
    # What numpy, zipfile and zlib raise for damaged bytes has no common base, and no end.
    except Exception as error:
        raise DamagedError(f"{path} is damaged ({error})") from None


def _from_arrays(arrays: Mapping[str, np.ndarray], split: str | None) -> Predictions:
    split = split or _scored_split(arrays)
    image_id, labels = arrays[f"{split}_image_id"], arrays["labels"]
    # Found here, a damaged file is a run without predictions; found later, a page that fails.
    if (image_id.ndim, labels.ndim) != (1, 1):
        raise ValueError("it names no images or labels")
    for name in {split, "val"}:
        shape = len(arrays[f"{name}_image_id"]), len(labels)
        for part in ("logits", "target"):
            values = arrays[f"{name}_{part}"]
            if values.shape != shape or values.dtype.kind not in "fiu":
                raise ValueError(f"{name}_{part} is {values.dtype} {values.shape}")
        if not np.isin(values, (0, 1)).all():
            raise ValueError(f"{name}_target is not 0 or 1")
    for part in ("patient", "study"):
        values = arrays.get(f"{split}_{part}", np.zeros(len(image_id), int))
        if values.shape != image_id.shape or values.dtype.kind not in "iu":
            raise ValueError(f"{split}_{part} is {values.dtype} {values.shape}")
    group, unit = group_rows(arrays[f"{split}_patient"], image_id)
    return Predictions(
        scored=ScoredRows(
            labels=tuple(str(k) for k in labels),
            target=arrays[f"{split}_target"],
            logits=arrays[f"{split}_logits"],
            group=group,
        ),
        unit=unit,
        image_id=image_id,
        # Runs of earlier versions did not write it down.
        study=arrays.get(f"{split}_study", np.full(len(image_id), -1)),
        validation_rows=(arrays["val_logits"], arrays["val_target"]),
    )


def bootstrap_predictions(predictions: Predictions, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of every resample, per slice and, as `study_<metric>`, per study.

    Args:
        predictions: of at most G groups.
        counts: of `ich.scoring.uncertainty.draw_counts`, [G, R].

    Returns:
        float64 [R] each, of `ich.scoring.uncertainty.bootstrap`.
    """
    values = bootstrap(predictions.scored, counts)
    if (studies := predictions.scored_studies) is not None:
        values |= {f"study_{k}": v for k, v in bootstrap(studies, counts).items()}
    return values
