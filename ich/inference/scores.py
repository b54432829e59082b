"""What `ich evaluate` does: which rows, their predictions, and what a reader must know.

Slices are decoded and windowed as the model's weights file says, whatever the config's sizes.
`evaluate` is the command; `wanted_rows`, `score` and `predict_images` are its steps.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from ich.base.config import (
    ContextConfig,
    ContextName,
    EvaluateConfig,
    PrepareConfig,
    Rows,
    UserError,
)
from ich.base.files import write_text
from ich.base.progress import ProgressCallback, StageCallback
from ich.base.terminal import Terminal
from ich.base.validation import validate as validate_ranges
from ich.data.cache import check_quarantine
from ich.data.cohorts import cohort_rows, labelled_images, load_cohort, open_store
from ich.data.dataset import number_keys
from ich.data.inputs import Inputs, SourceFiles
from ich.data.order import check_order, find_order
from ich.data.patients import KEYS, Pseudonyms
from ich.data.protocol import TRAIN, VAL
from ich.data.store import SliceStore
from ich.inference.ensemble import (
    Ensemble,
    Member,
    config_value,
    load_ensemble,
)
from ich.inference.predicted_files import predict_files
from ich.inference.recalibrate import check_model, recalibrate
from ich.inference.session import TTA
from ich.pages.evaluation_page import recalibration_blocks, shown_table, write_evaluation
from ich.pages.page import format_cells
from ich.scoring.evaluation import Evaluation, metrics_table
from ich.scoring.predictions import Predictions
from ich.scoring.uncertainty import MIN_GROUPS, ScoredRows, group_rows
from ich.training.devices import pick_device


def validate(config: EvaluateConfig) -> None:
    """Checks every range, and what only a prediction knows: how it averages, and its folder's name.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    validate_ranges(config)
    if not config.models:
        raise UserError(
            "models is empty. Give at least one, as models=multirun_reports/demo/vgg16."
        )
    if config.tta not in TTA:
        raise UserError(f"tta is {config.tta!r}, but must be one of {', '.join(TTA)}.")
    if not config.name:
        return
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]*", config.name):
        raise UserError(
            f"name is {config.name!r}, but must be letters, digits and _.,=+- (it becomes a "
            f"folder)."
        )


def evaluate(config: EvaluateConfig) -> Path:
    """Predicts, scores, compares and writes; returns the page."""
    terminal = Terminal()
    names = [config.models] if isinstance(config.models, str) else [str(m) for m in config.models]
    model = load_ensemble(names, pick_device(config.device), config.tracking)
    model = model.with_thresholds(config.threshold)
    if config.recalibrate:
        check_model(model)
    # Its name has a hash of the weights, so it is known only now.
    folder = Path(config.output) / (config.name or _folder_name(config, model))
    _make_folder(folder)
    with terminal.preparing() as report:
        store = open_store(config.data, report)
        rows, available = wanted_rows(config, model, store, report)
        labels = common_labels(model, available)
        evaluation = score(config, model, store, rows, labels, partial(report, "predicting"))
    with terminal.preparing(lasting=False) as report:
        table = metrics_table(evaluation, config.resamples, partial(report, "resampling"))
    site = recalibrate(config, model, evaluation, folder) if config.recalibrate else None
    blocks = recalibration_blocks(site.table, site.notes, labels) if site else []
    page = write_evaluation(evaluation, table, folder, blocks)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    shown = shown_table(table, ["auc", "accuracy", *(f"auc_{k}" for k in labels)], "slice")
    terminal.tables(
        f"{model.name} on data={config.data.source.value}",
        [([str(c) for c in shown], format_cells(shown))],
        [*evaluation.notes, *(site.notes if site else [])],
    )
    terminal.say(f"evaluation: {page}")
    return page


def _make_folder(folder: Path) -> None:
    """Before anything is spent; raises UserError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the evaluation goes to {folder}, which cannot be made a folder ({error}). Choose "
            f"another with output= and name=."
        ) from None


def _folder_name(config: EvaluateConfig, model: Ensemble) -> str:
    """The model and the data, and a hash of all that tells two evaluations apart: the weights too,
    for an alias moves."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(values, dict)
    for key in ("name", "output", "tracking", "device"):  # of these no number depends
        del values[key]
    if not config.recalibrate:  # as evaluations of before were called
        del values["recalibrate"]
    digest = hashlib.sha256(repr(values).encode())
    for member in model.members:
        digest.update(member.weights.read_bytes())
    # A model may be called by a file's name, with any characters.
    stem = re.sub(r"[^A-Za-z0-9_.,=+-]", "-", model.members[0].name).strip(".-")[:60] or "model"
    return f"{stem}-on-{config.data.source.value}-{digest.hexdigest()[:6]}"


