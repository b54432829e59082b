"""Prepares data without training: `ich prepare data=rsna data.root=/data/rsna.zip`.

Decodes exactly the slices of the cohort into the cache that sweeps share, and writes the data
report. `dry_run=true` prints the cohort's counts, class balance and leak from the labels alone;
`verify=true` compares every decoded slice with its checksum.
"""

from __future__ import annotations

from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

from ich.base.config import CONF_DIR, PrepareConfig
from ich.base.entry import end_on_signals, exit_status
from ich.base.memory import importing, leave
from ich.base.validation import validate
from ich.launch.command import carrying, run_hydra, typed


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="prepare")
@carrying
def run(cfg: DictConfig) -> None:
    """One preparation."""
    config = typed(cfg, PrepareConfig)
    validate(config)
    with importing():  # it takes a second or two, which a mistake need not wait for
        from ich.launch.prepare import dry_run, prepare_and_report

    (dry_run if config.dry_run else prepare_and_report)(config)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status, see `ich.base.entry.Status`."""
    end_on_signals()
    return exit_status(lambda: run_hydra(run, "prepare", argv))


if __name__ == "__main__":
    leave(main())
