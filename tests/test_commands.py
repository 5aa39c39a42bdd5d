"""The command grammar: slots are what was filled in, splits do not leak; a user's utterances, and masked tensors."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from workbench.data.commands import PARTS, grammar, sample, shared_intents, split_templates, utter
from workbench.data.masked_text import MaskedBatches, Sentences, Vocabulary, encode_lines, mask_tokens, masked_batch
from workbench.data.utterances import Labels, annotated, encode_utterances, load_utterances, parse_annotated
from workbench.errors import WorkbenchError
from workbench.evaluation.understanding import spans
from workbench.papers.alexa_teacher_settings import Config
from workbench.papers.alexa_teacher_world import make_tokenizer

LANGUAGES = ("en", "de", "es", "it")


@pytest.fixture(scope="module")
def split():
    return split_templates(LANGUAGES, 0)


@pytest.fixture(scope="module")
def tokenizer(split):
    text = [" " + u.text for name in LANGUAGES for u in sample(split, name, ("labelled", "covered"), "pool", 400, 0)]
    return make_tokenizer(Config(vocabulary=900), text)


def test_the_same_intents_in_every_language(split):
    assert len(split.intents) >= 20 and "HassTurnOn" in split.intents
    assert shared_intents(("en",)) != split.intents and set(split.intents) <= set(shared_intents(("en",)))
    with pytest.raises(WorkbenchError, match="no commands in language 'xx'"):
        grammar("xx")


def test_templates_and_values_are_disjoint_between_parts(split):
    for language in LANGUAGES:
        parts = [{t.name for t in split.templates[language, part]} for part in PARTS]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
        for part in PARTS:  # every intent can be learned, met unlabelled, and tested on new phrasings
            assert {t.intent for t in split.templates[language, part]} == set(split.intents)
        for name, everything in split.values[language]["all"].items():
            labelled, pool = (set(split.values[language][role][name]) for role in ("labelled", "pool"))
            assert labelled <= pool < set(everything), name


def test_slot_words_are_the_values_that_were_filled_in(split):
    rng = np.random.default_rng(0)
    area = split.values["it"]["pool"]["area"]
    seen = 0
    for t in split.templates["it", "covered"]:
        u = utter(t, rng, split.values["it"]["pool"])
        assert len(u.words) == len(u.tags) and u.text == " ".join(u.words)
        for label, a, b in spans(u.tags):
            if label == "area":
                seen += 1
                assert " ".join(u.words[a:b]) in area
            assert not any(c.isdigit() for word in u.words[a:b] for c in word)  # spoken form
    assert seen > 50


def test_test_utterances_are_not_in_the_pool(split):
    known = {u.text for u in sample(split, "en", ("labelled", "covered"), "pool", 500, 1)}
    before = set(known)
    test = sample(split, "en", ("covered",), "pool", 60, 2, known=known)
    assert len(test) == 60 and len({u.text for u in test}) == 60 and not {u.text for u in test} & before
    again = sample(split, "en", ("covered",), "pool", 60, 2, known=set(before))
    assert again == test  # a seed gives the same sample


def test_a_random_split_of_sentences_would_leak_templates(split):
    """The trap that the split by template avoids: sampled sentences share their templates."""
    pool = sample(split, "en", PARTS, "all", 600, 3)
    train, test = pool[:500], pool[500:]
    assert len({u.template for u in test} & {u.template for u in train}) > 0.3 * len({u.template for u in test})
    covered = {u.template for u in sample(split, "en", ("covered",), "pool", 100, 4)}
    assert not covered & {u.template for u in sample(split, "en", ("labelled",), "labelled", 500, 5)}


def test_annotated_utterances_there_and_back(split):
    words, tags = parse_annotated("wake me at [time : five am] on [date : monday]")
    assert words == ("wake", "me", "at", "five", "am", "on", "monday")
    assert tags == ("O", "O", "O", "B-time", "I-time", "O", "B-date")
    for u in sample(split, "de", ("novel",), "all", 50, 0):
        assert parse_annotated(annotated(u)) == (u.words, u.tags)
    assert parse_annotated("[a : x] [a : y]")[1] == ("B-a", "B-a")  # neighbours of one label stay two slots
    with pytest.raises(WorkbenchError, match=r"a slot is written \[name : words\]"):
        parse_annotated("at [time five am]")


def write(path, rows):
    path.mkdir(exist_ok=True)
    (path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def rows_of(utterances, partition):
    return [{"locale": f"{u.language}-XX", "partition": partition, "utt": u.text, "annot_utt": annotated(u),
             "intent": u.intent} for u in utterances]  # fmt: skip


def test_a_users_utterances(split, tmp_path):
    us = sample(split, "en", ("labelled",), "labelled", 30, 0)
    found = load_utterances(write(tmp_path / "a", rows_of(us[:20], "train") + rows_of(us[20:], "test")), ("en",))
    assert [u.tags for u in found["train"]] == [u.tags for u in us[:20]] and len(found["test"]) == 10
    bad = [{"annotation": r.pop("annot_utt"), **r} for r in rows_of(us, "train")]
    for folder, rows, languages, line in (
        ("b", bad, ("en",), "has no column 'annot_utt'"),
        ("c", rows_of(us, "train"), ("en",), "no utterance in partition 'test'"),
        ("d", rows_of(us, "train") + rows_of(us, "test"), ("en", "de"), "no utterance in de"),
        ("e", [], ("en",), "is empty"),
    ):
        with pytest.raises(WorkbenchError, match=line) as error:
            load_utterances(write(tmp_path / folder, rows), languages)
        assert "\n" not in str(error.value)


def test_massives_own_format_has_numbered_intents(tmp_path):
    """The Hub's parquet stores an intent as a class number; its name is what counts here."""
    columns = {
        "locale": ["en-US", "en-US", "de-DE"], "partition": ["train", "test", "train"],
        "utt": ["wake me", "stop", "halt"],
        "annot_utt": ["wake me", "stop", "halt"], "intent": [1, 0, 0],
    }  # fmt: skip
    features = Features({k: Value("string") for k in columns} | {"intent": ClassLabel(names=["stop", "alarm_set"])})
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    found = load_utterances(str(tmp_path), ("en",))
    assert [u.intent for u in (*found["train"], *found["test"])] == ["alarm_set", "stop"]


