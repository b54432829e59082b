"""What a cohort holds, to look at before any training: `data_report.html` and `data_report.md`.

Counts at each step, class balance, labels that stand together, leaks, quarantine, the range of HU,
and the report's Figures 1 and 2 (haemorrhage subtypes, windows as channels) from the user's own
slices. The tables need labels alone, so a dry run prints them too. Nothing of a patient or a study
but the share that leaks is ever written.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ich.base.config import Config, PrepareConfig, Source, WindowConfig
from ich.data.dicom import HU_MAX, HU_MIN
from ich.data.protocol import ENOUGH, LEAKS, SPLITS, TEST, TOLERANCE, TRAIN, VAL, Cohort, audit
from ich.pages.page import Block, Bullets, Grid, Picture, Section, Text, drawn, to_html, to_markdown

if TYPE_CHECKING:
    from ich.data.cache import Cache
    from ich.data.dataset import Prepared

# The report's section 3.2: % positive before and after oversampling, as it prints them.
REPORT_PERCENT = {
    "any": (14.34, 17.26),
    "epidural": (0.42, 3.34),
    "subdural": (6.27, 6.94),
    "subarachnoid": (4.74, 5.27),
    "intraparenchymal": (4.8, 5.39),
    "intraventricular": (3.48, 3.69),
}
SAMPLED = 500  # slices in the histogram, at most: a large cache is never read as a whole
CANDIDATES = 64  # slices looked at for one picture of the montage, at most
TISSUE = (0, 80)  # HU: the report's brain window, where brain and blood lie
_LISTED = 20  # ids and reasons of the quarantine that are listed
_WORDS = {TRAIN: "training", VAL: "validation", TEST: "test"}

# Okabe and Ito's colours, told apart by colour-blind readers.
_COLOURS = {"before": "#8c8c8c", TRAIN: "#0072b2", VAL: "#e69f00", TEST: "#009e73"}
_WINDOW_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
_DPI, _MONTAGE_DPI = 150, 120  # of charts, sharp on a phone; of noise, which compresses badly


# --- Tables: from the cohort alone -------------------------------------------------------------


def counts_table(cohort: Cohort) -> pd.DataFrame:
    """Rows after each step there is, in order: `step`, `rows`, `what`."""
    again = cohort.steps.get("repeated_ids", 0)
    resampled = "" if _is_report(cohort) else ", after resampling"
    what = {
        "images": "distinct labelled images"
        + (f" ({again:,} ids stood more than once)" if again else " (no id stood twice)"),
        "oversampled": "with the copies that oversampling adds",
        "undersampled": "without the negatives left out",
        "subset": "the stratified subset, copies included"
        if _is_report(cohort)
        else "images of the patients that are used",
        TRAIN: f"training rows{resampled}",
        VAL: "validation rows",
        TEST: "test rows",
    }
    what[cohort.scored] += ", which are scored"
    steps = [(k, n, what.get(k, "")) for k, n in cohort.steps.items() if k != "repeated_ids"]
    return pd.DataFrame(steps, columns=["step", "rows", "what"])


def balance_table(cohort: Cohort, source: Source) -> pd.DataFrame:
    """One row per label: positive images, and percent positive at each step and in each split.

    With the report's protocol also "% as reported": the report divides the positives after
    oversampling by the images before it; "% after" divides by the rows there really are. For
    `sound` also how far the parts were apart, largest / smallest rate - 1, before resampling.

    Args:
        cohort: any cohort.
        source: the report's own percentages are shown beside `rsna`, and the report's protocol.
    """
    table = pd.DataFrame({"label": list(cohort.labels)})
    table["positives"] = _positives(cohort, "images")
    table["% before"] = _percent(cohort, "images")
    if _is_report(cohort):
        table["positives after"] = _positives(cohort, "oversampled")
        table["% after"] = _percent(cohort, "oversampled")
        table["% as reported"] = _percent(cohort, "oversampled", "images")
        if source is Source.rsna:
            printed = [REPORT_PERCENT.get(k, (math.nan, math.nan)) for k in cohort.labels]
            table["report's % before"] = [before for before, _ in printed]
            table["report's % after"] = [after for _, after in printed]
    for split in cohort.splits:
        table[f"% {split}"] = _percent(cohort, split)
    if not _is_report(cohort):
        enough = _positives(cohort, "subset")
        apart = [cohort.imbalance[k] for k in cohort.labels]
        table["parts apart"] = [_apart(a, n) for a, n in zip(apart, enough, strict=True)]
    return table


def leak_table(cohort: Cohort) -> list[str]:
    """One sentence each for image, study and patient: the share of scored rows seen elsewhere."""
    scored = cohort.split(cohort.scored)
    return [
        _leak_sentence(kind, share, int((scored[LEAKS[kind]] != "").sum()), cohort.scored)
        if share is not None
        else f"{kind.capitalize()}: unknown: give data.metadata=FILE, a CSV of image, patient "
        f"and study."
        for kind, share in audit(cohort.rows, cohort.scored).items()
    ]


def _is_report(cohort: Cohort) -> bool:
    return "oversampled" in cohort.steps  # `sound` copies inside the training set alone


def _positives(cohort: Cohort, step: str) -> list[int]:
    return [cohort.positives[step][k] for k in cohort.labels]


def _percent(cohort: Cohort, step: str, of: str | None = None) -> list[float]:
    rows = max(1, cohort.steps[of or step])
    return [100 * n / rows for n in _positives(cohort, step)]


def _apart(value: float, positives: int) -> str:
    if not positives:
        return "no positive"
    if math.isinf(value):
        return "a part has no positive"
    mark = " (too far)" if positives >= ENOUGH and value > TOLERANCE else ""
    return f"{100 * value:.1f} %{mark}"


def _leak_sentence(kind: str, share: float, known: int, split: str) -> str:
    shown = f"{100 * share:.1f} %" if share >= 0.0005 else "less than 0.05 %" if share else "none"
    rows = f"{known:,} {_WORDS[split]} rows" + ("" if kind == "image" else f" of known {kind}")
    return f"{kind.capitalize()}: {shown} of the {rows} share their {kind} with another split."


# --- Contents: the same for HTML and Markdown --------------------------------------------------


def write_data_report(cfg: Config | PrepareConfig, prepared: Prepared, folder: Path) -> list[Path]:
    """Writes `data_report.html`, `data_report.md` and the latter's `figures/data_*.png`.

    Args:
        cfg: what the cohort was prepared with; its windows are those of the pictures.
        prepared: a cohort and its decoded slices; of these at most a few hundred are read.
        folder: made if absent.

    Returns:
        The files written, the HTML first.
    """
    cohort, cache = prepared.cohort, prepared.cache
    title = _title(cfg)
    sections: list[Section] = [
        ("Counts", _counts(cfg, prepared)),
        ("Class balance", _balance(cohort, cfg.data.source)),
        ("Label co-occurrence", _together(cohort)),
        ("Leak audit", [Text(_AUDIT), Bullets(leak_table(cohort))]),
        ("Quarantine", _quarantine(prepared)),
        ("Range of HU", _hounsfield(cfg, cohort, cache)),
        ("Examples", _montage(cfg, cohort, cache)),
    ]
    facts = {
        "protocol": cfg.protocol.name.value,
        "protocol.seed": str(cfg.protocol.seed),
        "date": date.today().isoformat(),
        "cohort": prepared.key,
    }
    files = {
        "data_report.html": to_html(title, facts, sections).encode(),
        "data_report.md": to_markdown(title, facts, sections).encode(),
    }
    pictures = [b for _, blocks in sections for b in blocks if isinstance(b, Picture)]
    files |= {f"figures/{p.name}.png": p.png for p in pictures}
    return [_write(folder / name, content) for name, content in files.items()]


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.rename(path)
    return path


def _title(cfg: Config | PrepareConfig) -> str:
    # Of a path only its last part: the rest tells of the machine, and of its user.
    name = Path(cfg.data.root).name if cfg.data.root else ""
    return f"Data report: {cfg.data.source.value}" + (f", {name}" if name else "")


def _counts(cfg: Config | PrepareConfig, prepared: Prepared) -> list[Block]:
    cohort, table = prepared.cohort, counts_table(prepared.cohort)
    images, left = cohort.rows["image_id"].nunique(), len(_quarantined(prepared))
    lost = len(prepared.wanted.rows) - len(cohort.rows)
    parts = [f"{cohort.steps[n]:,} {_WORDS[n]}" for n in cohort.splits]
    said = (
        f"Of {cohort.steps['images']:,} labelled images, protocol={cfg.protocol.name.value} uses "
        f"{images:,}, in {' and '.join(parts)} rows with {len(cohort.labels)} labels each. "
        f"In quarantine, because their files cannot be used: {left:,}. Tables of models come from "
        f"the {_WORDS[cohort.scored]} rows."
    )
    if cohort.scored == VAL:
        said += " There is no test set: epochs are chosen and scored on the same rows."
    gone = pd.DataFrame(
        [("quarantined", lost, f"rows of {left:,} images that cannot be used, left out below")],
        columns=table.columns,
    )
    before = int((~table["step"].isin(SPLITS)).sum())
    table = pd.concat([table[:before], gone, table[before:]], ignore_index=True)
    return [Text(said), Grid("Rows after each step", table)]


def _balance(cohort: Cohort, source: Source) -> list[Block]:
    caption = "Positives of each label: among the images, and in percent of each step's rows. "
    if _is_report(cohort):
        caption += (
            "After: over the rows after oversampling. As reported: the same positives over the "
            "images before oversampling, which is how the report counted."
        )
    else:
        caption += (
            f"The training rows are counted after resampling. Parts apart: largest over smallest "
            f"rate of the parts, minus 1, before resampling; too far is more than "
            f"{TOLERANCE:.0%} with at least {ENOUGH} positives."
        )
    return [Grid(caption, balance_table(cohort, source)), _balance_picture(cohort)]


def _balance_picture(cohort: Cohort) -> Picture:
    rates = {"before": _percent(cohort, "images")}
    rates |= {split: _percent(cohort, split) for split in cohort.splits}
    png, width = drawn(_draw_balance, [_brief(k) for k in cohort.labels], rates)
    caption = (
        "Percent positive of each label, among all images (before) and in the rows of each split. "
        "The scale is logarithmic, so that rare labels are seen: compare where bars end, not how "
        "long they are."
    )
    return Picture(
        "data_balance", png, width, "Bar chart of the last table's percentages.", caption
    )


def _together(cohort: Cohort) -> list[Block]:
    target = _images(cohort)[list(cohort.labels)].to_numpy(np.int64)
    counts = target.T @ target
    names = [_brief(k) for k in cohort.labels]
    png, width = drawn(_draw_together, names, counts)
    caption = (
        f"Distinct images of the cohort ({len(target):,}) that are positive for the row's and the "
        f"column's label; the percentage is of the row's label."
    )
    texts = [
        [f"{n:,} ({_share(n, row[k]):.0%})" if n else "0" for n in row]
        for k, row in enumerate(counts)
    ]
    # Built by position: two labels may be called alike once shown.
    frame = pd.DataFrame([[k, *row] for k, row in zip(cohort.labels, texts, strict=True)])
    frame.columns = pd.Index(["label", *cohort.labels])
    return [
        Picture("data_together", png, width, "Heat map of the next table.", caption),
        Grid("The same as a table", frame, folded=True),
    ]


def _images(cohort: Cohort) -> pd.DataFrame:
    """One row per image, in an order that depends on nothing but the ids."""
    rows = cohort.rows[["image_id", *cohort.labels]]
    return rows.drop_duplicates("image_id").sort_values("image_id", ignore_index=True)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


_AUDIT = (
    "The share of the scored rows whose image, study or patient is also in another split. A model "
    "may remember such rows instead of reading them, so they score too well."
)


def _quarantined(prepared: Prepared) -> pd.DataFrame:
    bad = prepared.cache.quarantine
    there = prepared.wanted.rows["image_id"]
    return bad[bad["image_id"].isin(there[there.isin(bad["image_id"])])]


def _quarantine(prepared: Prepared) -> list[Block]:
    bad = _quarantined(prepared)
    if bad.empty:
        return [Text("No image is in quarantine: every file could be used.")]
    reasons = bad["reason"].astype(str).value_counts()
    table = pd.DataFrame({"reason": reasons.index, "images": reasons.to_numpy()})
    ids = [_public(i) for i in bad["image_id"][:_LISTED]]
    more = f" and {len(bad) - _LISTED:,} more" if len(bad) > _LISTED else ""
    rest = f"; the {_LISTED} commonest of {len(table):,}" if len(table) > _LISTED else ""
    return [
        Text(f"{len(bad):,} images cannot be used."),
        Grid(f"Images in quarantine by reason{rest}", table[:_LISTED]),
        Text(f"{', '.join(ids)}{more}. All are in quarantine.csv, in the cache's folder."),
    ]


def _public(image_id: Any) -> str:
    """What is shown of an id that is a path: folders are often named after patients."""
    return str(image_id).rpartition("/")[2]


def _hounsfield(cfg: Config | PrepareConfig, cohort: Cohort, cache: Cache) -> list[Block]:
    counts, slices = hu_counts(cohort, cache, cfg.protocol.seed)
    if not slices:
        return [Text("No slice is decoded.")]
    decoded = int(_images(cohort)["image_id"].isin(cache.row).sum())
    png, width = drawn(_draw_hounsfield, counts / counts.sum(), cfg.windows.channels)
    caption = (
        f"Pixels of {slices:,} slices, drawn with protocol.seed from the {decoded:,} decoded ones, "
        f"by HU; logarithmic. The lines on top are the windows, with center and width: all below "
        f"becomes black, all above white. "
        f"{counts[0] / counts.sum():.1%} of the pixels are at the floor of {HU_MIN} HU (outside "
        f"the field of view, or padded)."
    )
    mode = int(counts[1:].argmax()) + 1 + HU_MIN
    alt = f"Histogram of HU with the windows marked. Above the floor, {mode} HU is the commonest."
    return [Picture("data_hu", png, width, alt, caption)]


def hu_counts(cohort: Cohort, cache: Cache, seed: int) -> tuple[np.ndarray, int]:
    """Pixels at each HU from HU_MIN to HU_MAX, int64 [4096], over a seeded sample of slices.

    Returns:
        The counts, and how many slices of the cohort were sampled, at most SAMPLED.
    """
    ids = cohort.rows["image_id"].unique()
    rows = np.sort(np.fromiter((cache.row[i] for i in ids if i in cache.row), np.int64))
    picked = np.random.default_rng([seed, 2]).permutation(rows)[:SAMPLED].astype(int)
    counts = np.zeros(HU_MAX - HU_MIN + 1, np.int64)
    for row in np.sort(picked):
        hu = np.clip(cache.hu[row], HU_MIN, HU_MAX).astype(np.int64)
        counts += np.bincount((hu - HU_MIN).ravel(), minlength=len(counts))
    return counts, len(picked)


def _montage(cfg: Config | PrepareConfig, cohort: Cohort, cache: Cache) -> list[Block]:
    examples = choose_examples(cohort, cache, cfg.data.any_label)
    windows = cfg.windows.channels
    missing = [k for k in (*cohort.labels, NEGATIVE) if k not in dict(examples)]
    told = Text(f"No decoded slice for: {', '.join(missing)}.") if missing else None
    if not examples:
        return [told] if told else []
    named = [(_brief(k), _public(i)) for k, i in examples]
    pictures = [compose(cache.hu[cache.row[i]], windows) for _, i in examples]
    png, width = drawn(_draw_montage, named, pictures, windows)
    composed = {1: "", 2: ", and both as red and green"}.get(
        len(windows), ", and the first three as red, green and blue"
    )
    caption = (
        f"The report's Figures 1 and 2 from these data: for each label one positive slice, with as "
        f"few other labels and as much tissue ({TISSUE[0]} to {TISSUE[1]} HU) as can be found, and "
        f"one slice without any label; in each window (center / width, HU){composed}."
    )
    listed = "; ".join(f"{k}: {i}" for k, i in named)
    picture = Picture("data_examples", png, width, f"CT slices. {listed}.", caption)
    return [picture, told] if told else [picture]


NEGATIVE = "negative"  # the montage's row without any label


def choose_examples(cohort: Cohort, cache: Cache, any_label: str | None) -> list[tuple[str, str]]:
    """(label, image id) of one positive slice per label, and of a negative one; what there is.

    Among the decoded slices with the fewest other labels, that with the most tissue of up to
    CANDIDATES, evenly spread over the ids. A slice is not shown twice if there is another.

    Args:
        cohort: whose images are looked through.
        cache: their slices.
        any_label: the label that others imply; it does not count as another label.
    """
    images = _images(cohort)
    images = images[[i in cache.row for i in images["image_id"]]]
    target = images[list(cohort.labels)].to_numpy(bool)
    ids = images["image_id"].array
    labels = target[:, [k != any_label for k in cohort.labels]].sum(1)
    groups = [(k, np.flatnonzero(target[:, n])) for n, k in enumerate(cohort.labels)]
    groups.append((NEGATIVE, np.flatnonzero(~target.any(1))))
    chosen: list[tuple[str, str]] = []
    for name, group in groups:
        fewest = group[labels[group] == labels[group].min(initial=len(cohort.labels))]
        used = {i for _, i in chosen}
        fresh = [i for i in ids[fewest] if i not in used] or list(ids[fewest])
        spread = np.unique(np.linspace(0, len(fresh) - 1, CANDIDATES).round().astype(int))
        shares = {fresh[k]: _tissue(cache.hu[cache.row[fresh[k]]]) for k in spread if fresh}
        if shares:
            chosen.append((name, max(shares, key=shares.__getitem__)))
    return chosen


def _tissue(hu: np.ndarray) -> float:
    """The share of a slice's pixels that is brain or blood, by HU."""
    return float(((hu >= TISSUE[0]) & (hu <= TISSUE[1])).mean())


