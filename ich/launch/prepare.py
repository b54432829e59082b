"""What `ich prepare` does: decoded slices and the data report, and no job."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ich.base.config import PrepareConfig
from ich.base.terminal import Terminal
from ich.data.cache import verify_cache
from ich.data.cache_folder import CacheFolder
from ich.data.cohorts import find_store, load_cohort, open_store
from ich.data.dataset import prepare
from ich.data.protocol import Cohort
from ich.pages.data.report import write_data_report
from ich.pages.data.tables import balance_table, counts_table, leak_table
from ich.pages.page import format_cells


def dry_run(config: PrepareConfig) -> None:
    """Prints what the cohort would be; needs no image."""
    terminal = Terminal()
    with terminal.preparing() as report:
        cohort, key = load_cohort(config, find_store(config.data, report), report)
    _show(terminal, config, cohort, key)


def prepare_and_report(config: PrepareConfig) -> None:
    """Decodes what is missing, checks it if asked, and writes the data report."""
    terminal, data = Terminal(), config.data
    damaged, changed = list[str](), list[str]()
    with terminal.preparing() as report:
        prepared = prepare(config, report)
        if config.verify:
            store, progress = open_store(data, report), partial(report, "checking slices and files")
            slices = CacheFolder(prepared.cache.folder, data.cache_size)
            damaged, changed = verify_cache(store, slices, data.workers, progress)
        if damaged or changed:
            prepared = prepare(config, report)
    if config.verify:
        terminal.verified(damaged, changed)
    _show(terminal, config, prepared.cohort, prepared.key)
    folder = Path(config.output) / f"{data.source.value}-{prepared.key}"
    html, *_ = write_data_report(config, prepared, folder)
    cache = prepared.cache
    terminal.prepared(cache.folder, len(cache.row), len(cache.quarantine), html)


def _show(terminal: Terminal, config: PrepareConfig, cohort: Cohort, key: str) -> None:
    source, protocol = config.data.source, config.protocol.name.value
    tables = [counts_table(cohort), balance_table(cohort, source)]
    terminal.tables(
        f"data={source.value}, protocol={protocol}, cohort {key}",
        [([str(c) for c in table], format_cells(table)) for table in tables],
        leak_table(cohort),
    )
