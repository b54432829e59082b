"""ich: Hydra-orchestrated sweeps of image classifiers for intracranial hemorrhage on head CT."""

__version__ = "0.1.0"