def compose(hu: np.ndarray, windows: Sequence[WindowConfig]) -> list[np.ndarray]:
    """int16 HU [S, S] -> float32 in 0..1: one [S, S] per window; of several also an [S, S, 3].

    As `transforms.CTWindows` does for a batch. With two windows blue stays dark.
    """
    low = [w.center - w.width / 2 for w in windows]
    grey = [
        np.clip((hu.astype(np.float32) - b) / w.width, 0, 1).astype(np.float32)
        for b, w in zip(low, windows, strict=True)
    ]
    if len(grey) < 2:
        return grey
    return [*grey, np.dstack([*grey, np.zeros_like(grey[0])][:3])]


# --- Figures -----------------------------------------------------------------------------------


def _brief(name: str, most: int = 28) -> str:
    """A name on one line of a figure; long ones often differ at their end."""
    line = " ".join(str(name).split())
    tail = most // 3
    return line if len(line) <= most else f"{line[: most - tail - 1]}…{line[-tail:]}"


def _draw_balance(names: list[str], rates: dict[str, list[float]]) -> Any:
    from matplotlib.figure import Figure

    bars = len(names) * len(rates)
    figure = Figure(
        figsize=(9, 1.1 + 0.17 * bars + 0.1 * len(names)), dpi=_DPI, layout="constrained"
    )
    axis = figure.subplots()
    positive = [r for rate in rates.values() for r in rate if r > 0] or [1.0]
    least = 10 ** math.floor(math.log10(min(positive) / 1.5))
    height = 0.84 / len(rates)
    for n, (split, rate) in enumerate(rates.items()):
        y = np.arange(len(names)) + (n - (len(rates) - 1) / 2) * height
        axis.barh(y, rate, height * 0.9, color=_COLOURS[split], label=split)
        for at, r in zip(y, rate, strict=True):
            axis.annotate(f"{r:.2f}" if r else "0", (max(r, least), at), xytext=(3, 0),
                          textcoords="offset points", va="center", fontsize=7)  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlim(least, 2.2 * max(positive))
    axis.set_ylim(len(names) - 0.5, -0.5)
    _percent_ticks(axis.xaxis, 1)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("positive, logarithmic")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(rates), frameon=False)
    return figure


