"""Written text in several languages that comes with pip packages: the stand-in for a public pre-training corpus.

Sentences of Django's translation catalogues (real interface prose, BSD-3-Clause), English prose from docstrings
(`workbench.data.text`), and lines of CLDR names, dates, amounts and prices as each locale writes them (babel).
"""

import datetime
import hashlib
import importlib.util
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
from babel import Locale, dates, lists, numbers, units
from babel.messages.mofile import read_mo

from workbench.data.hub import hub_dataset
from workbench.data.provenance import Provenance
from workbench.data.text import prose
from workbench.errors import WorkbenchError

_UNITS = ("mass-kilogram", "length-kilometer", "speed-kilometer-per-hour", "temperature-celsius", "volume-liter",
          "duration-hour", "duration-minute")  # fmt: skip
_PLACEHOLDER = re.compile(r"%(?:\((\w+)\))?([sdr])|\{(\w*)\}")
_COUNTS = re.compile(r"count|limit|value|num|max|min|total|length|number|digits|size")


@dataclass(frozen=True)
class PublicText:
    """Written lines by language: those to train on, and those held out (a tenth, never trained on)."""

    train: Mapping[str, tuple[str, ...]]
    held_out: Mapping[str, tuple[str, ...]]
    provenance: tuple[Provenance, ...]


def _filled(message: str, language: str, rng: np.random.Generator) -> str:
    """A catalogue's message with numbers and CLDR's country names where it has placeholders."""
    names = [n for code, n in sorted(Locale.parse(language).territories.items()) if code.isalpha() and len(code) == 2]

    def value(m: re.Match[str]) -> str:
        counted = m[2] == "d" or _COUNTS.search(m[1] or m[3] or "")
        return str(int(rng.integers(2, 500))) if counted else names[int(rng.integers(len(names)))]

    return _PLACEHOLDER.sub(value, message.replace("%%", "%"))


def catalogue(language: str) -> list[str]:
    """Messages of Django's catalogues in a language (English: the originals), without markup, 3 to 40 words."""
    spec = importlib.util.find_spec("django")
    if spec is None or spec.origin is None:
        raise WorkbenchError("the public text comes with the package django, which is not installed")
    source = "de" if language == "en" else language
    files = sorted(Path(spec.origin).parent.rglob(f"locale/{source}/LC_MESSAGES/*.mo"))
    if not files:
        raise WorkbenchError(f"django has no catalogue for language {language!r}")
    rng = np.random.default_rng(int.from_bytes(language.encode()[:4], "big"))
    found: dict[str, None] = {}
    for path in files:
        with open(path, "rb") as f:
            for message in read_mo(f):
                texts = message.id if language == "en" else message.string
                for text in [texts] if isinstance(texts, str) else texts or []:
                    text = " ".join(_filled(text, language, rng).split())
                    if 3 <= len(text.split()) <= 40 and not re.search(r"[<>{}%]|&\w+;", text):
                        found[text] = None
    return list(found)


def cldr_lines(language: str, count: int) -> list[str]:
    """`count` lines of names, dates, times, amounts and prices as this locale writes them."""
    rng = np.random.default_rng(int.from_bytes(f"cldr{language}".encode()[:8], "big"))
    locale = Locale.parse(language)
    names = [sorted(n for code, n in table.items() if code.isalpha() and len(code) in (2, 3))
             for table in (locale.territories, locale.languages, locale.currencies)]  # fmt: skip
    out = []
    for i in range(count):
        day = datetime.date(1950, 1, 1) + datetime.timedelta(int(rng.integers(30_000)))
        clock = datetime.time(int(rng.integers(24)), int(rng.integers(60)))
        amount = int(rng.integers(2, 200))
        kinds = names[int(rng.integers(len(names)))]
        several = [kinds[j] for j in rng.choice(len(kinds), int(rng.integers(2, 5)), replace=False)]
        unit = units.format_unit(amount, _UNITS[int(rng.integers(len(_UNITS)))], "short", locale=language)
        price = numbers.format_currency(amount + 0.5 * int(rng.integers(2)), "EUR", locale=language)
        when = dates.format_date(day, ("long", "full")[i % 2], locale=language)
        parts = [
            lists.format_list(several, locale=language),
            f"{when}, {dates.format_time(clock, 'short', locale=language)}",
            f"{several[0]}: {unit}, {price}",
            f"{several[0]}: {numbers.format_percent(amount / 200, locale=language)}, {when}",
        ]
        out.append(parts[i % 4])
    return out


