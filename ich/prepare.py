"""Prepares data without training: `python -m ich.prepare data=rsna data.root=/data/rsna.zip`.

Decodes exactly the slices of the cohort into the cache that sweeps share, and writes the data
report. `dry_run=true` prints the cohort's counts, class balance and leak from the labels alone;
`verify=true` compares every decoded slice with its checksum.
"""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from ich.base import entry
from ich.base.config import CONF_DIR, PrepareConfig, to_dataclass
from ich.base.terminal import Terminal
from ich.base.validation import validate
from ich.data.cache import verify_cache
from ich.data.dataset import load_cohort, open_store, prepare
from ich.data.protocol import Cohort
from ich.pages.data_page import write_data_report
from ich.pages.data_tables import balance_table, counts_table, leak_table
from ich.pages.page import format_cells


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="prepare")
def run(cfg: DictConfig) -> None:
    """One preparation; a user's mistake is one paragraph."""
    config = to_dataclass(OmegaConf.create(OmegaConf.to_container(cfg)), PrepareConfig)  # type: ignore[arg-type]
    with entry.without_traceback():
        validate(config)
        if config.dry_run:
            dry_run(config)
        else:
            prepare_all(config)


def dry_run(config: PrepareConfig) -> None:
    """Prints what the cohort would be; needs no image."""
    terminal = Terminal()
    with terminal.preparing() as report:
        cohort, key = load_cohort(config, open_store(config.data, report, required=False), report)
    _show(terminal, config, cohort, key)


def prepare_all(config: PrepareConfig) -> None:
    """Decodes what is missing, checks it if asked, and writes the data report."""
    terminal = Terminal()
    with terminal.preparing() as report:
        if config.verify:
            store = open_store(config.data, report)
            assert store is not None
            damaged = verify_cache(
                store,
                Path(config.data.cache_dir),
                config.data.cache_size,
                lambda done, total: report("checking slices", done, total),
            )
        done = prepare(config, report)
    if config.verify:
        terminal.verified(damaged)
    _show(terminal, config, done.cohort, done.key)
    folder = Path(config.output) / f"{config.data.source.value}-{done.key}"
    html, *_ = write_data_report(config, done, folder)
    terminal.prepared(done.cache.folder, len(done.cache.row), len(done.cache.quarantine), html)


def _show(terminal: Terminal, config: PrepareConfig, cohort: Cohort, key: str) -> None:
    source, protocol = config.data.source, config.protocol.name.value
    tables = [counts_table(cohort), balance_table(cohort, source)]
    terminal.tables(
        f"data={source.value}, protocol={protocol}, cohort {key}",
        [([str(c) for c in table], format_cells(table)) for table in tables],
        leak_table(cohort),
    )


if __name__ == "__main__":
    entry.run_hydra(run)
