"""Written text as a speech recogniser would give it: lower case, no punctuation, numbers, dates and units as words.

Names of months, currencies and units are CLDR's (babel); numbers are spelled by CLDR's rules (unicode-rbnf). The paper
used a converter of its own (Section on spoken-form data) that was never published; this one covers the same ground.
"""

import datetime
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from functools import cache, lru_cache

from babel import Locale, dates, numbers, units
from unicode_rbnf import FormatPurpose, RbnfEngine

from workbench.errors import WorkbenchError

# CLDR's units that text abbreviates; a unit's short form ("km/h") is read by its long one
_UNITS = (
    "temperature-celsius", "temperature-fahrenheit", "speed-kilometer-per-hour", "length-kilometer", "length-meter",
    "length-centimeter", "length-millimeter", "mass-kilogram", "mass-gram", "volume-liter", "volume-milliliter",
    "duration-minute", "duration-second", "duration-hour", "digital-megabyte", "digital-kilobyte", "temperature-kelvin",
)  # fmt: skip
_CURRENCIES = {"$": "USD", "€": "EUR", "£": "GBP", "¥": "JPY"}
_DEGREE = {"en": ("degree", "degrees"), "de": ("Grad", "Grad"), "es": ("grado", "grados"), "it": ("grado", "gradi"),
           "fr": ("degré", "degrés"), "pt": ("grau", "graus")}  # fmt: skip
_PERCENT = {"en": "percent", "de": "Prozent", "es": "por ciento", "it": "per cento", "fr": "pour cent",
            "pt": "por cento"}  # fmt: skip
_DOLLAR = {"en": ("dollar", "dollars"), "de": ("Dollar", "Dollar"), "es": ("dólar", "dólares"),
           "it": ("dollaro", "dollari"), "fr": ("dollar", "dollars"), "pt": ("dólar", "dólares")}  # fmt: skip
_OCLOCK = {"en": "o'clock", "de": "Uhr", "es": "en punto", "it": "in punto", "fr": "heures", "pt": "em ponto"}
_AND = {"en": "and", "de": "und", "es": "y", "it": "e", "fr": "et", "pt": "e"}
LANGUAGES = tuple(_PERCENT)


def _checked(language: str) -> str:
    if language not in LANGUAGES:
        raise WorkbenchError(f"no spoken form for language {language!r}: choose from {', '.join(LANGUAGES)}")
    return language


@cache
def _engine(language: str) -> RbnfEngine:
    return RbnfEngine.for_language(_checked(language))


@lru_cache(maxsize=65536)
def spell(number: int | Decimal, language: str, purpose: str = "cardinal") -> str:
    """A number in words: purpose "cardinal", "ordinal" or "year"; decimals are read digit by digit after the point."""
    engine = _engine(language)
    if number != int(number):
        digits = f"{number:f}".split(".")[1]
        parts = [int(number), *map(int, digits)]
        whole, *after = (engine.format_number(part).text for part in parts)
        return _plain(f"{whole} {_point(language)} {' '.join(after)}")
    found = engine.format_number(int(number), FormatPurpose[purpose.upper()])
    texts = found.text_by_ruleset
    name = next((n for n in ("spellout-ordinal-masculine", "spellout-ordinal") if n in texts), "")
    return _plain(texts[name] if purpose == "ordinal" and name else found.text)


@cache
def _point(language: str) -> str:
    """How the decimal separator is said: the middle word of 3.5."""
    return _engine(language).format_number(3.5).text.split()[1]


def _plain(text: str) -> str:
    """Lower case, without soft hyphens, hyphens between number words as spaces."""
    return text.replace("\u00ad", "").replace("-", " ").lower()


def _separators(language: str) -> tuple[str, str]:
    return numbers.get_decimal_symbol(language), numbers.get_group_symbol(language)


def _value(text: str, language: str) -> Decimal:
    """A written number of this locale: "1,234.5" in English, "1.234,5" in German."""
    decimal, group = _separators(language)
    return Decimal(text.replace(group, "").replace("\u00a0", "").replace(decimal, "."))