@lru_cache(maxsize=2)
def public_text(languages: tuple[str, ...], *, english: int = 4000, lines: int = 400, split: int = 0) -> PublicText:
    """The public stand-in: catalogues and CLDR lines in every language, and `english` sentences of docstrings.

    English has most of it, as on the web; that is what the sampling of languages evens out.
    """
    sources: list[Provenance] = []
    train: dict[str, tuple[str, ...]] = {}
    held_out: dict[str, tuple[str, ...]] = {}
    for language in languages:
        texts = [*catalogue(language), *cldr_lines(language, lines)]
        if language == "en" and english:
            paragraphs, source = prose()
            sources.append(source)
            sentences = [s for p in paragraphs for s in re.split(r"(?<=[.])\s+(?=[A-Z])", p)]
            fine = [s for s in sentences if 4 <= len(s.split()) <= 30]
            texts += fine[:: max(1, len(fine) // english)][:english]
        order = np.random.default_rng(split).permutation(len(texts))
        cut = len(texts) // 10
        held_out[language] = tuple(texts[i] for i in order[:cut])
        train[language] = tuple(texts[i] for i in order[cut:])
    digest = hashlib.sha256("\n".join(line for part in train.values() for line in part).encode()).hexdigest()
    note = ", ".join(f"{language} {len(part)} lines" for language, part in train.items())
    sources.append(Provenance("public text", "django", metadata.version("django"), "BSD-3-Clause", digest, note))
    return PublicText(train, held_out, tuple(sources))


def language_shares(counts: Sequence[float], alpha: float) -> np.ndarray:
    """Exponential sampling of languages: p_i = n_i^alpha / sum_j n_j^alpha, (L,).

    alpha 1 keeps the corpus' own shares, 0 makes all languages equal. Raises WorkbenchError for an empty language.
    """
    n = np.asarray(counts, dtype=float)
    if (n <= 0).any():
        raise WorkbenchError("a language without text cannot be sampled")
    weights = (n / n.max()) ** alpha
    return weights / weights.sum()


def hub_text(data: str, languages: Sequence[str], lines: int) -> PublicText:
    """`lines` lines a language from a folder with columns text and language, or from a Hub set with one configuration
    a language (mC4); documents are cut at line ends. Raises WorkbenchError in one line where a language has none."""
    found: dict[str, list[str]] = {}
    local = Path(data).is_dir()
    for language in languages:
        rows = hub_dataset(
            data, name=None if local else language, streaming=True, columns=("text", "language")[: 1 + local]
        )
        texts = (row["text"] for row in rows if not local or str(row["language"]).split("-")[0] == language)
        pieces = (" ".join(line.split()) for text in texts for line in str(text).splitlines())
        found[language] = list(itertools.islice((p for p in pieces if len(p.split()) >= 3), lines))
        if len(found[language]) < 10:
            raise WorkbenchError(
                f"public text {data!r} has {len(found[language])} lines in {language!r}; 10 are needed"
            )
    cut = {language: max(1, len(own) // 10) for language, own in found.items()}
    digest = hashlib.sha256("\n".join(line for own in found.values() for line in own).encode()).hexdigest()
    note = ", ".join(f"{language} {len(own)} lines" for language, own in found.items())
    return PublicText(
        {language: tuple(own[cut[language] :]) for language, own in found.items()},
        {language: tuple(own[: cut[language]]) for language, own in found.items()},
        (Provenance("public text", data, "", "see its card", digest, note),),
    )
