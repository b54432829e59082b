"""What a prediction writes: tables of slices and studies, what was left out, a submission."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ich.base.config import UserError
from ich.base.files import csv_text, replacing, write_text
from ich.inference.ensemble import Ensemble
from ich.inference.explain import check_folder
from ich.inference.predicted_files import PredictedFiles
from ich.scoring.metrics import sigmoid

_ENDINGS = (".csv", ".parquet")
# In the order of the competition's sample submission.
RSNA_LABELS = (
    "epidural",
    "intraparenchymal",
    "intraventricular",
    "subarachnoid",
    "subdural",
    "any",
)
_TOP = 3  # slices of a study whose mean is its second score


@dataclass(frozen=True)
class OutputPaths:
    """Where a prediction goes. slices: a table, `out.csv`; others lie beside it. explain: a folder.
    submission: a CSV."""

    slices: Path
    explain: Path | None = None
    submission: Path | None = None

    @property
    def studies(self) -> Path:
        """`out.csv` -> `out.studies.csv`."""
        return self.slices.with_name(f"{self.slices.stem}.studies{self.slices.suffix}")

    @property
    def left_out(self) -> Path:
        """`out.csv` -> `out.left_out.csv`."""
        return self.slices.with_name(f"{self.slices.stem}.left_out.csv")

    def check(self, inputs: Sequence[str]) -> None:
        """Refuses what cannot be written, or would write over an input or another output.

        Raises:
            UserError: naming the option.
        """
        # All of them, before anything is decoded: the last is written after all work is done.
        tables = (self.slices, self.studies, self.left_out)
        for path in tables:
            check_writable("-o", path, _ENDINGS)
            # By where they really lie: `./a.csv` is a.csv.
            if path.resolve() in [Path(name).resolve() for name in inputs]:
                raise UserError(
                    f"-o {self.slices} would write over the input {path}. Choose another file."
                )
        if self.submission:
            check_writable("--submission", self.submission, (".csv",))
            if self.submission.resolve() in [path.resolve() for path in tables]:
                raise UserError(
                    f"--submission is {str(self.submission)!r}, which is also where -o "
                    f"{self.slices} writes. Choose another file."
                )
        if self.explain:
            for path in filter(None, (*tables, self.submission)):
                if path.resolve().is_relative_to(self.explain.resolve()):
                    raise UserError(
                        f"--explain is {str(self.explain)!r}, where {path.name} would go too, but "
                        f"that folder is for its pages alone. Choose another."
                    )
            check_folder(self.explain)


def check_writable(option: str, path: Path, endings: Sequence[str]) -> None:
    """Raises UserError if an option's file has another ending or cannot be written."""
    if path.suffix not in endings:
        raise UserError(
            f"{option} is {str(path)!r}, but must end with {' or '.join(endings)}. Choose another "
            f"name."
        )
    # Tried and not asked: permissions do not tell of a disk mounted read-only.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Hidden, and not the file itself, which may be an earlier result.
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
    # A viewer or a script may read the table while another is written.
    if path.suffix == ".csv":
        write_text(path, csv_text(table))
        return
    with replacing(path) as part:
        table.to_parquet(part, index=False)


def write_left_out(
    path: Path,
    predicted: PredictedFiles,
    names: Sequence[str],
    archives: Sequence[tuple[str, str]],
) -> pd.DataFrame:
    """Writes `file` and `reason` of what had no prediction, if there is any; returns it.

    Args:
        path: a CSV; an earlier one does not stay where there is nothing to list.
        predicted: what became of N files.
        names: the N files'.
        archives: name and reason of those that could not be opened.
    """
    rows = [(names[n], reason) for n, reason in sorted(predicted.reasons.items())]
    table = pd.DataFrame([*archives, *rows], columns=["file", "reason"])
    if len(table):
        write_table(table, path)
    else:
        # Else an earlier call's list would seem to be of this one.
        path.unlink(missing_ok=True)
    return table


def slice_table(model: Ensemble, predicted: PredictedFiles, names: Sequence[str]) -> pd.DataFrame:
    """One row per predicted slice: `file`, a probability per label, `study` (a key that names
    nobody, empty if unknown), `positive` (labels that reach their threshold, separated by `;`),
    and of several models `<label>@<model>`."""
    numbers = predicted.numbers
    logits = predicted.logits[numbers]
    mean = sigmoid(logits.mean(1))
    table = pd.DataFrame({"file": [names[n] for n in numbers]})
    table[list(model.labels)] = mean
    table["study"] = [predicted.study[n] for n in numbers]
    table["positive"] = [model.positives(p) for p in mean]
    if len(model.members) > 1:
        each = sigmoid(logits)
        for m, member in enumerate(model.members):
            table[[f"{k}@{member.name}" for k in model.labels]] = each[:, m]
    return table


def study_table(model: Ensemble, predicted: PredictedFiles, names: Sequence[str]) -> pd.DataFrame:
    """One row per study, in order of appearance: `study`, `slices`, per label the highest
    probability, as `<label>_top3` the mean of the highest three, as `<label>_slice` the file with
    the highest, and `positive`, the labels whose highest reaches its threshold.

    Slices whose file names no study are in none.
    """
    studies: dict[str, list[int]] = {}
    for n in predicted.numbers:
        if key := predicted.study[n]:
            studies.setdefault(key, []).append(n)
    rows = []
    for key, members in studies.items():
        probability = sigmoid(predicted.logits[members].mean(1))
        # Each label by itself: their highest slices are often not the same one.
        ranked = np.sort(probability, axis=0)[::-1]
        highest = probability.argmax(0)
        row: dict[str, object] = {"study": key, "slices": len(members)}
        row |= dict(zip(model.labels, ranked[0], strict=True))
        for i, k in enumerate(model.labels):
            row[f"{k}_top3"] = ranked[:_TOP, i].mean()
            row[f"{k}_slice"] = names[members[highest[i]]]
        row["positive"] = model.positives(ranked[0])
        rows.append(row)
    # Named, so that a table without a study has its heading all the same.
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
    # Of two files of one image it is not known which the competition means.
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
