"""The hook by which Hydra finds our launchers: it takes launchers of this namespace only."""

from ich.launcher import CheckedLauncher as _CheckedLauncher
from ich.launcher import LocalLauncher as _LocalLauncher
from ich.launcher import PlanLauncher as _PlanLauncher


class LocalLauncher(_LocalLauncher):
    """See `ich.launcher.LocalLauncher`."""


class CheckedLauncher(_CheckedLauncher):
    """See `ich.launcher.CheckedLauncher`."""


class PlanLauncher(_PlanLauncher):
    """See `ich.launcher.PlanLauncher`."""
