"""The hook by which Hydra finds our launchers: it takes launchers of this namespace only."""

from ich.launch import clusters, launcher


class LocalLauncher(launcher.LocalLauncher):
    """See `ich.launch.launcher.LocalLauncher`."""


class RayLauncher(clusters.RayLauncher):
    """See `ich.launch.clusters.RayLauncher`."""


class SlurmLauncher(clusters.SlurmLauncher):
    """See `ich.launch.clusters.SlurmLauncher`."""


class CheckedLauncher(launcher.CheckedLauncher):
    """See `ich.launch.launcher.CheckedLauncher`."""


class PlanLauncher(launcher.PlanLauncher):
    """See `ich.launch.launcher.PlanLauncher`."""
