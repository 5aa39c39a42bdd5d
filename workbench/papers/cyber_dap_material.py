"""What one seed of cyber DAP trains on and is asked about: packed token streams, held-out windows, questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.data.cwe import weaknesses
from workbench.data.decontaminate import decontaminate
from workbench.data.packing import end_of_text, pack, tokenise
from workbench.data.pages import Page, documentation, user_pages
from workbench.data.provenance import Provenance
from workbench.data.text import Windows
from workbench.errors import WorkbenchError
from workbench.evaluation.multiple_choice import LETTERS, Item, letter_prompt
from workbench.papers.cyber_dap_settings import Config

# of the domain's pages: trained on whole; trained on without the description that is asked about; kept out whole
PARTS = {"trained page": 0.5, "held-out field": 0.25, "held-out page": 0.25}


@dataclass(frozen=True)
class Material:
    """streams: packed training tokens by name (uint32); held: windows of held-out text; items: question sets.

    streams: "curated", "shuffled", "general", "raw". held: "domain", "general". items: the PARTS and "general".
    dropped: sentences that decontamination took out; ratio: tokens a word of the curated corpus.
    """

    streams: dict[str, np.ndarray]
    held: dict[str, Windows]
    items: dict[str, list[Item]]
    dropped: int
    ratio: float
    provenance: tuple[Provenance, ...]


def questions(
    pages: Sequence[Page], pool: Sequence[Page], rng: np.random.Generator, tag: str, siblings: int = 3
) -> list[Item]:
    """ "Which page has this description?": the page's name and three others of `pool`, shuffled.

    siblings: how many of the three share the page's group, where it has as many; more are harder.

    Pages without a name or description are passed over, and so are pages whose name holds the whole answer already:
    a description that quotes the name.
    """
    known = [p for p in pool if p.name and p.description]
    by_group: dict[str, list[Page]] = {}
    for page in known:
        by_group.setdefault(page.group, []).append(page)
    items = []
    for page in pages:
        if not page.name or not page.description or page.name.lower() in page.description.lower():
            continue
        others = {p.name for p in by_group.get(page.group, []) if page.group and p.name != page.name}
        near = [str(n) for n in rng.permutation(sorted(others))][:siblings]
        while len(near) < 3:
            stranger = known[rng.integers(len(known))].name
            if len({p.name for p in known}) < 4:
                return []
            if stranger != page.name and stranger not in near:
                near.append(stranger)
        place = int(rng.integers(4))
        options = (*near[:place], page.name, *near[place:])
        items.append(Item(page.description, options, frozenset({place}), tag))
    return items


def shuffled_words(texts: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The same words, document by document, in a random order: the control that has nothing left to learn but words."""
    return [" ".join(rng.permutation(text.split())) for text in texts]


