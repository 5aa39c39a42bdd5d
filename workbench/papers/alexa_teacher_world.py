"""The three texts of a run (public, in-domain without labels, labelled), kept apart, and the tokenizer they share."""

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from workbench.data import commands
from workbench.data.bpe import train_bpe
from workbench.data.commands import Utterance
from workbench.data.masked_text import MaskedBatches, Sentences, Vocabulary, encode_lines
from workbench.data.provenance import Provenance
from workbench.data.public_text import PublicText, hub_text, public_text
from workbench.data.spoken import spoken
from workbench.data.utterances import Encoded, Labels, encode_utterances, load_utterances
from workbench.errors import WorkbenchError
from workbench.models.encoders import load_encoder
from workbench.papers.alexa_teacher_settings import Config

SPECIAL = {"bos_token": "<s>", "pad_token": "[PAD]", "eos_token": "</s>", "mask_token": "[MASK]"}
# letters of the languages here, and beyond them one letter for every byte that UTF-8 has: no input is ever lost
ALPHABET = "".join(map(chr, [*map(ord, string.printable), *range(0xA1, 0x801), *range(0x1000, 0x10000, 0x1000),
                             0x10000, 0x40000, 0x80000, 0xC0000, 0x100000]))  # fmt: skip
TESTED: tuple[tuple[commands.Part, str], ...] = (("covered", "pool"), ("novel", "all"))  # templates, values


@dataclass(frozen=True)
class World:
    """Everything the encoders of one seed read.

    sentences: "public" (spoken and written) and "in-domain" (as spoken). held_out: rows (N, T) that no training saw:
    "public spoken", "public written", "in-domain". tests: "covered" (phrasings seen without labels), "novel"
    (phrasings and values seen nowhere), and "left out" (a language without labels); a user's data has no "novel".
    """

    tokenizer: Any
    vocabulary: Vocabulary
    labels: Labels
    sentences: Mapping[str, Sentences]
    held_out: Mapping[str, Tensor]
    labelled: Sequence[Utterance]
    tests: Mapping[str, Sequence[Utterance]]
    encoded: Mapping[str, Encoded]  # "labelled" and every test
    provenance: tuple[Provenance, ...]

    def batches(self, config: Config, text: str, share: float | None = None) -> MaskedBatches:
        """Masked batches of one text; share: of public text in spoken form (in-domain text is spoken anyway)."""
        aloud = (config.spoken if share is None else share) if text == "public" else 1.0
        return MaskedBatches(self.sentences[text], self.vocabulary, config.batch, config.alpha, aloud, config.rate)


def load_public(config: Config) -> PublicText:
    """The public text of a config; the same for every seed."""
    if config.public == "packages":
        return public_text(config.languages, lines=min(400, config.public_lines))
    return hub_text(config.public, config.languages, config.public_lines)


