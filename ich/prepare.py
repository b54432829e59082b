"""Prepares data without training: `python -m ich.prepare data=rsna data.root=/data/rsna.zip`.

Decodes exactly the slices of the cohort into the cache that sweeps share, and writes the data
report. `dry_run=true` prints the cohort's counts, class balance and leak from the labels alone;
`verify=true` compares every decoded slice with its checksum.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig, OmegaConf

from ich.base import entry
from ich.base.config import CONF_DIR, PrepareConfig, to_dataclass
from ich.base.validation import validate
from ich.launch.prepare import dry_run, prepare_and_report


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="prepare")
def run(cfg: DictConfig) -> None:
    """One preparation; a user's mistake is one paragraph."""
    config = to_dataclass(OmegaConf.create(OmegaConf.to_container(cfg)), PrepareConfig)  # type: ignore[arg-type]
    with entry.without_traceback():
        validate(config)
        (dry_run if config.dry_run else prepare_and_report)(config)


if __name__ == "__main__":
    entry.run_hydra(run)
