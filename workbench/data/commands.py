"""Spoken commands in several languages with intents and slots, sampled from a real grammar and split by template.

The grammar is Home Assistant's (package home-assistant-intents): sentence templates written by hand for every language,
with the same intents and slots in all of them. Templates are parsed by hassil and walked by a sampler of ours, which
also says which words are a slot's value. Values: the grammar's own lists and number ranges; rooms and devices from the
lists below; cities, countries, languages, weekdays, dates and times from CLDR (babel). Everything is then put into
spoken form by `spoken`.
"""

import datetime
import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from babel import Locale, dates
from hassil.expression import (
    Alternative,
    Expression,
    Group,
    ListReference,
    Permutation,
    RuleReference,
    TextChunk,
)
from hassil.parse_expression import parse_sentence

from workbench.data.provenance import Provenance
from workbench.data.spoken import spoken
from workbench.errors import WorkbenchError

PACKAGE = "home-assistant-intents"
# the grammar leaves these to the household: rooms, floors and devices of an ordinary home
ROOMS = {
    "en": "kitchen, living room, bedroom, bathroom, garage, hallway, office, dining room, attic, basement, garden, "
          "guest room, laundry room, nursery, terrace, library, pantry, entrance, studio, balcony",
    "de": "küche, wohnzimmer, schlafzimmer, badezimmer, garage, flur, büro, esszimmer, dachboden, keller, garten, "
          "gästezimmer, waschküche, kinderzimmer, terrasse, bibliothek, speisekammer, eingang, atelier, balkon",
    "es": "cocina, salón, dormitorio, baño, garaje, pasillo, oficina, comedor, ático, sótano, jardín, "
          "cuarto de invitados, lavadero, cuarto infantil, terraza, biblioteca, despensa, entrada, estudio, balcón",
    "it": "cucina, soggiorno, camera da letto, bagno, garage, corridoio, ufficio, sala da pranzo, soffitta, cantina, "
          "giardino, camera degli ospiti, lavanderia, cameretta, terrazza, biblioteca, dispensa, ingresso, studio, "
          "balcone",
    "fr": "cuisine, salon, chambre, salle de bain, garage, couloir, bureau, salle à manger, grenier, cave, jardin, "
          "chambre d'amis, buanderie, chambre d'enfant, terrasse, bibliothèque, cellier, entrée, atelier, balcon",
}  # fmt: skip
FLOORS = {
    "en": "ground, first, second, upper", "de": "erdgeschoss, erster stock, zweiter stock, obergeschoss",
    "es": "planta baja, primera planta, segunda planta, planta alta",
    "it": "piano terra, primo piano, secondo piano, piano superiore",
    "fr": "rez de chaussée, premier étage, deuxième étage, étage supérieur",
}  # fmt: skip
DEVICES = {
    "en": "desk lamp, ceiling fan, coffee machine, heater, television, radio, humidifier, speaker, garage door, "
          "night light, air conditioner, blinds, front door, printer, dishwasher, christmas tree, oven, projector",
    "de": "schreibtischlampe, deckenventilator, kaffeemaschine, heizung, fernseher, radio, luftbefeuchter, "
          "lautsprecher, garagentor, nachtlicht, klimaanlage, jalousien, haustür, drucker, spülmaschine, "
          "weihnachtsbaum, backofen, projektor",
    "es": "lámpara de escritorio, ventilador de techo, cafetera, calefactor, televisor, radio, humidificador, altavoz, "
          "puerta del garaje, luz nocturna, aire acondicionado, persianas, puerta principal, impresora, lavavajillas, "
          "árbol de navidad, horno, proyector",
    "it": "lampada da scrivania, ventilatore a soffitto, macchina del caffè, stufa, televisore, radio, umidificatore, "
          "altoparlante, portone del garage, luce notturna, condizionatore, tapparelle, porta d'ingresso, stampante, "
          "lavastoviglie, albero di natale, forno, proiettore",
    "fr": "lampe de bureau, ventilateur de plafond, cafetière, chauffage, télévision, radio, humidificateur, "
          "enceinte, porte du garage, veilleuse, climatiseur, stores, porte d'entrée, imprimante, lave vaisselle, "
          "sapin de noël, four, projecteur",
}  # fmt: skip
LANGUAGES = tuple(ROOMS)
Part = Literal["labelled", "covered", "novel"]
PARTS: tuple[Part, ...] = ("labelled", "covered", "novel")