def _percent_ticks(axis: Any, factor: float) -> None:
    """Plain percentages on a logarithmic axis: matplotlib would write formulas."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{factor * x:g} %"))
    axis.set_minor_formatter(NullFormatter())


def _draw_together(names: list[str], counts: np.ndarray) -> Any:
    """counts: int [L, L]; each row is coloured by its share of the diagonal."""
    from matplotlib.figure import Figure

    side = 0.72 * len(names)
    figure = Figure(figsize=(side + 2.6, side + 1.9), dpi=_DPI, layout="constrained")
    axis = figure.subplots()
    share = counts / np.maximum(1, counts.diagonal())[:, None]
    image = axis.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    for (row, column), n in np.ndenumerate(counts):
        text = f"{_compact(n)}\n{share[row, column]:.0%}" if n else "0"
        dark = share[row, column] > 0.6
        axis.text(column, row, text, ha="center", va="center", fontsize=8,
                  color="white" if dark else "black")  # fmt: skip
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label="% of the row's label", shrink=0.8)
    return figure


def _compact(count: int) -> str:
    """A count in the width of a cell."""
    return f"{count:,}" if count < 100_000 else f"{count / 1000:,.0f}k"


def _draw_hounsfield(share: np.ndarray, windows: Sequence[WindowConfig]) -> Any:
    """share: of all pixels, at each HU from HU_MIN to HU_MAX."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=_DPI, layout="constrained")
    panels = (("all HU", HU_MIN, HU_MAX + 1, 16), ("near water", -200, 300, 2))
    for axis, (title, low, high, step) in zip(figure.subplots(1, 2), panels, strict=True):
        density = share[low - HU_MIN : high - HU_MIN].reshape(-1, step).mean(1)
        axis.stairs(density, np.arange(low, high + 1, step), fill=True, color="#b0b0b0", lw=0)
        some = density[density > 0]
        floor, top = (some.min(), some.max()) if len(some) else (1e-6, 1e-3)
        used = max(0.3, 0.93 - 0.08 * len(windows))  # of the height; windows are above
        least = floor / 2
        axis.set(yscale="log", xlim=(low, high), title=title)
        axis.set(ylim=(least, least * (top / least) ** (1 / used)))
        axis.set(xlabel="HU", ylabel="of all pixels, per HU")
        ticks = axis.get_yticks()
        axis.set_yticks(ticks[(ticks >= least) & (ticks <= min(1, 3 * top))])
        _percent_ticks(axis.yaxis, 100)
        axis.spines[["top", "right"]].set_visible(False)
        for n, window in enumerate(windows):
            _mark_window(axis, window, 0.93 - 0.08 * n, _WINDOW_COLOURS[n % 5], low, high)
    return figure