def general_split(pages: Sequence[Page]) -> tuple[list[Page], list[Page]]:
    """Training and held-out pages of the general text (9 to 1), the same for every seed and for the base models."""
    order = np.random.default_rng(0).permutation(len(pages))
    held = max(1, len(pages) // 10)
    return [pages[i] for i in order[held:]], [pages[i] for i in order[:held]]


def exercises(pages: Sequence[Page], seed: int) -> list[str]:
    """Questions with their letter, as text: what teaches a small base model the format, and DAP can make it forget."""
    rng = np.random.default_rng((seed, 1))
    return [f"{letter_prompt(i)} {LETTERS[next(iter(i.answers))]}" for i in questions(pages, pages, rng, "exercise")]


def _general(config: Config) -> tuple[tuple[Page, ...], Provenance]:
    if config.general == "documentation":
        return documentation()
    return user_pages(config.general, limit=max(2000, config.general_tokens // 50))


def _domain(config: Config) -> tuple[tuple[Page, ...], Provenance]:
    if config.data == "cwe":
        return weaknesses()
    return user_pages(config.data)


def _windows(texts: Sequence[str], tokenizer: Any, config: Config, what: str) -> Windows:
    eos = end_of_text(tokenizer)
    stream = pack(tokenise(texts[: max(8, config.held_out // 40)], tokenizer), eos, config.held_out + 1)
    if len(stream) <= config.context:
        raise WorkbenchError(
            f"{what}: {len(stream)} held-out tokens are less than one window of {config.context}; give more text or "
            "lower the context"
        )
    return Windows(stream, config.context, 1, 0)


def split_pages(pages: Sequence[Page], seed: int) -> dict[str, list[Page]]:
    """The pages dealt into PARTS by a shuffle of `seed`."""
    order = np.random.default_rng((seed, 2)).permutation(len(pages))
    ends = np.round(np.cumsum(list(PARTS.values())) * len(pages)).astype(int)
    return {part: [pages[i] for i in chosen] for part, chosen in zip(PARTS, np.split(order, ends[:-1]), strict=True)}


def secrets(parts: dict[str, list[Page]]) -> list[str]:
    """The descriptions that no training text may quote: those asked about without having been shown."""
    return [p.description for part in ("held-out field", "held-out page") for p in parts[part] if p.description]


def curated_text(parts: dict[str, list[Page]]) -> tuple[list[tuple[str, Page]], int]:
    """What is left of each page to train on after decontamination, with its page; and the sentences dropped."""
    whole, field = parts["trained page"], parts["held-out field"]
    texts = [*(p.text() for p in whole), *(p.text(described=False) for p in field)]
    clean, dropped = decontaminate(texts, secrets(parts))
    return [(text, page) for text, page in zip(clean, [*whole, *field], strict=True) if text.strip()], dropped


def raw_text(parts: dict[str, list[Page]], characters: int, rng: np.random.Generator) -> list[str]:
    """About `characters` of what a curator cut away from the trained pages, in a random order, decontaminated too."""
    pages = [p for part in ("trained page", "held-out field") for p in parts[part] if p.raw]
    chosen: list[str] = []
    for i in rng.permutation(len(pages)):
        if sum(map(len, chosen)) >= characters:
            break
        chosen.append(pages[i].raw)
    return [text for text in decontaminate(chosen, secrets(parts))[0] if text]


def load(config: Config, tokenizer: Any, seed: int) -> Material:
    """Everything one seed needs, by the base model's own tokenizer. Raises WorkbenchError: no or too little text."""
    domain, from_domain = _domain(config)
    general, from_general = _general(config)
    eos, rng = end_of_text(tokenizer), np.random.default_rng((seed, 3))
    parts = split_pages(domain, seed)
    curated, dropped = curated_text(parts)
    # shuffled, so that a share of the stream is a random share of the pages; whole pages, as far as the budget goes
    curated = [curated[i] for i in rng.permutation(len(curated))]
    ids = tokenise([text for text, _ in curated], tokenizer)
    fits = max(1, int(np.searchsorted(np.cumsum([len(d) + 1 for d in ids]), config.tokens, side="right")))
    curated, ids = curated[:fits], ids[:fits]
    texts, inside = [text for text, _ in curated], {id(page) for _, page in curated}
    for part in ("trained page", "held-out field"):
        parts[part] = [page for page in parts[part] if id(page) in inside]
    streams = {"curated": pack(ids, eos)}
    if "shuffled words" in config.arms:
        streams["shuffled"] = pack(tokenise(shuffled_words(texts, rng), tokenizer), eos)
    if "less curated" in config.arms:
        wanted = int(config.hungry * config.epochs * len(streams["curated"]))
        if raw := raw_text(split_pages(domain, seed), 4 * wanted, rng):
            streams["raw"] = pack(tokenise(raw, tokenizer), eos, wanted + 1)
    old, unseen = general_split(general)
    shown = [old[i].text() for i in rng.permutation(len(old))[: max(16, config.general_tokens // 150)]]
    streams["general"] = pack(tokenise(shown, tokenizer), eos, config.general_tokens + 1)
    held = {
        "domain": _windows([p.text() for p in parts["held-out page"]], tokenizer, config, "domain text"),
        "general": _windows([p.text() for p in unseen], tokenizer, config, "general text"),
    }
    items = {part: questions(pages, domain, rng, part, config.siblings) for part, pages in parts.items()}
    asked = [old[i] for i in rng.permutation(len(old))[: 2 * config.questions]]
    items["general"] = questions(asked, old, rng, "general", config.siblings)
    words = sum(len(t.split()) for t in texts)
    return Material(
        streams, held, {k: v[: config.questions] for k, v in items.items()}, dropped, sum(map(len, ids)) / words,
        (from_domain, from_general),
    )  # fmt: skip
