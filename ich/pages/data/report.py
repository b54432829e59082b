"""What a cohort holds, to look at before any training: `data_report.html` and `data_report.md`.

Counts at each step, class balance, labels that stand together, leaks, quarantine, the range of HU,
and the report's Figures 1 and 2 (haemorrhage subtypes, windows as channels) from the user's own
slices. The tables need labels alone, so a dry run prints them too. Nothing of a patient or a study
but the share that leaks is ever written.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ich.base.config import Config, PrepareConfig, Source
from ich.base.files import write_bytes
from ich.data.dicom import HU_MIN
from ich.data.protocol import ENOUGH, SPLITS, TOLERANCE, VAL, Cohort, audit
from ich.pages.data import figures, slices, tables
from ich.pages.page import (
    Block,
    Bullets,
    Picture,
    Section,
    Table,
    Text,
    Verdict,
    draw_picture,
    to_html,
    to_markdown,
)

if TYPE_CHECKING:
    from ich.data.cache import Cache
    from ich.data.dataset import Prepared

_LISTED = 20  # ids and reasons of the quarantine that are listed


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
    title, lead = _title(cfg), [_verdict(cfg, prepared)]
    sections: list[Section] = [
        ("Counts", _counts(prepared)),
        ("Class balance", _balance(cohort, cfg.data.source)),
        ("Label co-occurrence", _cooccurrence(cohort)),
        ("Leak audit", [Text(_AUDIT), Bullets(tables.leak_table(cohort))]),
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
        "data_report.html": to_html(title, facts, sections, lead).encode(),
        "data_report.md": to_markdown(title, facts, sections, lead).encode(),
    }
    pictures = [b for _, blocks in sections for b in blocks if isinstance(b, Picture)]
    # The page holds its pictures; Markdown links to files.
    files |= {f"figures/{p.name}.png": p.png for p in pictures}
    return [_write(folder / name, content) for name, content in files.items()]


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)
    return path


def _title(cfg: Config | PrepareConfig) -> str:
    # Of a path only its last part: the rest tells of the machine, and of its user.
    name = Path(cfg.data.root).name if cfg.data.root else ""
    return f"Data report: {cfg.data.source.value}" + (f", {name}" if name else "")


def _verdict(cfg: Config | PrepareConfig, prepared: Prepared) -> Verdict:
    """How much there is, and what flatters whoever is scored on it."""
    cohort, unusable = prepared.cohort, len(_quarantined(prepared))
    parts = [f"{cohort.steps[n]:,} {tables.SPLIT_NAMES[n]}" for n in cohort.splits]
    text = (
        f"Of {cohort.steps['images']:,} labelled images, protocol={cfg.protocol.name.value} uses "
        f"{cohort.rows['image_id'].nunique():,}, in {' and '.join(parts)} rows with "
        f"{len(cohort.labels)} labels each."
    )
    # The most of image, study and patient.
    shares = [share for share in audit(cohort.rows, cohort.scored).values() if share is not None]
    most = max(shares, default=0.0)
    cautions = []
    if most:
        text_of_most = f"{most:.1%}" if most >= 0.001 else "less than 0.1 %"
        cautions.append(f"Scores will flatter: {text_of_most} of the scored rows leak, see below.")
    if cohort.scored == VAL:
        cautions.append("There is no test set: epochs are chosen and scored on the same rows.")
    if unusable:
        cautions.append(f"In quarantine, because their files cannot be used: {unusable:,} images.")
    return Verdict(text, cautions)


def _counts(prepared: Prepared) -> list[Block]:
    cohort = prepared.cohort
    unusable = len(_quarantined(prepared))
    # Between the protocol's own steps and the splits, which are counted without what is lost.
    table = tables.counts_table(cohort)
    lost = {
        "step": "quarantined",
        "rows": len(prepared.wanted.rows) - len(cohort.rows),
        "what": f"rows of {unusable:,} images that cannot be used, left out below",
    }
    is_split = table["step"].isin(SPLITS)
    table = pd.concat([table[~is_split], pd.DataFrame([lost]), table[is_split]])
    return [Table("Rows after each step", table)]


def _balance(cohort: Cohort, source: Source) -> list[Block]:
    caption = "Positives of each label: among the images, and in percent of each step's rows. "
    if tables.is_report(cohort):
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
    return [Table(caption, tables.balance_table(cohort, source)), _balance_picture(cohort)]


def _balance_picture(cohort: Cohort) -> Picture:
    rates = {"before": tables.percent_positive(cohort, "images")}
    rates |= {split: tables.percent_positive(cohort, split) for split in cohort.splits}
    return draw_picture(
        "data_balance",
        "Bar chart of the last table's percentages.",
        "Percent positive of each label, among all images (before) and in the rows of each split. "
        "The scale is logarithmic, so that rare labels are seen: compare where bars end, not how "
        "long they are.",
        figures.draw_balance,
        cohort.labels,
        rates,
    )


def _cooccurrence(cohort: Cohort) -> list[Block]:
    target = slices.distinct_images(cohort)[list(cohort.labels)].to_numpy(np.int64)
    counts = target.T @ target
    picture = draw_picture(
        "data_together",
        "Heat map of the next table.",
        f"Distinct images of the cohort ({len(target):,}) that are positive for the row's and the "
        f"column's label; the percentage is of the row's label.",
        figures.draw_cooccurrence,
        cohort.labels,
        counts,
    )
    # On the diagonal `row[k]` is the label's own count: where it is 0, all n of its row are.
    texts = [
        [f"{n:,} ({n / row[k]:.0%})" if n else "0" for n in row] for k, row in enumerate(counts)
    ]
    # Built by position: two labels may be called alike once shown.
    frame = pd.DataFrame([[k, *row] for k, row in zip(cohort.labels, texts, strict=True)])
    frame.columns = pd.Index(["label", *cohort.labels])
    return [picture, Table("The same as a table", frame, folded=True)]


_AUDIT = (
    "The share of the scored rows whose image, study or patient is also in another split. A model "
    "may remember such rows instead of reading them, so they score too well."
)


def _quarantined(prepared: Prepared) -> pd.DataFrame:
    """Of the cache's quarantine what this cohort wanted: a cache is shared by cohorts."""
    quarantine = prepared.cache.quarantine
    return quarantine[quarantine["image_id"].isin(prepared.wanted.rows["image_id"])]