def _mark_window(
    axis: Any, window: WindowConfig, y: float, colour: str, low: float, high: float
) -> None:
    """A line from the window's lower to its upper end, at the height y of the axes."""
    left = max(low, window.center - window.width / 2)
    right = min(high, window.center + window.width / 2)
    if left >= right:
        return
    where = axis.get_xaxis_transform()
    axis.plot([left, right], [y, y], transform=where, color=colour, lw=3, solid_capstyle="butt")
    ends = [x for x in (left, right) if low < x < high]
    axis.vlines(ends, 0, y, transform=where, color=colour, lw=0.8, ls=":")
    text = f"{_brief(window.name)} {window.center:g} / {window.width:g}"
    margin = 0.2 * (high - low)  # a text of usual length stays inside
    middle = min(max((left + right) / 2, low + margin), high - margin)
    card = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axis.text(middle, y + 0.024, text, transform=where, ha="center", fontsize=8, bbox=card)


def _draw_montage(
    named: list[tuple[str, str]],
    pictures: list[list[np.ndarray]],
    windows: Sequence[WindowConfig],
) -> Any:
    """named: (label, id) of each row; pictures: per row one image per column."""
    from matplotlib.figure import Figure

    side = 1.7 if len(named) <= 8 else 1.35  # inches
    left, top, under = 1.5, 0.5, 0.22
    columns = len(pictures[0])
    width, height = left + max(2, columns) * side, top + len(named) * (side + under)
    figure = Figure(figsize=(width, height), dpi=_MONTAGE_DPI, facecolor="black")
    titles = [f"{_brief(w.name, 18)}\n{w.center:g} / {w.width:g}" for w in windows]
    titles += [f"the {'first three' if len(windows) > 3 else 'windows'}\nas colours"]
    for row, ((label, image_id), images) in enumerate(zip(named, pictures, strict=True)):
        y = height - top - row * (side + under) - side
        figure.text(0.1 / width, (y + side / 2) / height, textwrap.fill(label, 17),
                    color="white", va="center", fontsize=9)  # fmt: skip
        room = int((width - left) * 72 / 4.6)  # characters of 7 pt
        figure.text(left / width, (y - 0.04) / height, _brief(image_id, room), color="#b8b8b8",
                    va="top", fontsize=7)  # fmt: skip
        for column, image in enumerate(images):
            box = (left + column * side) / width, y / height, 0.98 * side / width, side / height
            axis = figure.add_axes(box)
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
            if row == 0:
                axis.set_title(titles[column], color="white", fontsize=9, pad=4)
    return figure
