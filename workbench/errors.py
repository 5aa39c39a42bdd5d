"""The one exception a user is meant to read: a single line that names what was wrong and what would be right."""


class WorkbenchError(Exception):
    """A mistake of the user or of the machine, told in one line; the CLI prints it and exits with 2."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: the one line (the cell fails all the same)."""
        return [f"{type(self).__name__}: {self}"]
