"""A run folder: config.json, metrics.jsonl, claims.json, figures/, checkpoints/, and the executed notebook."""

import json
import os
import platform
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from workbench import __version__
from workbench.config import as_dict, override
from workbench.errors import WorkbenchError
from workbench.evaluation.claims import Judgement, judge
from workbench.papers import load
from workbench.training.record import Record

SMALL_PRESETS = ("quick", "desk")  # made for two CPU cores: one torch thread a process


def outputs_root() -> Path:
    """$WORKBENCH_OUT, or outputs/ of the checkout the package runs from, or ./outputs for an installed package."""
    if out := os.environ.get("WORKBENCH_OUT"):
        return Path(out).resolve()
    checkout = Path(__file__).resolve().parents[2]
    return (checkout if (checkout / "notebooks").is_dir() else Path.cwd()) / "outputs"


def notebook_path(slug: str) -> Path:
    """The paper's notebook, in notebooks/ of the checkout or of the working folder. Raises WorkbenchError."""
    name = load(slug).NOTEBOOK
    checkout = Path(__file__).resolve().parents[2]
    for root in (checkout, Path.cwd()):
        if (root / "notebooks" / name).is_file():
            return root / "notebooks" / name
    raise WorkbenchError(f"no notebooks/{name} in {checkout} or {Path.cwd()}: run this from a checkout")


def new_run_path(slug: str, root: Path | None = None) -> Path:
    """A fresh outputs/runs/<slug>/<run-id>; ids sort by time."""
    return (root or outputs_root()) / "runs" / slug / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


@dataclass
class Run:
    """One execution of one paper: its checked config, its record, and where everything lies."""

    slug: str
    preset: str
    seed: int
    config: Any
    record: Record

    @property
    def path(self) -> Path:
        return self.record.folder

    def judge(self) -> list[Judgement]:
        """Judge every claim of the paper from the stored metrics and write claims.json."""
        records = self.record.records("result")
        judgements = [judge(claim, records) for claim in load(self.slug).CLAIMS]
        write_json(self.path / "claims.json", [j.as_dict() for j in judgements])
        return judgements

    def provenance(self, *data_sets: Any) -> None:
        """Store where the run's data came from (dataclasses with a `name`) in config.json, by name."""
        settings = read_config(self.path)
        settings["data"] = {**settings.get("data", {}), **{d.name: asdict(d) for d in data_sets}}
        write_json(self.path / "config.json", settings)


def write_json(path: Path, value: Any) -> None:
    """Write JSON by way of a temporary file, so that a reader never sees half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")
    os.replace(temporary, path)


def check(slug: str, preset: str, seed: int, overrides: Mapping[str, Any]) -> Any:
    """The config these settings give. Raises WorkbenchError: unknown paper, preset, parameter; a bad value."""
    paper = load(slug)
    if preset not in paper.PRESETS:
        raise WorkbenchError(f"unknown preset {preset!r} of {slug}: choose from {', '.join(paper.PRESETS)}")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise WorkbenchError(f"seed is a whole number from 0 up, got {seed!r}")
    return override(paper.PRESETS[preset], overrides)


def start(
    slug: str,
    preset: str = "quick",
    *,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
) -> Run:
    """Open a run (a new folder, or the one given: a resumed run) after checking every parameter.

    Raises WorkbenchError: unknown paper, preset or parameter; a folder that holds a run with another config.
    """
    config = check(slug, preset, seed, overrides or {})
    path = Path(run_dir).resolve() if run_dir else new_run_path(slug)
    identity = {"slug": slug, "preset": preset, "seed": seed, "config": as_dict(config)}
    settings = path / "config.json"
    if settings.exists():
        before = read_config(path)
        changed = [k for k in identity if before.get(k) != identity[k]]
        if changed:
            raise WorkbenchError(f"{path} holds a run with another {', '.join(changed)}; choose a new folder")
    try:
        (path / "figures").mkdir(parents=True, exist_ok=True)
        record = Record(path)
        if not settings.exists():
            versions = {"workbench": __version__, "torch": torch.__version__, "python": platform.python_version()}
            write_json(settings, {**identity, "versions": versions, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    except OSError as error:
        raise WorkbenchError(f"cannot write to {path}: {error.strerror}") from None
    return Run(slug, preset, seed, config, record)


def settings(path: Path) -> tuple[str, str, int, dict[str, Any]]:
    """Slug, preset, seed and the parameters that differ from the preset, as a run folder's config.json has them."""
    stored = read_config(path)
    try:
        slug, preset, seed, values = (stored[k] for k in ("slug", "preset", "seed", "config"))
    except KeyError as error:
        raise WorkbenchError(f"{path / 'config.json'} lacks {error.args[0]!r}; start the run anew") from None
    plain = as_dict(check(slug, preset, seed, {}))
    return slug, preset, seed, {k: v for k, v in values.items() if k not in plain or plain[k] != v}


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a run folder; raises WorkbenchError when it is missing or damaged."""
    try:
        return json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise WorkbenchError(f"{path} is not a run folder: it has no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise WorkbenchError(f"{path / 'config.json'} is damaged; start the run anew") from None
