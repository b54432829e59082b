"""The table of a benchmark, with versions and hardware."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from ich.base import provenance
from ich.base.config import Device
from ich.base.files import write_text
from ich.benchmarks.measure import PartResult, Table
from ich.training.devices import device_name, pick_device


class ReportWriter:
    """Saves what is measured as JSON and Markdown, named by date and device.

    Args:
        out: folders that each get both.
        settings: the options of the command.
    """

    def __init__(self, out: Sequence[Path], settings: str) -> None:
        device = pick_device(Device.auto)
        hardware, git = provenance.hardware(), provenance.git_state()
        self._out = out
        self._head: dict[str, object] = {
            "date": time.strftime("%Y-%m-%d"),
            "device": device_name(device),
            "processor": hardware.processor,
            "cores": hardware.cores,
            "memory_gib": hardware.memory_gib,
            "gpus": list(hardware.gpus),
            "versions": provenance.versions(),
            "commit": git.commit if git else "none",
            "settings": settings,
        }
        self._stem = f"{self._head['date']}-{device.type}"

    def write(self, result: PartResult) -> Path:
        """Saves all that is there; the path of the Markdown."""
        rows = {name: row.to_json() for name, row in result.rows.items()}
        saved: dict[str, object] = {**self._head, "rows": rows, "notes": result.notes}
        if result.tables:
            saved["tables"] = result.tables
        if result.failures:
            saved["failures"] = result.failures
        text = _markdown(self._head, result)
        for folder in self._out:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / f"{self._stem}.json", json.dumps(saved, indent=1))
            write_text(folder / f"{self._stem}.md", text)
        return self._out[0] / f"{self._stem}.md"


def _markdown(head: dict[str, object], result: PartResult) -> str:
    versions = head["versions"]
    assert isinstance(versions, dict)
    shown = {k: v for k, v in head.items() if k not in ("date", "device", "versions")}
    parts = [f"# {head['date']}, {head['device']}"]
    parts += [", ".join(f"{k} {v}" for k, v in values.items()) for values in (shown, versions)]
    lines = [["what", "ours, per s", "other, per s", "ratio", "lowest", "highest"]]
    for name, row in result.rows.items():
        values = row.to_json()
        rates = [f"{values[k]:,.1f}" if k in values else "" for k in ("ours", "plain")]
        lines.append([name, *rates, *(f"{values[k]:.3g}" for k in ("ratio", "lowest", "highest"))])
    parts += [_table(lines), *result.notes]
    for title, table in result.tables.items():
        parts += [f"## {title}", _table(table)]
    if result.failures:
        parts += ["## Not measured", *result.failures]
    return "\n\n".join(parts) + "\n"


def _table(lines: Table) -> str:
    """As Markdown; the first column is text, the others numbers."""
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