@dataclass(frozen=True)
class Utterance:
    """Words in spoken form, one BIO tag a word, the intent; the written form it came from; the template's name."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    intent: str
    language: str
    written: str = ""
    template: str = ""

    @property
    def text(self) -> str:
        return " ".join(self.words)


@dataclass(frozen=True)
class Template:
    """One sentence template: its intent, its parsed expression, and the domain its device must belong to."""

    name: str
    intent: str
    language: str
    expression: Expression
    domain: str


@dataclass(frozen=True)
class Grammar:
    """A language's templates, its expansion rules and slot lists (expressions, or a range), and the fillers."""

    language: str
    templates: tuple[Template, ...]
    rules: Mapping[str, Expression]
    lists: Mapping[str, Any]
    fillers: Mapping[str, tuple[str, ...]]


def _parse(text: str) -> Expression:
    return parse_sentence(text).expression


def _fillers(language: str) -> dict[str, tuple[str, ...]]:
    """Values of the open slots, each list sorted and free of doubles."""
    locale = Locale.parse(language)
    cities = {z["city"] for z in locale.time_zones.values() if "city" in z}
    territories = {name for code, name in locale.territories.items() if code.isalpha() and len(code) == 2}
    languages = {name for code, name in locale.languages.items() if code.isalpha() and len(code) == 2}
    days = set(dates.get_day_names("wide", locale=language).values())
    months = set(dates.get_month_names("wide", locale=language).values())
    clocks = {dates.format_time(datetime.time(h, m), "short", locale=language) for h in range(5, 23)
              for m in (0, 15, 30, 45)}  # fmt: skip
    # day and month as this locale writes them: CLDR's skeleton MMMMd
    on = {dates.format_skeleton("MMMMd", datetime.date(2024, m, d), locale=language) for m in range(1, 13)
          for d in (3, 14, 25)}  # fmt: skip

    def short(names: set[str]) -> tuple[str, ...]:
        return tuple(sorted(n for n in names if len(n.split()) <= 3 and "(" not in n and n.isprintable()))

    def typed(text: str) -> tuple[str, ...]:
        return tuple(text.split(", "))

    return {
        "area": typed(ROOMS[language]), "floor": typed(FLOORS[language]), "name": typed(DEVICES[language]),
        "city": short(cities | territories), "timer_name": short(days | months | clocks | on),
        "search_query": short(territories | languages),
    }  # fmt: skip


@cache
def grammar(language: str) -> Grammar:
    """Everything the package has for a language that can be filled. Raises WorkbenchError for another language."""
    if language not in LANGUAGES:
        raise WorkbenchError(f"no commands in language {language!r}: choose from {', '.join(LANGUAGES)}")
    spec = importlib.util.find_spec("home_assistant_intents")
    if spec is None or spec.origin is None:
        raise WorkbenchError(f"the commands come with the package {PACKAGE}, which is not installed")
    data = json.loads((Path(spec.origin).parent / "data" / f"{language}.json").read_text(encoding="utf8"))
    rules = {name: _parse(text) for name, text in data["expansion_rules"].items()}
    lists: dict[str, Any] = {}
    for name, content in data["lists"].items():
        if "values" in content:
            values = [v if isinstance(v, str) else v["in"] for v in content["values"]]
            lists[name] = [_parse(v) for v in values]
        elif "range" in content:
            lists[name] = content["range"]
    fillers = _fillers(language)
    templates = []
    for intent, entry in data["intents"].items():
        seen: set[str] = set()  # a sentence may stand in several blocks: it must not fall into two parts of a split
        for block in entry["data"]:
            domain = (block.get("requires_context") or {}).get("domain") or [""]
            domain = domain if isinstance(domain, str) else domain[0]
            for sentence in block["sentences"]:
                expression = _parse(sentence)
                if sentence not in seen and _fillable(expression, rules, lists, fillers):
                    seen.add(sentence)
                    digest = hashlib.sha256(sentence.encode()).hexdigest()[:12]
                    templates.append(Template(f"{intent}/{digest}", intent, language, expression, domain))
    return Grammar(language, tuple(templates), rules, lists, fillers)


