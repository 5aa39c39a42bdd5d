"""Where a data set comes from: what a run's config.json says about every picture and text it used."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Provenance:
    """One source: the package it ships in and that package's version, its licence, and a hash of its content."""

    name: str
    package: str
    version: str
    licence: str
    sha256: str
    note: str = ""
