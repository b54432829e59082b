"""The report's networks beside ours: its tables, its findings, and what ImageNet foretells."""

from __future__ import annotations

import pandas as pd

from ich.pages.description import METRIC_NAMES, interval_text
from ich.pages.page import Block, Bullets, Table, Text
from ich.scoring.comparison import Comparison, SettingResult
from ich.scoring.findings import (
    REPORT_METRICS,
    REPORT_TABLE_1,
    REPORT_TABLE_2,
    SIMILAR,
    imagenet_trend,
    judge,
)


def against_the_report(comparison: Comparison) -> list[Block]:
    """Where the report's networks stand once each on the same rows; else nothing."""
    for rows in comparison.evaluation_sets:
        by_model = rows.setting_per_model()
        ours = {k: s for k, s in by_model.items() if k in REPORT_TABLE_2}
        if len(ours) >= 2:  # every finding is about two networks at least
            return [_report_table(ours), *_findings(ours), *_trends(ours)]
    return []


def _report_table(ours: dict[str, SettingResult]) -> Table:
    lines = []
    for model, (accuracy, auc) in REPORT_TABLE_2.items():
        top1, _, millions = REPORT_TABLE_1[model]
        line = {
            "model": model,
            "ImageNet top-1": f"{top1:.3f}",
            "ImageNet M": f"{millions:g}",
            "report's accuracy": f"{accuracy:.4f}",
            "report's AUC": f"{auc:.4f}",
        }
        if setting := ours.get(model):  # what we did not train stays empty
            line |= {
                "trained M": f"{setting.runs[0].fit.params / 1e6:.2f}",
                "accuracy": f"{setting.mean('accuracy'):.4f}",
                "AUC": f"{setting.mean('auc'):.4f}",
                "accuracy - report's": f"{setting.mean('accuracy') - accuracy:+.4f}",
                "AUC - report's": f"{setting.mean('auc') - auc:+.4f}",
            }
        lines.append(line)
    caption = (
        "The report's Tables 1 and 2 beside ours. It counts the parameters of the ImageNet "
        "networks; trained are fewer, since the head is one layer. Its AUC is presumably "
        "micro-averaged; it does not say. Unless ours were trained and scored on the RSNA set, the "
        "differences are between data sets, not between methods."
    )
    return Table(caption, pd.DataFrame(lines))


def _findings(ours: dict[str, SettingResult]) -> list[Block]:
    blocks: list[Block] = []
    for metric in REPORT_METRICS:
        replicates = {k: s.replicates[metric] for k, s in ours.items() if s.replicates}
        if not replicates:
            return [Text("Its findings are not tested: that takes intervals.")]
        verdicts = judge(metric, replicates)
        frame = pd.DataFrame(
            {
                "the report's finding": [v.finding.text for v in verdicts],
                "here": [v.ours for v in verdicts],
                "because": [v.why for v in verdicts],
                "in the report's own table": [v.theirs for v in verdicts],
            }
        )
        caption = (
            f"By {METRIC_NAMES[metric]}. A finding holds if the intervals of all its differences "
            f"say so, and cannot be told if one holds zero (several at once are not corrected "
            f"for). Similar: closer than {SIMILAR[metric]:.4f}, a third of the distance from the "
            f"report's worst to its best."
        )
        blocks.append(Table(caption, frame))
    return blocks


def _trends(ours: dict[str, SettingResult]) -> list[Block]:
    lines = []
    for metric in REPORT_METRICS:
        scores = {k: s.mean(metric) for k, s in ours.items()}
        replicates = {k: s.replicates[metric] for k, s in ours.items() if s.replicates}
        trend = imagenet_trend(metric, scores, replicates)
        if trend:
            lines.append(
                f"Rank correlation (Spearman) of ImageNet top-1 accuracy with our "
                f"{METRIC_NAMES[metric]} over {trend.n} networks: {trend.correlation:+.2f} "
                f"({interval_text(trend.interval, '+.2f')} over patients and seeds, for these "
                f"networks); in the report's Table 2 {trend.theirs:+.2f}. So few networks say "
                f"little of others."
            )
    return [Bullets(lines)] if lines else []
