"""A loss curve that grows while a training runs, cheap enough not to slow it, and whole when its cell ends."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np
from IPython.core.getipython import get_ipython
from IPython.display import display

from workbench.errors import WorkbenchError
from workbench.lab import figures
from workbench.lab.display import plotly_bundle

PAUSE = 0.5  # seconds between two drawings, at least
SHARE = 0.02  # of the time may go into drawing
POINTS = 400  # a curve, at most


class live_loss:  # noqa: N801 (a notebook calls it like a function)
    """A callback for `fit(on_step=...)`: one figure, redrawn at most twice a second, whole at the cell's end.

    keys: of what the loss function returns, scalars or vectors (M,), whose mean is drawn; y names quantity and unit.
    An executed notebook stores the last state only, whatever was drawn on the way. Raises WorkbenchError at the
    first step where the training logs none of the keys.
    """

    def __init__(
        self, keys: Sequence[str] = ("loss",), *, title: str = "while training", y: str = "loss", log_y: bool = False
    ):
        self.curves: dict[str, tuple[list[float], list[float]]] = {key: ([], []) for key in keys}
        self.title, self.y, self.log_y = title, y, log_y
        self._next = 0.0
        # JupyterLab's plotly renderer draws an updated display once only; a widget's new output is drawn each time
        self._canvas = widgets.Output(layout={"min_height": f"{figures.HEIGHT + 10}px"})
        self._view = self._canvas._repr_mimebundle_() or {}
        waiting = {**self._view, "text/plain": f"{title}: waiting for the first step"}
        self._handle = display(waiting, raw=True, display_id=True)
        self._shell = get_ipython()
        if self._shell is not None:
            # the last steps come within the pause after a drawing; the cell's end draws them
            self._shell.events.register("post_run_cell", self._end)

    def __call__(self, step: int, logged: Mapping[str, Any]) -> None:
        known = [key for key in self.curves if key in logged]
        if not known:
            raise WorkbenchError(f"live_loss: no {', '.join(self.curves)} here; the training logs {', '.join(logged)}")
        for key in known:
            xs, ys = self.curves[key]
            xs.append(step)
            ys.append(float(np.mean(logged[key])))
        started = time.monotonic()
        if self._handle is not None and started >= self._next:
            self._draw()
            now = time.monotonic()
            self._next = now + max(PAUSE, (now - started) / SHARE)

    def _draw(self) -> dict[str, Any]:
        thin = {}
        for key, (xs, ys) in self.curves.items():
            stride = -(-len(xs) // POINTS) or 1
            # counted from the end, so that the last point is always there
            thin[key] = (xs[::-1][::stride][::-1], ys[::-1][::stride][::-1])
        figure = figures.lines(thin, title=self.title, x="optimiser step", y=self.y, log_y=self.log_y, markers=False)
        data = plotly_bundle(figure)
        self._canvas.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)
        return data

    def _end(self, *_: Any) -> None:
        if self._shell is None or self._handle is None:
            return
        self._shell.events.unregister("post_run_cell", self._end)
        if any(xs for xs, _ in self.curves.values()):
            self._handle.update({**self._view, **self._draw()}, raw=True)  # what an executed notebook keeps
        else:
            self._handle.update(
                {"text/plain": f"{self.title}: no new step, the finished training was loaded"}, raw=True
            )
