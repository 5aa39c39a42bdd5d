"""Spoken form against what people say, in six languages; the public text and the sampling of languages."""

from decimal import Decimal

import numpy as np
import pytest

from workbench.data.public_text import catalogue, cldr_lines, hub_text, language_shares
from workbench.data.spoken import LANGUAGES, spell, spoken
from workbench.errors import WorkbenchError

SAID = [
    ("en", "Set it to 45%.", "set it to forty five percent"),
    ("en", "$5 at 7:30", "five dollars at seven thirty"),
    ("en", "It's €5.50, at 7:05 p.m.", "it's five euros and fifty at seven zero five p m"),
    ("en", "the 3rd of 1,234 items", "the third of one thousand two hundred thirty four items"),
    ("en", "Monday, March 15, 2024", "monday march fifteenth twenty twenty four"),
    (
        "en",
        "due 3/15/2024 or 2024-03-15",
        "due march fifteenth twenty twenty four or march fifteenth twenty twenty four",
    ),
    ("en", "0.05 of 21°C, or 1°", "zero point zero five of twenty one degrees celsius or one degree"),
    ("en", "hits of 1985 at 7:00", "hits of nineteen eighty five at seven o'clock"),
    ("en", "It’s the ‘loud’ one: don't!", "it's the loud one don't"),
    ("de", "Am 3. Mai um 19:30 Uhr", "am dritter mai um neunzehn uhr dreißig"),
    (
        "de",
        "1.234,5 kg für 5,50 €",
        "eintausendzweihundertvierunddreißig komma fünf kilogramm für fünf euro und fünfzig",
    ),
    ("de", "der 2. Versuch, 45 %", "der zweite versuch fünfundvierzig prozent"),
    ("es", "15 de marzo de 2024, 3,5 km", "quince de marzo de dos mil veinticuatro tres coma cinco kilómetros"),
    ("es", "¿Qué hora es?", "qué hora es"),
    ("it", "nell'ufficio al 45%", "nell'ufficio al quarantacinque per cento"),
    ("it", "15 km/h dall' 1 maggio", "quindici chilometri orari dall' primo maggio"),
    ("fr", "à 7:30, 21 °C", "à sept heures trente vingt et un degrés celsius"),
    ("pt", "50%", "cinquenta por cento"),
]


@pytest.mark.parametrize(("language", "written", "said"), SAID)
def test_what_is_said(language, written, said):
    assert spoken(written, language) == said
    assert spoken(said, language) == said  # spoken text is left alone


def test_lower_casing_alone_is_not_spoken_form():
    assert spoken("Wake me at 6:45", "en") != "wake me at 6:45"
    assert not any(c.isdigit() for c in spoken("7, 8th, 9.5, 10%, 11:12, 13/1/2020, $14", "en"))


def test_numbers_are_spelled_as_asked():
    assert spell(11, "en", "ordinal") == "eleventh" and spell(1999, "en", "year") == "nineteen ninety nine"
    assert spell(Decimal("3.05"), "es") == "tres coma cero cinco"
    assert spell(21, "de") == "einundzwanzig" and "\u00ad" not in spell(1234, "de")
    assert spoken("30/02/2024", "es").split()[0] == "treinta"  # no such day: three numbers


def test_an_unknown_language_is_refused():
    with pytest.raises(WorkbenchError, match="no spoken form for language 'tlh': choose from en, de"):
        spoken("5", "tlh")


@pytest.mark.parametrize("language", ["en", "de", "es", "it"])
def test_public_text_is_written_text_that_can_be_spoken(language):
    lines = [*catalogue(language), *cldr_lines(language, 40)]
    assert len(catalogue(language)) > 200
    assert sum(any(c.isdigit() for c in line) for line in lines) > 40
    for line in lines:
        assert "%(" not in line and "<" not in line
        assert not any(c in "0123456789.,;:%" for c in spoken(line, language))
    assert cldr_lines(language, 8) == cldr_lines(language, 8)


def test_language_shares_are_powers():
    shares = language_shares([900, 90, 10], 0.5)
    assert shares == pytest.approx(np.sqrt([900, 90, 10]) / np.sqrt([900, 90, 10]).sum())
    assert language_shares([900, 90, 10], 1.0) == pytest.approx([0.9, 0.09, 0.01])
    assert language_shares([900, 90, 10], 0.0) == pytest.approx([1 / 3] * 3)
    with pytest.raises(WorkbenchError, match="without text"):
        language_shares([3, 0], 0.5)


def test_public_text_of_a_folder(tmp_path):
    rows = [
        f'{{"text": "Line number {i} of this text\\nshort", "language": "{x}"}}'
        for i in range(30)
        for x in ("en", "de")
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    text = hub_text(str(tmp_path), ("en", "de"), 20)
    assert len(text.train["de"]) == 18 and len(text.held_out["en"]) == 2
    assert not set(text.train["en"]) & set(text.held_out["en"])
    with pytest.raises(WorkbenchError, match="has 0 lines in 'fr'"):
        hub_text(str(tmp_path), ("fr",), 20)
    assert LANGUAGES[0] == "en"
