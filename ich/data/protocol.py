"""Manifest -> cohort: which images are trained on, how often, and which ones score.

`report` is what the report did (its section 3.2): every epidural-positive image stands eight times,
a stratified subset of these rows is taken, and the subset is split. Copies of one image and slices
of one patient therefore fall on both sides. `sound` splits patients, never images, into parts with
equal label rates, and resamples the training part alone. Every cohort is audited, and every table
shows what it leaks.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ich.base.config import ProtocolConfig, ProtocolName, UserError
from ich.base.records import CohortSummary
from ich.data.stratify import partition

TRAIN, VAL, TEST = "train", "val", "test"
SPLITS = (TRAIN, VAL, TEST)
ENOUGH = 500  # positives from which on a label's rates in the parts are expected to agree
TOLERANCE = 0.10  # by which they may differ, relative to the smallest

# What a row shares with the training set: the same image, or another of the study or patient.
LEAKS = {"image": "image_id", "study": "study", "patient": "patient"}


@dataclass(frozen=True)
class Cohort:
    """The rows of a training, and how they came about.

    rows: one per appearance of an image: the manifest's columns (`image_id`, `path`, the labels,
        and the keys `patient` and `study`, empty where unknown), `repeat` (0 for the original) and
        `split` (`train`, `val` or `test`). Repeats share one decoded slice.
    labels: names of the label columns.
    steps: rows after each step, in order: images, ..., train, val, test.
    positives: after each step, the positive rows of each label.
    imbalance: of each label, how far its rates in the splits are apart, largest / smallest - 1,
        before the training set was resampled; infinite where a split has no positive.
    """

    rows: pd.DataFrame
    labels: tuple[str, ...]
    steps: dict[str, int]
    positives: dict[str, dict[str, int]]
    imbalance: dict[str, float]

    def split(self, name: str) -> pd.DataFrame:
        """The rows of one split, in order."""
        return self.rows[self.rows["split"] == name]

    @property
    def splits(self) -> list[str]:
        """The splits that have rows."""
        return [name for name in SPLITS if (self.rows["split"] == name).any()]

    @property
    def scored(self) -> str:
        """The split that tables come from: the test set, or validation where there is none."""
        return TEST if TEST in self.splits else VAL

    def without(self, image_ids: set[str]) -> Cohort:
        """The same cohort without some images: those whose file cannot be used."""
        if not image_ids:
            return self
        rows = self.rows[~self.rows["image_id"].isin(image_ids)]
        counted = {n: rows[rows["split"] == n] for n in self.splits}
        # The steps before the split stay: they tell how the cohort came about.
        steps = {n: len(part) for n, part in counted.items()}
        positives = {n: _positives(part, self.labels) for n, part in counted.items()}
        return replace(
            self,
            rows=rows,
            steps={**self.steps, **steps},
            positives={**self.positives, **positives},
        )

    def summary(self) -> CohortSummary:
        """Counts, label rates per split, imbalance and leak: what tables and trackers show."""
        rates = {
            name: {k: round(n / max(1, self.steps[name]), 4) for k, n in positives.items()}
            for name, positives in self.positives.items()
            if name in SPLITS
        }
        leak = audit(self.rows, self.scored)
        return CohortSummary(self.steps, rates, self.scored, leak)


def apply_protocol(
    manifest: pd.DataFrame,
    labels: tuple[str, ...],
    cfg: ProtocolConfig,
    subset: float,
    whole: bool = False,
) -> Cohort:
    """Makes the cohort.

    Args:
        manifest: one row per image, with the label columns and, for `sound`, `patient`.
        labels: names of the label columns.
        cfg: the protocol; its seed moves every random choice.
        subset: share of the rows (`sound`: of every patient's images, whole patients) to keep.
        whole: keep every slice of a patient who stays, also where negatives are dropped.

    Raises:
        UserError: too few rows or patients to split, no such label to oversample, unknown patients
            under `sound`, or a leak there.
    """
    if cfg.oversample is not None and cfg.oversample not in labels:
        raise UserError(
            f"protocol.oversample is {cfg.oversample!r}, but the labels are {', '.join(labels)}. "
            f"Name one of them, or leave it out with protocol.oversample=null."
        )
    # It notes the rows after each of its steps; the splits follow as the last ones.
    steps: dict[str, pd.DataFrame] = {"images": manifest}
    rows, apart = PROTOCOLS[cfg.name](manifest, labels, cfg, subset, steps, whole)
    steps |= {name: rows[rows["split"] == name] for name in SPLITS if (rows["split"] == name).any()}
    return Cohort(
        rows.reset_index(drop=True),
        labels,
        {name: len(part) for name, part in steps.items()},
        {name: _positives(part, labels) for name, part in steps.items()},
        apart,
    )


def _positives(rows: pd.DataFrame, labels: tuple[str, ...]) -> dict[str, int]:
    return {k: int(rows[k].sum()) for k in labels}


def _report(
    manifest: pd.DataFrame,
    labels: tuple[str, ...],
    cfg: ProtocolConfig,
    subset: float,
    steps: dict[str, pd.DataFrame],
    whole: bool,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """The report's protocol, in its order."""
    # Copies before the split, as in the report: one image then stands on both sides.
    rows = oversample(manifest, cfg.oversample, cfg.oversample_times)
    steps["oversampled"] = rows
    if cfg.negatives_per_positive is not None:
        rows = steps["undersampled"] = undersample(rows, labels, cfg)
    if subset < 1:
        rows = rows.iloc[_stratified_pick(rows, labels, subset, cfg.seed)[1]]
    steps["subset"] = rows
    _, val = _stratified_pick(rows, labels, cfg.val_fraction, cfg.seed)
    split = np.full(len(rows), TRAIN, dtype=object)
    split[val] = VAL
    rows = rows.assign(split=split)
    return rows, imbalance(rows, labels)


def _sound(
    manifest: pd.DataFrame,
    labels: tuple[str, ...],
    cfg: ProtocolConfig,
    subset: float,
    steps: dict[str, pd.DataFrame],
    whole: bool,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Patients into parts; then, inside the training set, over- and undersampling."""
    # By image id: the split depends neither on the order of the label file nor on the keys' values.
    rows = manifest.sort_values("image_id", ignore_index=True)
    rows = rows.assign(split=split_patients(rows, labels, cfg, subset))
    rows = steps["subset"] = rows[rows["split"] != ""]
    # Before oversampling, which raises the rates of the training part on purpose.
    apart = imbalance(rows, labels)
    train = oversample(rows[rows["split"] == TRAIN], cfg.oversample, cfg.oversample_times)
    if cfg.negatives_per_positive is not None:
        train = (undersample_patients if whole else undersample)(train, labels, cfg)
    rest = rows[rows["split"] != TRAIN].assign(repeat=0)
    rows = pd.concat([train, rest], ignore_index=True)
    # By patient nothing can leak; by study or image, where metadata contradict themselves.
    if worst := {k: v for k, v in audit(rows, TEST, VAL).items() if v}:
        raise UserError(
            f"protocol=sound leaks: {worst}, the shares of validation or test rows that share "
            f"their {' or '.join(worst)} with another side. A study belongs to two patients, or an "
            f"image stands twice: mend data.metadata."
        )
    return rows, apart


# Arguments as of `apply_protocol`, and where to note the rows after each step; the rows with their
# `split`, and how far the rates of each label are apart between splits.
PROTOCOLS = {ProtocolName.report: _report, ProtocolName.sound: _sound}


def split_patients(
    rows: pd.DataFrame, labels: tuple[str, ...], cfg: ProtocolConfig, subset: float
) -> np.ndarray:
    """The split of every row, str [N], empty for rows outside the subset; patients stay whole.

    With `folds`, fold k is the test set, the next one validation, and the rest training.

    Raises:
        UserError: a row without a patient, or fewer patients than parts.
    """
    unknown = rows.loc[rows["patient"] == "", "image_id"]
    if len(unknown):
        raise UserError(
            f"protocol=sound splits by patient, but {len(unknown):,} of {len(rows):,} images have "
            f"no patient (the first: {', '.join(unknown[:3])}). Give data.metadata=FILE, a CSV "
            f"with image and patient, or data.root with files whose headers hold a PatientID."
        )
    names, shares = _parts(cfg, subset)
    group, _ = pd.factorize(rows["patient"])
    patients = int(group.max()) + 1
    if patients < len(names):
        raise UserError(
            f"protocol=sound needs at least one patient for each of {len(names)} parts, but the "
            f"data hold {patients}. Give more patients, or fewer protocol.folds."
        )
    # What each patient brings: images, positives of every label and, in the last column, itself.
    counts = np.ones((patients, len(labels) + 2))
    for column, values in enumerate([np.ones(len(rows)), *(rows[k].to_numpy() for k in labels)]):
        counts[:, column] = np.bincount(group, weights=values, minlength=patients)
    part = partition(counts, np.array(shares), np.random.default_rng(cfg.seed))
    return np.asarray(np.array(names, dtype=object)[part][group])


def _parts(cfg: ProtocolConfig, subset: float) -> tuple[list[str], list[float]]:
    """Name and share of each part that is balanced; the part outside the subset has no name."""
    if cfg.folds is not None and cfg.fold is not None:
        names = [TRAIN] * cfg.folds
        names[cfg.fold], names[(cfg.fold + 1) % cfg.folds] = TEST, VAL
        shares = [1 / cfg.folds] * cfg.folds
    else:
        names = [TRAIN, VAL, TEST]
        shares = [1 - cfg.val_fraction - cfg.test_fraction, cfg.val_fraction, cfg.test_fraction]
    # What stays outside the subset is balanced as a part of its own, so that the subset is too.
    parts = [(n, s * subset) for n, s in zip(names, shares, strict=True)] + [("", 1 - subset)]
    kept = [(n, s) for n, s in parts if s > 0]
    return [n for n, _ in kept], [s for _, s in kept]


def oversample(rows: pd.DataFrame, label: str | None, times: int) -> pd.DataFrame:
    """Every row positive for `label` stands `times` times; copies follow at the end."""
    positive = rows[rows[label] == 1] if label else rows[:0]
    copies = [positive.assign(repeat=k) for k in range(1, times)]
    return pd.concat([rows.assign(repeat=0), *copies], ignore_index=True)


def undersample(rows: pd.DataFrame, labels: tuple[str, ...], cfg: ProtocolConfig) -> pd.DataFrame:
    """Keeps `negatives_per_positive` random rows without any label for each row with one.

    The report's section 3.2 B counts its 1:4.8 after oversampling, and so does this.
    """
    assert cfg.negatives_per_positive is not None
    positive = rows[list(labels)].to_numpy().any(1)
    negatives = np.flatnonzero(~positive)
    wanted = min(len(negatives), round(cfg.negatives_per_positive * int(positive.sum())))
    # A stream of its own: `seed` alone draws the split.
    kept = np.random.default_rng([cfg.seed, 1]).choice(negatives, wanted, replace=False)
    # In the rows' order, as if the others had never been there.
    return rows.iloc[np.sort(np.concatenate([np.flatnonzero(positive), kept]))]


def undersample_patients(
    rows: pd.DataFrame, labels: tuple[str, ...], cfg: ProtocolConfig
) -> pd.DataFrame:
    """As `undersample`, of whole patients: whoever has a positive row keeps all rows, and random
    others stay until as many negative rows as were asked for are next to there."""
    assert cfg.negatives_per_positive is not None
    positive = rows[list(labels)].to_numpy().any(1)
    group, _ = pd.factorize(rows["patient"])
    is_kept = np.zeros(group.max() + 1, bool)
    is_kept[group[positive]] = True
    others = np.random.default_rng([cfg.seed, 1]).permutation(np.flatnonzero(~is_kept))
    wanted = cfg.negatives_per_positive * int(positive.sum())
    # Negative rows that there are with none of the others, with the first, with the first two, ...
    counts = np.bincount(group)[others]
    reached = int((is_kept[group] & ~positive).sum()) + np.append(0, np.cumsum(counts))
    is_kept[others[: np.abs(reached - wanted).argmin()]] = True
    return rows[is_kept[group]]


def _stratified_pick(
    rows: pd.DataFrame, labels: tuple[str, ...], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rest and of a stratified `fraction` of the rows, both ascending."""
    picked = round(len(rows) * fraction)
    if not 1 <= picked < len(rows):
        raise UserError(
            f"{len(rows)} rows leave {picked} after taking a share of {fraction}; at least one row "
            f"must be on either side. Raise data.subset, or give more labelled slices."
        )
    # Imported here: with scikit-learn it takes a second that a job, whose cohort is made, can save.
    from iterstrat.ml_stratifiers import MultilabelStratifiedShuffleSplit

    splitter = MultilabelStratifiedShuffleSplit(n_splits=1, test_size=fraction, random_state=seed)
    target = rows[list(labels)].to_numpy()
    if len(labels) == 1:  # it takes only several; a label and its opposite are as good as one
        target = np.hstack([target, 1 - target])
    with warnings.catch_warnings():
        # numpy warns about a 0/0 inside when a label has no positive; the split is still right.
        warnings.simplefilter("ignore", RuntimeWarning)
        rest, pick = next(splitter.split(target, target))
    return np.sort(rest), np.sort(pick)


def audit(rows: pd.DataFrame, *scored: str) -> dict[str, float | None]:
    """The leak: what share of the scored rows was seen elsewhere.

    Args:
        rows: a cohort's rows.
        scored: the splits in question, each compared with all other splits that have rows.

    Returns:
        For `image`, `study` and `patient`, the share of the scored rows whose image, study or
        patient also stands in another split; None where no row's key is known. Rows of unknown
        study or patient are left out of both.
    """
    leak: dict[str, float | None] = {}
    for name, column in LEAKS.items():
        # Two rows without a key are not the same patient.
        known = rows[rows[column] != ""] if column in rows else rows[:0]
        seen, total = 0, 0
        for split in scored:
            inside = known["split"] == split
            seen += int(known.loc[inside, column].isin(known.loc[~inside, column].unique()).sum())
            total += int(inside.sum())
        leak[name] = round(seen / total, 6) if total else None
    return leak


def imbalance(rows: pd.DataFrame, labels: tuple[str, ...]) -> dict[str, float]:
    """Largest / smallest - 1 of each label's rates in the splits; infinite if one is 0."""
    rates = rows.groupby("split")[list(labels)].mean()
    low, high = rates.min(), rates.max()
    return {k: float(high[k] / low[k] - 1) if low[k] > 0 else float("inf") for k in labels}