@cache
def _number(language: str) -> str:
    decimal, group = map(re.escape, _separators(language))
    return rf"(?<![\w.,])(?:\d{{1,3}}(?:{group}\d{{3}})+|\d+)(?:{decimal}\d+)?(?![\d])"


def _in_words(value: Decimal, unit: str, language: str) -> str:
    """CLDR's long form of an amount, its number spelled: "fifteen kilometers per hour"."""
    long = units.format_unit(value, unit, "long", locale=language)
    shown = numbers.format_decimal(value, locale=language, decimal_quantization=False)
    return long.replace(shown, spell(value, language))


def _money(value: Decimal, currency: str, language: str) -> str:
    cents = round(100 * value) % 100
    whole = numbers.get_currency_name(currency, count=int(value), locale=language)
    if currency == "USD":  # nobody says which country's
        whole = _DOLLAR[language][int(value) != 1]
    said = f"{spell(int(value), language)} {whole}"
    return f"{said} {_AND[language]} {spell(cents, language)}" if cents else said


def _clock(hour: int, minute: int, period: str, language: str) -> str:
    said = spell(hour, language)
    if language == "de":
        said += " Uhr"
    elif language == "fr":
        said += " heures"
    if minute:
        zero = f"{spell(0, language)} " if minute < 10 and language == "en" else ""
        said += f" {zero}{spell(minute, language)}"
    elif language not in ("de", "fr") and not period:
        said += f" {_OCLOCK[language]}"
    return f"{said} {' '.join(period.replace('.', ' ').split())}".strip() if period else said


def _date(day: int, month: int, year: int | None, language: str) -> str:
    """CLDR's order of day, month and year ("march fifteenth", "fünfzehnter märz", "quince de marzo")."""
    name = dates.get_month_names("wide", locale=language)[month]
    when = f" {spell(year, language, 'year')}" if year else ""
    if language == "en":
        return f"{name} {spell(day, language, 'ordinal')}{when}"
    if language == "de":
        return f"{spell(day, language, 'ordinal')}r {name}{when}"
    if language in ("es", "pt"):
        return f"{spell(day, language)} de {name}{' de' * bool(year)}{when}"
    return f"{spell(day, language, 'ordinal') if day == 1 else spell(day, language)} {name}{when}"


def _numeric_date(text: str, language: str) -> tuple[int, int, int]:
    """Day, month, year of a numeric date in the locale's order (CLDR: month first in American English)."""
    parts = [int(p) for p in re.split(r"[-/.]", text)]
    if parts[0] > 31:
        year, month, day = parts
    elif Locale.parse(language).date_formats["short"].pattern.startswith("M"):
        month, day, year = parts
    else:
        day, month, year = parts
    return day, month, year + 2000 if year < 100 else year