def _commands(
    config: Config, seed: int
) -> tuple[dict[str, list[Utterance]], list[Utterance], dict[str, list[Utterance]]]:
    """(in-domain pool by language, labelled, tests) from the grammar: templates are split before anything is said."""
    split = commands.split_templates(config.languages, seed, intents=config.intents, values=config.values)
    sizes = {name: sum(len(split.templates[name, part]) for part in commands.PARTS) for name in config.languages}
    pool: dict[str, list[Utterance]] = {}
    for i, name in enumerate(config.languages):
        count = max(50, config.pool * sizes[name] // sum(sizes.values()))
        pool[name] = commands.sample(split, name, ("labelled", "covered"), "pool", count, 1000 * seed + i)
    known = {u.text for own in pool.values() for u in own}
    taught = [name for name in config.languages if name != config.left_out]
    labelled: list[Utterance] = []
    for i, name in enumerate(taught):
        labelled += commands.sample(split, name, ("labelled",), "labelled", config.labels, 1000 * seed + 100 + i)
    known |= {u.text for u in labelled}
    tests: dict[str, list[Utterance]] = {"covered": [], "novel": []}
    for i, name in enumerate(taught):
        for j, (part, role) in enumerate(TESTED):
            at = 1000 * seed + 200 + 10 * j + i
            tests[part] += commands.sample(split, name, (part,), role, config.test, at, known=known)
    if config.left_out:
        tests["left out"] = commands.sample(
            split, config.left_out, ("covered",), "pool", 2 * config.test, 1000 * seed + 300, known=known
        )
    return pool, labelled, tests


def _users(config: Config, seed: int) -> tuple[dict[str, list[Utterance]], list[Utterance], dict[str, list[Utterance]]]:
    """The same from a user's or the Hub's utterances: the train partition is the pool, a part of it is labelled."""
    found = load_utterances(config.data, config.languages)
    order = np.random.default_rng(seed).permutation(len(found["train"]))
    train = [found["train"][i] for i in order]
    tested = {u.text for u in found["test"]}
    pool = {
        name: [u for u in train if u.language == name and u.text not in tested][: config.pool]
        for name in config.languages
    }
    if short := [name for name, own in pool.items() if len(own) < 2]:
        raise WorkbenchError(
            f"data set {config.data!r}: every training utterance in {short[0]!r} is a test utterance too"
        )
    labelled = [u for name, own in pool.items() if name != config.left_out for u in own[: config.labels]]
    tests = {"covered": [u for name in config.languages if name != config.left_out
                         for u in [t for t in found["test"] if t.language == name][: config.test]]}  # fmt: skip
    if config.left_out:
        tests["left out"] = [t for t in found["test"] if t.language == config.left_out][: config.test]
    return pool, labelled, tests


def make_tokenizer(config: Config, lines: Sequence[str]) -> Any:
    """A byte-level BPE of config.vocabulary tokens, <s> ... </s> around every line, trained on `lines`."""
    from tokenizers import pre_tokenizers, processors

    tokenizer = train_bpe(lines, config.vocabulary, special=SPECIAL, alphabet=ALPHABET)
    backend = tokenizer.backend_tokenizer
    # a word has the same pieces alone, in a sentence and at its start
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    ids = [(SPECIAL[name], tokenizer.convert_tokens_to_ids(SPECIAL[name])) for name in ("bos_token", "eos_token")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair=None, special_tokens=ids)
    tokenizer.model_max_length = config.context
    return tokenizer


def load_world(config: Config, seed: int, public: PublicText | None = None) -> World:
    """Texts, splits and tokenizer of one seed. public: as `load_public` gave it, so that it is read once a run.

    Raises WorkbenchError: a left-out language that is not among the languages; data or a teacher that cannot be had.
    """
    if config.left_out and (config.left_out not in config.languages or len(config.languages) < 2):
        raise WorkbenchError(
            f"left_out {config.left_out!r} is none of several languages: {', '.join(config.languages)}"
        )
    public = public or load_public(config)
    pool, labelled, tests = (_commands if config.data == "commands" else _users)(config, seed)
    aloud = {name: [spoken(line, name) or line for line in own] for name, own in public.train.items()}
    if config.teacher:
        tokenizer = load_encoder(config.teacher)[1]
    else:
        text = [" " + t for own in (*public.train.values(), *aloud.values()) for t in own]
        tokenizer = make_tokenizer(config, [*text, *(" " + u.text for own in pool.values() for u in own)])
    labels = Labels.of(labelled)

    def lines(texts: Sequence[str], longest: int = config.line) -> Tensor:
        return encode_lines(texts, tokenizer, min(longest, config.context))

    kept: dict[str, list[str]] = {name: [u.text for u in own] for name, own in pool.items()}
    held = [t for own in kept.values() for t in own[: max(1, len(own) // 20)]]
    apart = set(held)
    spared = {name: lines([t for t in own if t not in apart] or own, config.context) for name, own in kept.items()}
    silent = [(line, name) for name, own in public.held_out.items() for line in own[:150]]
    encoded = {name: encode_utterances(us, tokenizer, labels, config.context)
               for name, us in {"labelled": labelled, **tests}.items()}  # fmt: skip
    digest = hashlib.sha256("\n".join(t for own in kept.values() for t in own).encode()).hexdigest()
    note = f"{sum(map(len, kept.values()))} unlabelled, {len(labelled)} labelled, " + ", ".join(
        f"{len(us)} {name}" for name, us in tests.items()
    )
    drawn = Provenance("utterances", config.data, "", "see its source", digest, note)
    sources = commands.provenance(config.languages) if config.data == "commands" else ()
    return World(
        tokenizer=tokenizer, vocabulary=Vocabulary.of(tokenizer), labels=labels,
        sentences={
            "public": Sentences({n: lines(own) for n, own in aloud.items()},
                                {n: lines(own) for n, own in public.train.items()}),
            "in-domain": Sentences(spared, spared),
        },
        held_out={
            "in-domain": lines(held, config.context), "public written": lines([line for line, _ in silent]),
            "public spoken": lines([spoken(line, name) or line for line, name in silent]),
        },
        labelled=labelled, tests=tests, encoded=encoded, provenance=(*public.provenance, *sources, drawn),
    )  # fmt: skip