def _quarantine(prepared: Prepared) -> list[Block]:
    images = _quarantined(prepared)
    if images.empty:
        return [Text("No image is in quarantine: every file could be used.")]
    reasons = images["reason"].astype(str).value_counts()
    table = pd.DataFrame({"reason": reasons.index, "images": reasons.to_numpy()})
    ids = [_public(i) for i in images["image_id"][:_LISTED]]
    more = f" and {len(images) - _LISTED:,} more" if len(images) > _LISTED else ""
    rest = f"; the {_LISTED} commonest of {len(table):,}" if len(table) > _LISTED else ""
    return [
        Text(f"{len(images):,} images cannot be used."),
        Table(f"Images in quarantine by reason{rest}", table[:_LISTED]),
        Text(f"{', '.join(ids)}{more}. All are in quarantine.csv, in the cache's folder."),
    ]


def _public(image_id: Any) -> str:
    """What is shown of an id that is a path: folders are often named after patients."""
    return str(image_id).rpartition("/")[2]


def _hounsfield(cfg: Config | PrepareConfig, cohort: Cohort, cache: Cache) -> list[Block]:
    counts, sampled = slices.hu_counts(cohort, cache, cfg.protocol.seed)
    if not sampled:
        return [Text("No slice is decoded.")]
    decoded = int(slices.distinct_images(cohort)["image_id"].isin(cache.row).sum())
    shares = counts / counts.sum()
    # Above the floor, where air outside the field of view and padding outnumber all else.
    mode = int(counts[1:].argmax()) + 1 + HU_MIN
    picture = draw_picture(
        "data_hu",
        f"Histogram of HU with the windows marked. Above the floor, {mode} HU is the commonest.",
        f"Pixels of {sampled:,} slices, drawn with protocol.seed from the {decoded:,} decoded "
        f"ones, by HU; logarithmic. The lines on top are the windows, with center and width: all "
        f"below becomes black, all above white. {shares[0]:.1%} of the pixels are at the floor of "
        f"{HU_MIN} HU (outside the field of view, or padded).",
        figures.draw_hounsfield,
        shares,
        cfg.windows.channels,
    )
    return [picture]


def _montage(cfg: Config | PrepareConfig, cohort: Cohort, cache: Cache) -> list[Block]:
    examples = slices.choose_examples(cohort, cache, cfg.data.any_label)
    windows = cfg.windows.channels
    blocks: list[Block] = []
    if examples:
        low, high = slices.TISSUE
        named = [(figures.shorten(label), _public(image_id)) for label, image_id in examples]
        listed = "; ".join(f"{label}: {image_id}" for label, image_id in named)
        colours = {1: "", 2: ", and both as red and green"}.get(
            len(windows), ", and the first three as red, green and blue"
        )
        picture = draw_picture(
            "data_examples",
            f"CT slices. {listed}.",
            f"The report's Figures 1 and 2 from these data: for each label one positive slice, "
            f"with as few other labels and as much tissue ({low} to {high} HU) as can be found, "
            f"and one slice without any label; in each window (center / width, HU){colours}.",
            figures.draw_montage,
            named,
            [slices.apply_windows(cache.hu[cache.row[i]], windows) for _, i in examples],
            windows,
            is_photograph=True,
        )
        blocks.append(picture)
    if missing := [k for k in (*cohort.labels, slices.NEGATIVE) if k not in dict(examples)]:
        blocks.append(Text(f"No decoded slice for: {', '.join(missing)}."))
    return blocks
