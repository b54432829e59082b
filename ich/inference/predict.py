"""What `ich predict` does: from its options to tables, pages and the exit status.

`predict` is the command. How files go through networks is in `predicted_files`, what is written in
`outputs` and `explain`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from ich.base.config import Device, TrackingConfig, UserError
from ich.base.entry import Status
from ich.base.terminal import Terminal
from ich.data.inputs import Inputs
from ich.data.patients import Pseudonyms
from ich.inference.ensemble import Ensemble, load_ensemble
from ich.inference.explain import explain
from ich.inference.graph import has_onnx
from ich.inference.outputs import (
    OutputPaths,
    check_submission,
    image_id_of,
    slice_table,
    study_table,
    write_left_out,
    write_submission,
    write_table,
)
from ich.inference.predicted_files import PredictedFiles, predict_files
from ich.training.devices import pick_device

_WORTH_CONVERTING = 3000  # files: a conversion takes 2 to 8 s
_SHOWN = 20  # studies, and files left out, in the terminal


@dataclass(frozen=True)
class PredictOptions:
    """The command's options, as its help has them.

    inputs: DICOM files, folders or archives. models: what names each network of the ensemble.
    threshold: as `Ensemble.with_thresholds` reads it. names: how outputs call a file, of `NAMES` in
    `ich.base.config`, where `ENGINES` is too. workers: decoding processes, None for one per core.
    """

    inputs: Sequence[str]
    models: Sequence[str]
    out: Path
    threshold: str | None
    tta: str
    explain: Path | None
    submission: Path | None
    names: str
    device: Device
    engine: str
    batch_size: int
    workers: int | None
    tracking_uri: str | None
    cache_dir: Path

    @property
    def paths(self) -> OutputPaths:
        return OutputPaths(self.out, self.explain, self.submission)

    def check(self) -> None:
        """Refuses, before anything is spent, what cannot be written.

        Raises:
            UserError: an ending, a folder, or two outputs in one file.
        """
        self.paths.check(self.inputs)
        if self.submission and self.names == "pseudonym":
            raise UserError(
                "--submission names images by their files, as the competition does, so it does not "
                "go with --names pseudonym. Leave one of them out."
            )


def predict(options: PredictOptions) -> int:
    """Predicts, writes, prints; returns the exit status.

    Raises:
        UserError: before anything is decoded: no such model or input, or a file that cannot be
            written; after it: no file could be predicted.
    """
    # In this order: what costs nothing is checked before networks are loaded, and these before
    # anything is decoded.
    options.check()
    paths, terminal, keys = options.paths, Terminal(), Pseudonyms.beside(options.cache_dir)
    with terminal.preparing() as report:
        inputs = Inputs.find(options.inputs)
        model = _load(options, len(inputs))
        progress = partial(report, "predicting")
        predicted = predict_files(
            model, inputs, keys.key, progress, options.tta, options.batch_size, options.workers
        )
    rename = partial(_pseudonym, keys) if options.names == "pseudonym" else str
    # Renamed once, here: tables, pages and messages get these names alone.
    names = [rename(inputs.name(n)) for n in range(len(inputs))]
    refused = [(rename(name), reason) for name, reason in inputs.refused]
    # First, for with nothing predicted it is the one file that says why.
    left_out = write_left_out(paths.left_out, predicted, names, refused)
    if not predicted.numbers:
        raise UserError(_nothing_predicted(predicted, names))
    slices = slice_table(model, predicted, names)
    studies = study_table(model, predicted, names)
    write_table(slices, paths.slices)
    write_table(studies, paths.studies)
    if paths.submission:
        # By the real names: `check` has refused pseudonyms beside a submission.
        images = [image_id_of(inputs.name(n)) for n in predicted.numbers]
        write_submission(slices, images, paths.submission)
    messages = list(_messages(options, model, studies, predicted, left_out))
    _print(terminal, model, studies, messages)
    # Last: the tables are complete, whatever becomes of the pages.
    if paths.explain:
        with terminal.preparing() as report:
            progress = partial(report, "explaining")
            pages = explain(model, inputs, predicted, names, paths.explain, progress)
        terminal.say(f"{len(pages)} studies with findings: {paths.explain / 'index.html'}")
    return Status.LEFT_OUT if len(left_out) else Status.DONE


def _load(options: PredictOptions, files: int) -> Ensemble:
    """The ensemble with the thresholds asked for; `files` tells whether converting it pays."""
    device = pick_device(options.device)
    tracking = TrackingConfig(mlflow=True, uri=options.tracking_uri)
    converted = conversion_folder(options, device, files)
    model = load_ensemble(options.models, device, tracking, converted)
    model = model.with_thresholds(options.threshold)
    if options.submission:
        check_submission(model)
    return model


def conversion_folder(options: PredictOptions, device: torch.device, files: int) -> Path | None:
    """Where networks converted for onnxruntime are kept; None if torch is to compute.

    Raises:
        UserError: onnxruntime is asked for and not installed, or there is a GPU to compute on.
    """
    engine, is_possible = options.engine, device.type == "cpu" and has_onnx()
    if engine == "onnx" and not is_possible:
        raise UserError(
            "--engine is onnx, which computes on the CPU and needs three packages. Install them "
            "with pip install 'ich[onnx]' and give --device cpu, or leave --engine at auto."
        )
    # Asked for, it is converted whatever it takes; `auto` weighs that against the number of files.
    wanted = engine == "onnx" or (engine == "auto" and files >= _WORTH_CONVERTING)
    return options.cache_dir / "onnx" if wanted and is_possible else None


def _pseudonym(pseudonyms: Pseudonyms, name: str) -> str:
    # Quoted, for a file's name may end in a space, and wherever it is named from.
    return pseudonyms.key("file", repr(os.path.abspath(name)))  # noqa: PTH100


def _nothing_predicted(predicted: PredictedFiles, names: Sequence[str]) -> str:
    first = min(predicted.reasons)
    return (
        f"none of the {len(names):,} files is a CT slice that can be predicted. The first, "
        f"{names[first]}: {predicted.reasons[first]}. Give the folder or archive that holds the "
        f"slices."
    )


def _print(terminal: Terminal, model: Ensemble, studies: pd.DataFrame, messages: list[str]) -> None:
    rows = [
        [str(r["study"]), f"{r['slices']}", *(f"{r[k]:.3f}" for k in model.labels), r["positive"]]
        for _, r in studies.head(_SHOWN).iterrows()
    ]
    title = f"{model.name}: highest probability of each study"
    headings = ["study", "slices", *model.labels, "positive"]
    terminal.tables(title, [(headings, rows)], messages)


def _messages(
    options: PredictOptions,
    model: Ensemble,
    studies: pd.DataFrame,
    predicted: PredictedFiles,
    left_out: pd.DataFrame,
) -> Iterator[str]:
    """What is to be known about the table of studies."""
    paths, count = options.paths, len(predicted.numbers)
    yield f"Thresholds: {model.thresholds_text}: {model.chosen_by}."
    if model.slices > 1:
        yield "Each slice was seen with the one before and the one after it in its series."
    if predicted.lone:
        yield (
            f"{predicted.lone:,} slices are alone in their series, or do not say where they lie: "
            f"they stood for their neighbours."
        )
    if model.has_head and (alone := sum(not predicted.in_study[n] for n in predicted.numbers)):
        yield (
            f"{alone:,} of {count:,} slices are by themselves: the only one of their series, or "
            f"nothing tells where they lie. The slice network alone predicted these."
        )
    if lone := sum(not predicted.study[n] for n in predicted.numbers):
        yield f"{lone:,} slices name no study and are in none of these rows."
    if len(studies) > _SHOWN:
        yield f"{len(studies) - _SHOWN:,} more studies are in {paths.studies}."
    for file, reason in left_out.head(_SHOWN).itertuples(index=False):
        yield f"left out: {file}: {reason}"
    if len(left_out):
        yield f"{len(left_out):,} files left out, listed in {paths.left_out.name}."
        if options.submission:
            yield "The submission lacks them, and the competition refuses one with gaps."
    if options.tta != "none":
        yield "Averaged over flips; the thresholds are of slices as they are."
    yield f"{count:,} slices: {paths.slices}. Research only."
