"""A trained model on other labelled scans: `ich evaluate models=RUN data=folder ...`.

External validation: every metric of the comparison, with intervals over patients, and the decisions
at the thresholds that the model brings, beside the same on the validation rows it was chosen on.
Slices are decoded and windowed as the model's weights file says, whatever the config's sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import hydra
from omegaconf import DictConfig, OmegaConf

from ich.base.config import CONF_DIR, EvaluateConfig, UserError
from ich.base.entry import end_on_signals, exit_status
from ich.base.memory import importing, leave
from ich.launch.command import carrying, run_hydra, typed


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="evaluate")
@carrying
def run(cfg: DictConfig) -> None:
    """One evaluation."""
    if OmegaConf.is_missing(cfg, "models"):
        raise UserError(
            "models is missing. Give the folder of a run with models=PATH, an MLflow run id, "
            "or models=models:/ich@best."
        )
    config = typed(cfg, EvaluateConfig)
    with importing():  # torch: a mistake in an override does not wait for it
        from ich.inference import scores

    scores.validate(config)
    scores.evaluate(config)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status, see `ich.base.entry.Status`."""
    end_on_signals()
    return exit_status(lambda: run_hydra(run, "evaluate", argv))


if __name__ == "__main__":
    leave(main())
