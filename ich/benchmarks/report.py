"""The table of a benchmark, with versions and hardware."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from ich.base import provenance
from ich.base.files import write_text
from ich.benchmarks.measure import REPORT, PartResult, compose_job
from ich.benchmarks.settings import MODELS
from ich.training.devices import device_name, pick_device


def write_report(result: PartResult, out: Path, settings: str) -> Path:
    """Saves the rows as JSON and Markdown, named by date and device; the path of the latter."""
    device = pick_device(compose_job("mobilenet_v2", 96, Path()).train.device)
    hardware, versions = provenance.hardware(), provenance.versions()
    git = provenance.git_state()
    head = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        "processor": hardware.processor,
        "cores": hardware.cores,
        "memory_gib": hardware.memory_gib,
        "gpus": list(hardware.gpus),
        "versions": versions,
        "commit": git.commit if git else "none",
        "settings": settings,
    }
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{head['date']}-{device.type}"
    rows = {name: row.to_json() for name, row in result.rows.items()}
    saved = {**head, "rows": rows, "notes": result.notes}
    write_text(out / f"{stem}.json", json.dumps(saved, indent=1))
    shown = {k: v for k, v in head.items() if k not in ("date", "device", "versions")}
    lines = [
        f"# {head['date']}, {head['device']}",
        "",
        ", ".join(f"{k} {v}" for k, v in shown.items()),
        "",
        ", ".join(f"{k} {v}" for k, v in versions.items()),
        "",
        "| what | ours, per s | other, per s | ratio | lowest | highest |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        rates = [f"{row[k]:,.1f}" if k in row else "" for k in ("ours", "plain")]
        ratios = [f"{row[k]:.3g}" for k in ("ratio", "lowest", "highest")]
        lines.append(f"| {' | '.join([name, *rates, *ratios])} |")
    path = out / f"{stem}.md"
    write_text(path, "\n".join([*lines, "", "\n\n".join(result.notes)]) + "\n")
    return path


def projection(hours: float, models: Sequence[str], size: int, what: str) -> str:
    """A note on how long the report's sweep would take at the rates of a part."""
    networks = "eight networks" if len(models) == len(MODELS) else ", ".join(models)
    return (
        f"The report's sweep ({networks}, {REPORT['epochs']} epochs, {REPORT['train']:,} "
        f"training and {REPORT['val']:,} validation rows) at {size} px would take {hours:.1f} "
        f"hours at these rates, {what}."
    )