def wanted_rows(
    config: EvaluateConfig, model: Ensemble, store: SliceStore, report: StageCallback
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """`image_id`, `path`, labels and keys of the rows to score; and the labels' names.

    Raises:
        UserError: a split is asked for that is not the models' own, or that the protocol lacks.
    """
    # No protocol: what it would repeat or split is no matter to a model that is only scored.
    if config.rows is Rows.all:
        if (model.slices > 1 or model.has_head) and config.data.subset < 1:
            raise UserError(
                f"data.subset is {config.data.subset:g}, which takes single slices of a study, but "
                f"{model.name} sees each slice with others of its study. Give data.subset=1, or "
                f"rows=test."
            )
        return labelled_images(config, store, report)
    cohort, key = load_cohort(_as_trained(config, model), store, report)
    for member in model.members:
        # Their own rows, or none: the test rows of another split may have been trained on.
        if _cohort_of(member) != key:
            raise UserError(
                f"rows is {config.rows.value}, but the config's data, protocol and subset make "
                f"another cohort ({key}) than {member.name} was trained on "
                f"({_cohort_of(member) or 'unknown'}): their {config.rows.value} rows are others, "
                f"and may have been trained on. Give the run's data, protocol and data.subset (its "
                f"config.yaml has them), or rows=all."
            )
    rows = cohort.split(config.rows.value)
    if not len(rows):
        raise UserError(
            f"rows is {config.rows.value}, but protocol={config.protocol.name.value} has no such "
            f"rows; it has {', '.join(cohort.splits)}. Choose one of these, or rows=all."
        )
    return rows.reset_index(drop=True), cohort.labels


def _as_trained(config: EvaluateConfig, model: Ensemble) -> PrepareConfig:
    """What makes the cohort, with the models' context: where studies stay whole it is another."""
    context = ContextConfig(ContextName[model.members[0].metadata.context])
    return PrepareConfig(False, False, "", config.data, config.protocol, context=context)


def _cohort_of(member: Member) -> str:
    """The fingerprint of what a member was trained on; empty if nothing tells."""
    return member.run.read_origin().cohort if member.run else ""


def common_labels(model: Ensemble, available: tuple[str, ...]) -> list[str]:
    """The model's labels that the data have too, in the model's order.

    Raises:
        UserError: there is none.
    """
    # Other people's data may lack a label; metrics of the others are still worth having.
    common = [k for k in model.labels if k in available]
    if not common:
        raise UserError(
            f"the model's labels are {', '.join(model.labels)}, and the data's "
            f"{', '.join(available)}: none is the same. Name the columns of the label CSV as the "
            f"model names its labels, and say with data.label_columns which to use."
        )
    return common


def score(
    config: EvaluateConfig,
    model: Ensemble,
    store: SliceStore,
    rows: pd.DataFrame,
    labels: list[str],
    progress: ProgressCallback,
) -> Evaluation:
    """Predicts each distinct image once, and scores every row.

    Raises:
        UserError: more files than data.max_quarantine cannot be used, or none can.
    """
    # Under `report` an image stands up to eight times: it is decoded and predicted once.
    images = predict_images(config, model, store, rows.drop_duplicates("image_id"), progress)
    rows = rows[rows["image_id"].isin(images.logits.index)].reset_index(drop=True)
    if not len(rows):
        raise UserError("no labelled slice is left to score. Mend data.root or data.labels.")
    # By id, repeats included: from here on every row of the protocol counts again.
    logits = images.logits.loc[rows["image_id"], labels].to_numpy()
    target = rows[labels].to_numpy(np.float32)
    patient, image_id = number_keys(rows["patient"]), rows["image_id"].to_numpy(str)
    # Slices of one patient are not independent, so patients are resampled.
    group, unit = group_rows(patient, image_id)
    scored = ScoredRows(tuple(labels), target, logits, group)
    here = Predictions(scored, unit, image_id, number_keys(rows["study"]), (logits, target))
    # Over the same labels as here, or the two would not compare.
    validation = model.validation.select_labels(labels) if model.validation else None
    notes = list(_notes(config, model, here, validation, len(images.left_out)))
    if images.alone:
        notes.append(
            f"{images.alone:,} of {len(images.logits):,} images are by themselves: the only one of "
            f"their series, or nothing tells where they lie. The slice network alone predicted "
            f"these."
        )
    notes += [text for member in model.members for text in _overlap(config, member, rows)]
    thresholds = {k: model.thresholds[k] for k in labels}
    return Evaluation(model.name, here, validation, thresholds, notes, images.left_out)


@dataclass(frozen=True)
class PredictedImages:
    """What became of distinct images.

    logits: float32, the members' mean: a row per predicted image, by its id, and a column per
    label. left_out: `image_id` and `reason` of the others, by id. alone: how many of the first no
    head over studies saw in its study.
    """

    logits: pd.DataFrame
    left_out: pd.DataFrame
    alone: int = 0


def predict_images(
    config: EvaluateConfig,
    model: Ensemble,
    store: SliceStore,
    images: pd.DataFrame,
    progress: ProgressCallback,
) -> PredictedImages:
    """Predicts images (columns `image_id`, and `path` in the store, empty without a file).

    Raises:
        UserError: more of them than data.max_quarantine cannot be used.
    """
    # What has no file is told apart from what cannot be read, and both are listed.
    present = images[images["path"] != ""]
    inputs = Inputs([SourceFiles(store, "", present["path"].tolist())])
    key, places = Pseudonyms.beside(Path(config.data.cache_dir)).key, None
    if model.slices > 1 or model.has_head:
        # As in training: by data.metadata if it has positions, and refused where nothing tells.
        places = find_order(config.data, present, store, None)
        if model.slices > 1:
            check_order(places[places["readable"]], ContextName.neighbours.value)
    predicted = predict_files(
        model, inputs, key, progress, config.tta, config.batch_size, config.data.workers, places
    )
    missing = images.loc[images["path"] == "", ["image_id"]].assign(reason="the file is missing")
    reasons = [predicted.reasons.get(n, "") for n in range(len(present))]
    refused = present[["image_id"]].assign(reason=reasons).query("reason != ''")
    left_out = pd.concat([missing, refused]).sort_values("image_id", ignore_index=True)
    # Too many bad files are a wrong data.root, as in training. 0: every one was tried.
    check_quarantine(left_out["reason"].tolist(), len(images), 0, config.data.max_quarantine)
    # Logits, as the thresholds were chosen on their mean.
    ids, mean = present["image_id"].to_numpy(), predicted.logits.mean(1)
    good = predicted.numbers
    alone = sum(not predicted.in_study[n] for n in good) if model.has_head else 0
    return PredictedImages(pd.DataFrame(mean[good], ids[good], list(model.labels)), left_out, alone)


def _notes(
    config: EvaluateConfig,
    model: Ensemble,
    here: Predictions,
    validation: Predictions | None,
    left_out: int,
) -> Iterator[str]:
    """What was scored and how; of the rows' overlap with the training see `_overlap`."""
    labels, count = here.scored.labels, here.scored.group_count
    flips = ", averaged over flips; its validation and thresholds are of slices as they are"
    yield f"Model: {model.name}" + (flips if config.tta != "none" else "")
    which = "every labelled image once" if config.rows is Rows.all else f"its {config.rows.value}"
    yield (
        f"Rows: data={config.data.source.value}, {which}: {len(here.image_id):,} rows of "
        f"{len(set(here.image_id.tolist())):,} images, of {count:,} {here.unit}; {left_out:,} "
        f"files left out."
    )
    yield f"Thresholds: {model.chosen_by}."
    if config.resamples and count >= MIN_GROUPS:
        yield f"Intervals: 95 %, {config.resamples:,} bootstrap resamples of {here.unit}."
    else:
        yield f"No intervals: {count:,} {here.unit}, {config.resamples} resamples."
    if validation is None:
        yield (
            "The model's validation is not at hand (a lone weights file, or members that were "
            "validated on different rows): nothing is compared with it."
        )
    # Averages over fewer labels are other numbers than in the run's table.
    if missing := [k for k in model.labels if k not in labels]:
        yield (
            f"Not evaluated, since the data do not have it: {', '.join(missing)}. AUC and accuracy "
            f"are over {', '.join(labels)} on both sides."
        )


def _overlap(config: EvaluateConfig, member: Member, rows: pd.DataFrame) -> Iterator[str]:
    """How many of the rows a member was trained on, or chosen by, as far as this machine tells."""
    # The cohort lies where its training kept it, which may be another folder, or another machine.
    folder, here = config_value(member.run, "data.cache_dir"), Path(config.data.cache_dir)
    cohort = cohort_rows(Path(str(folder)), _cohort_of(member), here) if folder else None
    if cohort is None:
        yield f"Whether {member.name} was trained on any of them is unknown: no file of its cohort."
        return
    for split, what in ((TRAIN, "was trained on"), (VAL, "was chosen by")):
        seen = cohort[cohort["split"] == split]
        shares = [f"{rows['image_id'].isin(seen['image_id']).mean():.1%} the image"]
        for kind in reversed(KEYS):  # as every table of leaks: image, study, patient
            keys = set(seen[kind]) - {""}
            # Without keys on either side no overlap would be found, which is not the same as none.
            is_known = keys and (rows[kind] != "").any()
            share = f"{rows[kind].isin(keys).mean():.1%}" if is_known else "unknown how many"
            shares.append(f"{share} the {kind}")
        yield f"Of the rows, these share with what {member.name} {what}: {', '.join(shares)}."