@cache
def _rules(language: str) -> tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...]:
    """What is rewritten, the most special first. Each rule maps a match to words."""
    n, sign = _number(_checked(language)), "".join(map(re.escape, _CURRENCIES))
    months = {dates.get_month_names("wide", locale=language)[m].lower(): m for m in range(1, 13)}
    month = "|".join(map(re.escape, months))
    short = {}
    for unit in _UNITS:
        pattern = units.format_unit(7, unit, "short", locale=language)
        short[pattern.replace("7", "").strip()] = unit
    unit_names = "|".join(re.escape(u) for u in sorted(short, key=len, reverse=True) if u)
    short_lower = {name.lower(): unit for name, unit in short.items()}

    def value(m: re.Match[str]) -> Decimal:
        return _value(m["n"], language)

    def year(text: str | None) -> int | None:
        return int(text) if text else None

    def real_date(m: re.Match[str]) -> str:
        day, which, when = _numeric_date(m[0], language)
        try:
            datetime.date(when, which, day)
        except ValueError:
            return m[0]
        return _date(day, which, when, language)

    def degrees(m: re.Match[str]) -> str:
        one, many = _DEGREE[language]
        if not m["n"]:
            return many
        return f"{spell(value(m), language)} {one if value(m) == 1 else many}"

    def percent(m: re.Match[str]) -> str:
        return f"{spell(value(m), language) if m['n'] else ''} {_PERCENT[language]}"

    def plain(m: re.Match[str]) -> str:
        amount = value(m)
        is_year = m["n"].isdigit() and 1100 <= amount <= 2099
        return spell(amount, language, "year" if is_year else "cardinal") if amount < 1e12 else " ".join(m["n"])

    day_month = {
        "en": rf"(?P<month>{month})\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?:,?\s+(?P<year>\d{{4}}))?\b",
        "de": rf"\b(?P<day>\d{{1,2}})\.\s*(?P<month>{month})(?:\s+(?P<year>\d{{4}}))?\b",
        "es": rf"\b(?P<day>\d{{1,2}})\s+de\s+(?P<month>{month})(?:\s+de\s+(?P<year>\d{{4}}))?\b",
    }
    day_month["pt"] = day_month["es"]
    other = rf"\b(?P<day>\d{{1,2}})(?:er|º|°)?\s+(?P<month>{month})(?:\s+(?P<year>\d{{4}}))?\b"
    ordinal = {"en": r"(?P<n>\d+)(?:st|nd|rd|th)\b", "de": r"(?P<n>\d+)\.(?=\s+[^\W\d_])"}
    rules = [
        (r"\b(?:\d{4}-\d{1,2}-\d{1,2}|\d{1,2}[/.]\d{1,2}[/.](?:\d{4}|\d{2}))\b", real_date),
        (day_month.get(language, other),
         lambda m: _date(int(m["day"]), months[m["month"].lower()], year(m["year"]), language)),
        (r"\b(?P<h>[01]?\d|2[0-4])[:.](?P<m>[0-5]\d)(?::[0-5]\d)?(?:\s*(?P<p>[ap]\.?\s?m\b\.?|uhr|h)\b)?(?![\d%]|[.,]\d)"
         if language != "en" else
         r"\b(?P<h>[01]?\d|2[0-4]):(?P<m>[0-5]\d)(?::[0-5]\d)?(?:\s*(?P<p>[ap]\.?\s?m\b\.?))?(?![\d])",
         lambda m: _clock(int(m["h"]), int(m["m"]), re.sub(r"^(uhr|h)$", "", (m["p"] or "").lower()), language)),
        (rf"(?P<c>[{sign}])\s*(?P<n>{n})|(?P<n2>{n})\s*(?P<c2>[{sign}])",
         lambda m: _money(_value(m["n"] or m["n2"], language), _CURRENCIES[m["c"] or m["c2"]], language)),
        (rf"(?P<n>{n})?\s*%", percent),
        (rf"(?P<n>{n})\s*(?P<u>{unit_names})(?!\w)",
         lambda m: _in_words(value(m), short_lower[m["u"].lower()], language)),
        (rf"(?P<n>{n})?\s*°", degrees),
        (ordinal.get(language, r"(?P<n>\d+)[ºª]"), lambda m: spell(int(m["n"]), language, "ordinal")),
        (rf"(?P<n>{n})", plain),
    ]  # fmt: skip
    return tuple((re.compile(pattern, re.I), rule) for pattern, rule in rules)


def spoken(text: str, language: str) -> str:
    """`text` in spoken form: "Set it to 45%." becomes "set it to forty five percent".

    language: one of LANGUAGES. Idempotent. Apostrophes within a word stay; every other sign goes. Raises
    WorkbenchError for another language.
    """
    text = unicodedata.normalize("NFC", text).replace("’", "'").replace("\u202f", " ").replace("\u00a0", " ")
    for pattern, rule in _rules(language):
        text = pattern.sub(lambda m, rule=rule: f" {rule(m)} ", text)  # type: ignore[misc]
    # what no rule read stands within a word or a version number: "IPv4", "2.0.1"
    text = re.sub(r"\d{1,12}", lambda m: f" {spell(int(m[0]), language)} ", text)
    text = re.sub(r"[^\w\s']|_", " ", text.replace("\u00ad", "")).lower()
    text = re.sub(r"(?<!\w)'([^']*)'(?!\w)", r" \1 ", text)  # quotation marks
    if language in ("fr", "it"):  # an article that lost its vowel keeps its apostrophe, whatever follows
        text = re.sub(r"(\w)'(?=\s|$)", r"\1’", text)
    return " ".join(re.sub(r"(?<!\w)'|'(?!\w)", " ", text).replace("’", "'").split())
