"""A trained model on other labelled scans: `python -m ich.evaluate models=RUN data=folder ...`.

External validation: every metric of the comparison, with intervals over patients, and the decisions
at the thresholds that the model brings, beside the same on the validation rows it was chosen on.
Slices are decoded and windowed as the model's weights file says, whatever the config's sizes.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig, OmegaConf

from ich.base import entry
from ich.base.config import CONF_DIR, EvaluateConfig, UserError, to_dataclass
from ich.inference.scores import evaluate, validate


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="evaluate")
def run(cfg: DictConfig) -> None:
    """One evaluation; a user's mistake is one paragraph."""
    with entry.without_traceback():
        if OmegaConf.is_missing(cfg, "models"):
            raise UserError(
                "models is missing. Give the folder of a run with models=PATH, an MLflow run id, "
                "or models=models:/ich@best."
            )
        config = to_dataclass(OmegaConf.create(OmegaConf.to_container(cfg)), EvaluateConfig)  # type: ignore[arg-type]
        validate(config)
        evaluate(config)


if __name__ == "__main__":
    entry.run_hydra(run)
