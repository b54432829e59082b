"""What a prediction writes: tables of slices and studies, what was left out, a submission."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ich.base.config import UserError
from ich.inference.ensemble import Ensemble, Predicted
from ich.inference.explain import check_folder
from ich.scoring.metrics import sigmoid

_WRITERS = {".csv": "to_csv", ".parquet": "to_parquet"}
_TOP = 3  # slices of a study whose mean is its second score


def studies_path(out: Path) -> Path:
    """`out.csv` -> `out.studies.csv`."""
    return out.with_name(f"{out.stem}.studies{out.suffix}")


def left_out_path(out: Path) -> Path:
    """`out.csv` -> `out.left_out.csv`."""
    return out.with_name(f"{out.stem}.left_out.csv")


def check_outputs(args: argparse.Namespace) -> None:
    """Refuses, before anything is spent, what cannot be written.

    Raises:
        UserError: an ending, a place, or two outputs in one file.
    """
    for path in (args.out, studies_path(args.out), left_out_path(args.out)):
        check_writable("-o", path, tuple(_WRITERS))
        if path.resolve() in [Path(name).resolve() for name in args.inputs]:
            raise UserError(
                f"-o {args.out} would write over the input {path}. Choose another file."
            )
    if args.explain:
        check_folder(args.explain)
    if not args.submission:
        return
    check_writable("--submission", args.submission, (".csv",))
    others = (args.out, studies_path(args.out), left_out_path(args.out))
    if args.submission.resolve() in [p.resolve() for p in others]:
        raise UserError(
            f"--submission is {str(args.submission)!r}, which is also where -o {args.out} writes. "
            f"Choose another file."
        )
    if args.names == "pseudonym":
        raise UserError(
            "--submission names images by their files, as the competition does, so it does not go "
            "with --names pseudonym. Leave one of them out."
        )


def check_writable(option: str, path: Path, endings: Sequence[str]) -> None:
    """Raises UserError if an option's file has another ending or cannot be written."""
    if path.suffix not in endings:
        raise UserError(
            f"{option} is {str(path)!r}, but must end with {' or '.join(endings)}. Choose another "
            f"name."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.part")
        probe.touch()
        probe.unlink()
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
    except OSError as error:
        raise UserError(
            f"{option} is {str(path)!r}, which cannot be written ({error}). Choose another place."
        ) from None


def write_table(table: pd.DataFrame, path: Path) -> None:
    """CSV or Parquet, by the name's ending; whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        getattr(table, _WRITERS[path.suffix])(part, index=False)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def write_left_out(
    out: Path, found: Predicted, names: Sequence[str], archives: Sequence[tuple[str, str]]
) -> pd.DataFrame:
    """Writes `out.left_out.csv`, `file` and `reason`, if there is any; returns it."""
    rows = [(names[n], reason) for n, reason in sorted(found.reasons.items())]
    table = pd.DataFrame([*archives, *rows], columns=["file", "reason"])
    path = left_out_path(out)
    if len(table):
        write_table(table, path)
    else:
        path.unlink(missing_ok=True)  # of an earlier time
    return table


def slice_table(model: Ensemble, found: Predicted, names: Sequence[str]) -> pd.DataFrame:
    """One row per predicted slice: `file`, a probability per label, `study` (a key that names
    nobody, empty if unknown), `positive` (labels that reach their threshold, separated by `;`),
    and of several models `<label>@<model>`."""
    good = [n for n in range(len(names)) if n not in found.reasons]
    logits = found.logits[good]
    mean = sigmoid(logits.mean(1))
    table = pd.DataFrame({"file": [names[n] for n in good]})
    table[list(model.labels)] = mean
    table["study"] = [found.study[n] for n in good]
    table["positive"] = [model.positives(p) for p in mean]
    if len(model.members) > 1:
        each = sigmoid(logits)
        for m, member in enumerate(model.members):
            table[[f"{k}@{member.name}" for k in model.labels]] = each[:, m]
    return table


def study_table(model: Ensemble, found: Predicted, names: Sequence[str]) -> pd.DataFrame:
    """One row per study, in order of appearance: `study`, `slices`, per label the highest
    probability, as `<label>_top3` the mean of the highest three, as `<label>_slice` the file with
    the highest, and `positive`, the labels whose highest reaches its threshold.

    Slices whose file names no study are in none.
    """
    of_study: dict[str, list[int]] = {}
    for n, key in enumerate(found.study):
        if key and n not in found.reasons:
            of_study.setdefault(key, []).append(n)
    rows = []
    for key, members in of_study.items():
        probability = sigmoid(found.logits[members].mean(1))
        ranked = np.sort(probability, axis=0)[::-1]
        decides = probability.argmax(0)
        row: dict[str, object] = {"study": key, "slices": len(members)}
        row |= dict(zip(model.labels, ranked[0], strict=True))
        for i, k in enumerate(model.labels):
            row[f"{k}_top3"] = ranked[:_TOP, i].mean()
            row[f"{k}_slice"] = names[members[decides[i]]]
        row["positive"] = model.positives(ranked[0])
        rows.append(row)
    columns = ["study", "slices", *model.labels]
    columns += [f"{k}_{what}" for k in model.labels for what in ("top3", "slice")] + ["positive"]
    return pd.DataFrame(rows, columns=columns)


def image_id_of(name: str) -> str:
    """A file's name without a DICOM ending; other dots belong to it."""
    path = Path(name)
    return path.stem if path.suffix.lower() in (".dcm", ".dicom", ".ima") else path.name


def check_submission(model: Ensemble) -> None:
    """Raises UserError if the labels are not the competition's."""
    if not set(RSNA_LABELS) <= set(model.labels):
        raise UserError(
            f"--submission needs the competition's labels {', '.join(RSNA_LABELS)}, but the model "
            f"has {', '.join(model.labels)}. Leave it out, or take a model of the RSNA set."
        )


def write_submission(slices: pd.DataFrame, stems: Sequence[str], path: Path) -> None:
    """The competition's long format: `ID,Label`, six rows per image, `ID_<image>_<label>`.

    Args:
        slices: of `slice_table`, N rows.
        stems: the N names of the images, as the competition gives them to its files.
        path: a CSV.
    """
    twice = sorted({stem for stem, count in Counter(stems).items() if count > 1})
    if twice:
        raise UserError(
            f"{len(twice):,} images have several files (the first: {twice[0]}), so {path.name} "
            f"would name them twice and was not written; the other tables are there. Give each "
            f"image once."
        )
    ids = [f"{stem}_{k}" for stem in stems for k in RSNA_LABELS]
    values = slices[list(RSNA_LABELS)].to_numpy().ravel()
    write_table(pd.DataFrame({"ID": ids, "Label": values}), path)


# In the order of the competition's sample submission.
RSNA_LABELS = (
    "epidural",
    "intraparenchymal",
    "intraventricular",
    "subarachnoid",
    "subdural",
    "any",
)
