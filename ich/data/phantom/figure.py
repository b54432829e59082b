"""Example slices of a phantom as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ich.data.phantom.rendering import simulate_study
from ich.data.phantom.spec import SUBTYPES, FloatArray, PhantomSlice, PhantomSpec

FIGURE_PATIENTS = 40  # looked through, at most, for a good example of each subtype
# Center and width in HU: brain, subdural, soft tissue.
WINDOWS = ((40, 80), (80, 200), (40, 380))


def _window(hu: npt.NDArray[np.int16], center: float, width: float) -> FloatArray:
    """HU [H, W] to 0..1."""
    values = (hu.astype(np.float32) - np.float32(center - width / 2)) / np.float32(width)
    return np.asarray(np.clip(values, 0, 1))


def choose_examples(spec: PhantomSpec) -> dict[str, PhantomSlice]:
    """One slice per subtype, with few other labels and a sizeable bleed, and a healthy one."""
    best: dict[str, tuple[float, PhantomSlice]] = {}
    for patient in range(min(spec.patients, FIGURE_PATIENTS)):
        for s in simulate_study(spec, patient):
            present = [k for k in SUBTYPES if s.labels[k]]
            brain = float(((s.hu > 10) & (s.hu < 60)).mean())
            # The root: twice the bleed is worth less than twice the brain around it.
            scores = {
                k: brain * float(s.masks[k].mean()) ** 0.5 / len(present) ** 2 for k in present
            }
            for name, score in (scores or {"healthy": brain}).items():
                if name not in best or score > best[name][0]:
                    best[name] = (score, s)
    order = (*SUBTYPES, "healthy")
    return {k: best[k][1] for k in order if k in best}


def draw_figure(spec: PhantomSpec, path: Path) -> None:
    """Draw examples side by side: in the brain window, as the network's channels, with the masks.

    The channels are the three windows, shown as red, green and blue.
    """
    # Imported here: most phantoms are written without a figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    examples = choose_examples(spec)
    side = 1.9
    figure = Figure(figsize=(len(examples) * side + 0.3, 3 * side + 0.3), facecolor="black")
    FigureCanvasAgg(figure)
    edges = {"left": 0.025, "right": 1, "bottom": 0, "top": 0.95}
    gaps = {"wspace": 0.02, "hspace": 0.02}
    grid = figure.subplots(3, len(examples), squeeze=False, gridspec_kw=edges | gaps)
    for column, s in zip(grid.T, examples.values(), strict=True):
        windows = [_window(s.hu, center, width) for center, width in WINDOWS]
        for axes, panel in zip(column, [windows[0], np.dstack(windows), windows[0]], strict=True):
            axes.imshow(panel, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
            margin = 0.06 * spec.size  # of air
            limits = (margin, spec.size - margin)
            axes.set(xticks=[], yticks=[], xlim=limits, ylim=limits[::-1])
            axes.spines[:].set_visible(False)
        _draw_contours(column[-1], s)
        name = ", ".join(k for k in SUBTYPES if s.labels[k]) or "no hemorrhage"
        column[0].set_title(name, color="white", fontsize=9, pad=4)
    for axes, name in zip(grid[:, 0], ("brain window", "three windows", "bleed"), strict=True):
        axes.set_ylabel(name, color="white", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=1200 / figure.get_figwidth(), facecolor="black")


def _draw_contours(axes: Any, s: PhantomSlice) -> None:
    """Outline each subtype's mask in its colour."""
    colours = ("#ff8c42", "#ff4d6d", "#4cc9f0", "#b5e48c", "#ffd60a")
    for subtype, colour in zip(SUBTYPES, colours, strict=True):
        if s.masks[subtype].any():
            axes.contour(s.masks[subtype], levels=[0.5], colors=[colour], linewidths=1.0)
