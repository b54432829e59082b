"""The hook by which Hydra finds our launchers: it takes launchers of this namespace only."""

from ich.launch.clusters import RayLauncher as _RayLauncher
from ich.launch.clusters import SlurmLauncher as _SlurmLauncher
from ich.launch.launcher import CheckedLauncher as _CheckedLauncher
from ich.launch.launcher import LocalLauncher as _LocalLauncher
from ich.launch.launcher import PlanLauncher as _PlanLauncher


class LocalLauncher(_LocalLauncher):
    """See `ich.launch.launcher.LocalLauncher`."""


class RayLauncher(_RayLauncher):
    """See `ich.launch.clusters.RayLauncher`."""


class SlurmLauncher(_SlurmLauncher):
    """See `ich.launch.clusters.SlurmLauncher`."""


class CheckedLauncher(_CheckedLauncher):
    """See `ich.launch.launcher.CheckedLauncher`."""


class PlanLauncher(_PlanLauncher):
    """See `ich.launch.launcher.PlanLauncher`."""
