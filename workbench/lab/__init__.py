"""What notebooks import: `from workbench.lab import start, show, explore, live_loss, finish`."""

from workbench.lab.display import claims_table, finish, show, start
from workbench.lab.live import live_loss
from workbench.lab.panels import ablation_explorer, explore, parameter_panel

__all__ = [
    "ablation_explorer", "claims_table", "explore", "finish", "live_loss", "parameter_panel", "show",
    "start",
]  # fmt: skip
