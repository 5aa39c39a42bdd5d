"""What notebooks import: `from workbench.lab import start, show, explore, live_loss, finish`."""

from workbench.lab.display import claims_table, finish, live_loss, show, start
from workbench.lab.panels import explore, parameter_panel

__all__ = ["claims_table", "explore", "finish", "live_loss", "parameter_panel", "show", "start"]
