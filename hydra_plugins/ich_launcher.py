"""The hook by which Hydra finds our launcher: it takes launchers of this namespace only."""

from ich.launcher import LocalLauncher as _LocalLauncher


class LocalLauncher(_LocalLauncher):
    """See `ich.launcher.LocalLauncher`."""