def test_labels_sit_on_the_first_piece_of_each_word(split, tokenizer):
    us = sample(split, "es", ("covered",), "pool", 40, 0)
    labels = Labels.of(us)
    data = encode_utterances(us, tokenizer, labels, 64)
    for u, ids, first, tags in zip(us, data.ids, data.first, data.tags, strict=True):
        places = first[first >= 0].tolist()
        assert [labels.tags[i] for i in tags[places].tolist()] == list(u.tags)
        assert (tags >= 0).sum() == len(u.words)  # nowhere else
        for word, place, after in zip(
            u.words, places, [*places[1:], int((ids != tokenizer.pad_token_id).sum()) - 1], strict=True
        ):
            assert tokenizer.decode(ids[place:after]).strip() == word
    assert torch.equal(
        data.ids[0, : len(tokenizer(us[0].text)["input_ids"])], torch.tensor(tokenizer(us[0].text)["input_ids"])
    )
    with pytest.raises(WorkbenchError, match="raise context"):
        encode_utterances(us, tokenizer, labels, 6)


def test_no_character_is_lost_by_the_tokenizer(tokenizer):
    for text in ("Straße à l'été, niño – ﷺ 日本 €5", "ЖЮ ΑΩ"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_masking_is_80_10_10_and_spares_what_is_special(tokenizer):
    vocabulary = Vocabulary.of(tokenizer)
    g = torch.Generator().manual_seed(0)
    ids = vocabulary.ordinary[torch.randint(len(vocabulary.ordinary), (400, 100), generator=g)]
    ids[:, 0], ids[:, -5:] = tokenizer.bos_token_id, vocabulary.pad
    out, chosen = mask_tokens(ids, vocabulary, g, rate=0.15)
    assert not chosen[:, 0].any() and not chosen[:, -5:].any() and torch.equal(out[~chosen], ids[~chosen])
    n = int(chosen.sum())
    inside = 400 * 94
    assert abs(n - 0.15 * inside) < 4 * (inside * 0.15 * 0.85) ** 0.5
    masked = int((out[chosen] == vocabulary.mask).sum())
    kept = int((out[chosen] == ids[chosen]).sum())
    assert abs(masked - 0.8 * n) < 4 * (n * 0.16) ** 0.5
    # a random token hits the true one now and then
    assert abs(kept - 0.1 * n) < 4 * (n * 0.09) ** 0.5 + n / len(vocabulary.ordinary)
    assert not vocabulary.special[out[chosen & (out != vocabulary.mask)]].any()


def test_masks_are_drawn_anew_and_never_empty(tokenizer):
    vocabulary = Vocabulary.of(tokenizer)
    rows = encode_lines(["turn on the light", "stop"], tokenizer, 16)
    sentences = Sentences({"en": rows}, {"en": rows})
    batches = MaskedBatches(sentences, vocabulary, batch=4, rate=0.3)
    one, again, other = (batches(torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one["ids"], again["ids"]) and not torch.equal(one["chosen"], other["chosen"])
    assert not one["chosen"][one["attention"] == 0].any()
    single = masked_batch(rows[1:2, :3].long(), vocabulary, torch.Generator().manual_seed(0), 1e-9)
    assert single["chosen"].sum() == 1
    with pytest.raises(WorkbenchError, match="nothing but special tokens"):
        mask_tokens(torch.full((1, 3), vocabulary.pad), vocabulary, torch.Generator())
    with pytest.raises(WorkbenchError, match="data set is empty"):
        encode_lines([], tokenizer, 16)


def test_languages_and_forms_are_sampled_as_asked(tokenizer):
    vocabulary = Vocabulary.of(tokenizer)
    marks = {name: encode_lines([name] * n, tokenizer, 8) for name, n in (("one", 90), ("two", 10))}
    loud = {name: encode_lines(["loud"] * len(t), tokenizer, 8) for name, t in marks.items()}
    batches = MaskedBatches(Sentences(loud, marks), vocabulary, batch=2000, alpha=0.5, share=0.7)
    said = batches(torch.Generator().manual_seed(0))["targets"]
    width = said.shape[1]
    words = {
        k: torch.nn.functional.pad(v[0], (0, width - v.shape[1]), value=vocabulary.pad)
        for k, v in (*marks.items(), ("loud", loud["one"]))
    }
    count = {k: int((said == v.long()).all(1).sum()) for k, v in words.items()}
    assert sum(count.values()) == 2000 and abs(count["loud"] - 1400) < 90
    assert abs(count["one"] / (count["one"] + count["two"]) - 0.75) < 0.08  # sqrt(90) : sqrt(10) is 3 : 1
