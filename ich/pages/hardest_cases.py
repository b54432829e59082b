"""The slices that a run got most wrong, as pictures in its own windows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ich.base.config import Config, UserError, WindowConfig, load_config
from ich.base.files import write_bytes
from ich.data.cohorts import cohort_files
from ich.data.dataset import load_dataset
from ich.pages.figures import STYLE, subplots
from ich.pages.page import Picture, Text, draw_picture
from ich.scoring.comparison import Run
from ich.scoring.metrics import ANY, sigmoid

log = logging.getLogger(__name__)
_HARDEST = 4  # cases of each kind


@dataclass(frozen=True)
class Case:
    """A slice that a run got wrong: its id, what it shows, and the probability of `label`."""

    image_id: str
    truth: str
    probability: float


def hardest(run: Run) -> tuple[str, list[Case], list[Case]]:
    """The most confident mistakes on one label: `any` if there is one, else the most frequent.

    Returns:
        The label, missed positives (the least probable first) and false alarms (the most probable
        first), each image once.
    """
    assert run.predictions is not None
    scored, ids = run.predictions.scored, run.predictions.image_id
    labels = scored.labels
    i = labels.index(ANY) if ANY in labels else int(scored.target.sum(0).argmax())
    probability = sigmoid(scored.logits[:, i])
    # Stable: among equal probabilities the order of the rows decides, and a report that is made
    # again has the same pictures.
    order = np.argsort(probability, kind="stable")

    def cases(rows: np.ndarray) -> list[Case]:
        by_image: dict[str, Case] = {}  # oversampled images stand in several rows
        for row in rows:
            # `any` says nothing beside the kinds of bleed, which imply it.
            shown = [k for k, t in zip(labels, scored.target[row], strict=True) if t and k != ANY]
            truth = ", ".join(shown) or ("positive" if scored.target[row, i] else "none")
            case = Case(str(ids[row]), truth, float(probability[row]))
            by_image.setdefault(case.image_id, case)
            if len(by_image) == _HARDEST:
                break
        return list(by_image.values())

    positive = scored.target[order, i] > 0.5
    return labels[i], cases(order[positive]), cases(order[~positive][::-1])


def draw_hardest(run: Run, folder: Path) -> Picture | Text:
    """The hardest cases as window images; a sentence where their slices are not at hand."""
    import matplotlib

    label, missed, alarms = hardest(run)
    try:
        config = load_config(run.paths.config)
        cohort = run.paths.read_origin().cohort
        slices = _slices(config, cohort, [case.image_id for case in (*missed, *alarms)])
    # A report may be made where the slices are not, or by a later version of ich.
    except (UserError, OSError, KeyError) as error:
        log.warning("the hardest cases are not drawn: %s", error)
        slices = {}
    if not slices:
        return Text("The decoded slices of this cohort are not at hand here: nothing is shown.")
    with matplotlib.rc_context(STYLE):
        picture = draw_picture(
            "hardest",
            f"hardest false negatives and false positives of {run.name}",
            f"{run.name}: slices with {label} that it found least likely (left), and slices "
            f"without that it found most likely (right), in the run's windows. Above each, what it "
            f"shows and the probability that was predicted.",
            _draw,
            [(case.truth.replace(", ", ",\n"), case) for case in missed]
            + [(f"no {label}", case) for case in alarms],
            slices,
            config.windows.channels[:3],
            is_photograph=True,
        )
    write_bytes(folder / "hardest.png", picture.png)
    return picture


def _slices(config: Config, cohort: str, image_ids: Sequence[str]) -> dict[str, np.ndarray]:
    """int16 HU [S, S] of some scored images, from the cache of decoded slices; none without it."""
    # Of the run's own cohort, whatever has become of its data set since.
    if not (cohort and cohort_files(config, cohort).facts.exists()):
        return {}
    # Nothing is decoded for a report.
    dataset = load_dataset(config, build=False, key=cohort)
    split = dataset.test if dataset.test is not None else dataset.val
    row = dict(zip(split.image_id.tolist(), split.row.tolist(), strict=True))
    return {k: np.asarray(dataset.hu[row[k]]) for k in image_ids}


def _draw(
    titled: Sequence[tuple[str, Case]],
    slices: dict[str, np.ndarray],
    windows: Sequence[WindowConfig],
) -> Any:
    """A column per case, under its title, and a row per window."""
    size = 1.5 * len(titled), 1.45 * len(windows) + 0.7
    figure, axes = subplots(len(windows), len(titled), size)
    for column, (title, case) in enumerate(titled):
        axes[0, column].set_title(f"{title}\n{case.probability:.3f}", fontsize=8)
        for axis, window in zip(axes[:, column], windows, strict=True):
            low = window.center - window.width / 2
            axis.imshow(slices[case.image_id], cmap="gray", vmin=low, vmax=low + window.width)
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
    for axis, window in zip(axes[:, 0], windows, strict=True):
        axis.set_ylabel(window.name, fontsize=8)
    return figure
