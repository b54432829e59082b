"""The hook by which Hydra finds our launcher: it accepts launchers of this namespace package only."""

from ich.launcher import LocalLauncher as _LocalLauncher


class LocalLauncher(_LocalLauncher):
    """See `ich.launcher.LocalLauncher`."""