def _fillable(e: Expression, rules: Mapping[str, Expression], lists: Mapping[str, Any], fillers: Any) -> bool:
    if isinstance(e, Group):
        return all(_fillable(item, rules, lists, fillers) for item in e.items)
    if isinstance(e, RuleReference):
        return e.rule_name in rules and _fillable(rules[e.rule_name], rules, lists, fillers)
    return not isinstance(e, ListReference) or e.list_name in lists or e.list_name in fillers


def _number(spec: Mapping[str, Any], rng: np.random.Generator) -> str:
    step = spec.get("step", 1)
    value = int(spec["from"]) + step * int(rng.integers(0, (int(spec["to"]) - int(spec["from"])) // step + 1))
    return str(value)


def _walk(
    e: Expression, g: Grammar, fillers: Mapping[str, Sequence[str]], domain: str, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """A random reading of an expression as (text, slot) pieces; slot "" is plain text."""
    if isinstance(e, TextChunk):
        return [(e.original_text, "")]
    if isinstance(e, Alternative):
        return _walk(e.items[int(rng.integers(len(e.items)))], g, fillers, domain, rng)
    if isinstance(e, Permutation):
        order = rng.permutation(len(e.items))
        return [piece for i in order for piece in [*_walk(e.items[i], g, fillers, domain, rng), (" ", "")]]
    if isinstance(e, Group):
        return [piece for item in e.items for piece in _walk(item, g, fillers, domain, rng)]
    if isinstance(e, RuleReference):
        return _walk(g.rules[e.rule_name], g, fillers, domain, rng)
    assert isinstance(e, ListReference)
    content = g.lists.get(e.list_name)
    if content is None:
        name = "city" if e.list_name == "name" and domain == "weather" else e.list_name
        value = fillers[name][int(rng.integers(len(fillers[name])))]
    elif isinstance(content, list):
        value = "".join(t for t, _ in _walk(content[int(rng.integers(len(content)))], g, fillers, domain, rng))
    else:
        value = _number(content, rng)
    return [(e.prefix or "", ""), (value, e.slot_name), (e.suffix or "", "")]


def _joined(pieces: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbouring plain pieces as one, so that "hour" + "s" is a word."""
    out: list[tuple[str, str]] = []
    for text, slot in pieces:
        if out and not slot and not out[-1][1]:
            out[-1] = (out[-1][0] + text, "")
        else:
            out.append((text, slot))
    return out


def utter(
    template: Template, rng: np.random.Generator, fillers: Mapping[str, Sequence[str]] | None = None
) -> Utterance:
    """One utterance of a template. The edge of a slot is the edge of a word ("nell'ufficio": "nell'", "ufficio")."""
    g = grammar(template.language)
    pieces = _joined(_walk(template.expression, g, fillers or g.fillers, template.domain, rng))
    words: list[str] = []
    tags: list[str] = []
    for text, slot in pieces:
        said = spoken(text, template.language).split()
        words += said
        tags += [f"{'B' if i == 0 else 'I'}-{slot}" if slot else "O" for i in range(len(said))]
    written = " ".join("".join(text for text, _ in pieces).split())
    return Utterance(tuple(words), tuple(tags), template.intent, template.language, written, template.name)


def shared_intents(languages: Sequence[str], least: int = 4) -> tuple[str, ...]:
    """The intents that have `least` templates or more in every language, sorted."""
    counts: list[dict[str, int]] = []
    for language in languages:
        found: dict[str, int] = {}
        for t in grammar(language).templates:
            found[t.intent] = found.get(t.intent, 0) + 1
        counts.append(found)
    return tuple(sorted(i for i in counts[0] if all(c.get(i, 0) >= least for c in counts)))


@dataclass(frozen=True)
class Split:
    """Templates and slot values cut once, before anything is sampled.

    templates: (language, part) -> templates. "labelled" may be fine-tuned on; "covered" only occurs without labels, in
    the in-domain pool; "novel" nowhere in training. values: language -> role -> fillers, where "labelled" values are a
    part of the "pool" values, and "all" has values that occur in novel test utterances alone.
    """

    languages: tuple[str, ...]
    intents: tuple[str, ...]
    templates: Mapping[tuple[str, Part], tuple[Template, ...]]
    values: Mapping[str, Mapping[str, Mapping[str, tuple[str, ...]]]]


def split_templates(
    languages: Sequence[str], seed: int, *, novel: float = 0.2, labelled: float = 0.4, intents: int = 0, values: int = 0
) -> Split:
    """Cut each intent's templates in each language: `novel` of them, then `labelled` of the rest, at least one a part.

    intents: keep the so many with most templates in their poorest language (0: all); values: keep so many of each
    filler list (0: all). Both make the world smaller for encoders that see few sentences.
    Raises WorkbenchError when no intent has enough templates in every language.
    """
    kept, most = shared_intents(languages), values or None
    if not kept:
        raise WorkbenchError(f"no intent has four templates in each of {', '.join(languages)}")
    if intents:
        poorest = {i: min(sum(t.intent == i for t in grammar(x).templates) for x in languages) for i in kept}
        kept = tuple(sorted(sorted(kept, key=lambda i: -poorest[i])[:intents]))
    rng = np.random.default_rng(seed)
    parts: dict[tuple[str, Part], list[Template]] = {(lang, part): [] for lang in languages for part in PARTS}
    cut: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {}
    for language in languages:
        g = grammar(language)
        for intent in kept:
            own = [t for t in g.templates if t.intent == intent]
            order = rng.permutation(len(own))
            new = max(1, round(novel * len(own)))
            marked = max(1, round(labelled * (len(own) - new)))
            for place, i in enumerate(order):
                part: Part = "novel" if place < new else "labelled" if place < new + marked else "covered"
                parts[language, part].append(own[i])
        roles: dict[str, dict[str, tuple[str, ...]]] = {"labelled": {}, "pool": {}, "all": {}}
        for name, filler in g.fillers.items():
            mixed = [filler[i] for i in rng.permutation(len(filler))][:most]
            roles["labelled"][name] = tuple(mixed[: max(1, round(0.6 * len(mixed)))])
            roles["pool"][name] = tuple(mixed[: max(2, round(0.8 * len(mixed)))])
            roles["all"][name] = tuple(mixed)
        cut[language] = roles
    return Split(tuple(languages), kept, {k: tuple(v) for k, v in parts.items()}, cut)


def sample(
    split: Split,
    language: str,
    parts: Sequence[Part],
    role: str,
    count: int,
    seed: int,
    *,
    known: set[str] | None = None,
) -> list[Utterance]:
    """`count` utterances: an intent uniformly, one of its templates in `parts` uniformly, values of `role`.

    known: texts that are drawn again (test utterances must not stand in the pool, nor twice in a test set); what is
    returned is added to it. A grammar that runs dry returns fewer.
    """
    rng = np.random.default_rng(seed)
    own: dict[str, list[Template]] = {intent: [] for intent in split.intents}
    for part in parts:
        for t in split.templates[language, part]:
            own[t.intent].append(t)
    out: list[Utterance] = []
    for _ in range(20 * count):
        if len(out) == count:
            break
        pool = own[split.intents[int(rng.integers(len(split.intents)))]]
        said = utter(pool[int(rng.integers(len(pool)))], rng, split.values[language][role])
        if not said.words or (known is not None and said.text in known):
            continue
        if known is not None:
            known.add(said.text)
        out.append(said)
    return out


def provenance(languages: Sequence[str]) -> tuple[Provenance, ...]:
    """The grammar's package and CLDR's, with a hash of the templates used."""
    names = "\n".join(t.name for language in languages for t in grammar(language).templates)
    count = sum(len(grammar(language).templates) for language in languages)
    digest = hashlib.sha256(names.encode()).hexdigest()
    return (
        Provenance("spoken commands", PACKAGE, metadata.version(PACKAGE), "Apache-2.0 (templates also CC BY 4.0)",
                   digest, f"{count} sentence templates in {', '.join(languages)}"),
        Provenance("CLDR names, dates, numbers and units", "babel", metadata.version("babel"),
                   "BSD-3-Clause, Unicode-3.0", "", "with unicode-rbnf " + metadata.version("unicode-rbnf")),
    )  # fmt: skip
