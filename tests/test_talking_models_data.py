"""The two worlds with a dial (no leak from downstream to teacher, the long tail, the gap), and anyone's own data."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from workbench.data import ratings, shifted_digits
from workbench.data.pictures import Pictures
from workbench.errors import WorkbenchError
from workbench.papers import talking_models as paper
from workbench.papers import talking_models_study as study
from workbench.papers import talking_models_tasks as tasks
from workbench.runs.folder import check
from workbench.training.record import Record

# --- the ratings world ------------------------------------------------------------------------------------------------


def test_no_downstream_rating_was_seen_before():
    split = ratings.world(seed=3)
    parts = [split.pretrain, split.original, split.train, split.validation, split.test]
    pairs = [part.pairs() for part in parts]
    assert all(len(p) == len(part) for p, part in zip(pairs, parts, strict=True))
    assert len(set().union(*pairs)) == sum(map(len, pairs))
    genre = split.vocabulary.index(split.genre)
    for part in (split.train, split.validation, split.test):
        assert (part.ids[:, 3] == genre).all()
    assert len(split.pretrain.ids[:, 3].unique()) == 6  # the teacher's task is broader
    assert set(split.pretrain.stars.unique().tolist()) == {1.0, 2.0, 3.0, 4.0, 5.0}


def test_few_items_and_users_make_most_ratings():
    ids = ratings.world().pretrain.ids
    for column in (1, 2):
        counts = torch.bincount(ids[:, column]).sort(descending=True).values.float()
        counts = counts[counts > 0]
        assert counts[: len(counts) // 5].sum() / counts.sum() > 0.4, column


def test_the_dial_moves_downstream_tastes_and_nothing_else():
    splits = {gap: ratings.world(gap=gap, seed=1) for gap in (0.0, 0.5, 1.0)}
    first = splits[0.0]
    for split in splits.values():
        assert torch.equal(split.pretrain.stars, first.pretrain.stars) and torch.equal(split.test.ids, first.test.ids)
    moved = [np.corrcoef(first.test.stars, splits[gap].test.stars)[0, 1] for gap in (0.5, 1.0)]
    assert moved[0] > moved[1] + 0.1
    again = ratings.world(gap=0.5, seed=1)
    assert torch.equal(again.train.stars, splits[0.5].train.stars) and again.provenance == splits[0.5].provenance
    assert ratings.world(gap=0.5, seed=2).provenance.sha256 != again.provenance.sha256


def test_impossible_worlds_are_refused():
    with pytest.raises(WorkbenchError, match="between 0"):
        ratings.world(gap=1.5)
    with pytest.raises(WorkbenchError, match="only 12000 pairs"):
        ratings.world(train=9000)


# --- the digits -------------------------------------------------------------------------------------------------------


def test_no_image_is_in_two_parts_and_every_class_is_learnt_from():
    split = shifted_digits.load(seed=2)
    parts = [split.pretrain, split.original, split.train, split.validation, split.test]
    numbers = [set(part.numbers.tolist()) for part in parts]
    assert len(set().union(*numbers)) == sum(map(len, numbers)) == 1797
    assert torch.bincount(split.train.labels).tolist() == [12] * 10
    assert len(split.pretrain) == 3 * 900 and split.train.pixels.shape[1:] == (3, 8, 8)


def test_further_looks_are_the_same_pictures_with_other_noise():
    once, twice = (shifted_digits.load(seed=1, pretrain=500, train=40, looks=looks) for looks in (1, 2))
    assert twice.train.numbers.tolist() == once.train.numbers.tolist() * 2
    first, second = twice.train.pixels.split(40)
    assert 0.05 < (first - second).abs().mean() < 0.4  # noise of 0.25 apart, clipped at black
    assert torch.equal(once.test.numbers, twice.test.numbers)


def test_a_quarter_turn_is_a_quarter_turn():
    g = torch.Generator().manual_seed(0)
    pixels = torch.rand(4, 1, 8, 8, generator=g) * 2 - 1
    turned = shifted_digits.turned(pixels, torch.full((4,), 90.0))
    assert torch.allclose(turned, pixels.rot90(1, (2, 3)), atol=1e-5) or torch.allclose(
        turned, pixels.rot90(-1, (2, 3)), atol=1e-5
    )
    assert torch.allclose(shifted_digits.turned(pixels, torch.zeros(4)), pixels, atol=1e-5)
    upright, far = (shifted_digits.load(gap=gap, seed=1) for gap in (0.0, 1.0))
    assert torch.equal(upright.pretrain.pixels, far.pretrain.pixels)
    assert torch.equal(upright.test.labels, far.test.labels)
    assert not torch.allclose(upright.test.pixels, far.test.pixels, atol=0.3)
    with pytest.raises(WorkbenchError, match="quarter turn"):
        shifted_digits.load(gap=-0.1)


# --- own data ---------------------------------------------------------------------------------------------------------


def own_rows(n_users=30, n_items=24):
    rng = np.random.default_rng(0)
    rows = []
    for u in range(n_users):
        for i in rng.choice(n_items, 12, replace=False):
            rows.append({"user": f"u{u}", "item": int(i), "genre": "sci-fi" if i < 14 else "drama",
                         "rating": float(rng.integers(1, 6))})  # fmt: skip
    return rows


def write(folder, rows, form="jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    if form == "jsonl":
        (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return str(folder)


TINY = {
    "arms": ["alone", "two-way", "feature KD"],
    "steps": 3,
    "teacher_steps": 3,
    "batch": 8,
    "workers": 1,
}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_own_ratings_are_learnt_from(tmp_path, form):
    path = write(tmp_path / "data", own_rows(), form)
    split = ratings.load(path, genre="sci-fi")
    parts = [split.pretrain, split.original, split.train, split.validation, split.test]
    pairs = [p.pairs() for p in parts]
    assert len(set().union(*pairs)) == sum(map(len, pairs)) == 360
    assert split.vocabulary[0] == "[CLS]" and len(split.vocabulary) == 1 + 30 + 24 + 2
    config = check("talking_models", "quick", 0, TINY | {"tasks": ["ratings"], "data": path})
    known = study.run_study(config, Record(tmp_path / "run"), 0)
    assert {arm for _, _, arm, _ in known} == {"alone", "two-way", "feature KD", "teacher"}
    # and the teacher that was trained there is one to bring along
    teacher = str(next((tmp_path / "run" / "teachers").glob("ratings-0")))
    again = check("talking_models", "quick", 0, TINY | {"tasks": ["ratings"], "data": path, "teacher": teacher})
    mine = study.run_study(again, Record(tmp_path / "again"), 0)
    assert (
        mine["ratings", again.gap, "teacher", 0]["original"] == known["ratings", config.gap, "teacher", 0]["original"]
    )
    assert not (tmp_path / "again" / "teachers").exists()


def test_bad_ratings_are_one_line(tmp_path):
    rows = own_rows()
    renamed = [{("stars" if k == "rating" else k): v for k, v in r.items()} for r in rows]
    with pytest.raises(WorkbenchError, match="no column 'rating'"):
        ratings.load(write(tmp_path / "renamed", renamed))
    with pytest.raises(WorkbenchError, match="empty"):
        ratings.load(write(tmp_path / "empty", []))
    with pytest.raises(WorkbenchError, match="row 3: a rating is a number"):
        ratings.load(write(tmp_path / "gap", [r | {"rating": None if i == 2 else 1.0} for i, r in enumerate(rows)]))
    with pytest.raises(WorkbenchError, match="no genre 'western': it has drama, sci-fi"):
        ratings.load(write(tmp_path / "fine", rows), genre="western")
    with pytest.raises(WorkbenchError, match="appears twice"):
        ratings.load(write(tmp_path / "twice", [*rows, rows[0]]))
    with pytest.raises(WorkbenchError, match="40 of each is the least"):
        ratings.load(write(tmp_path / "few", rows[:30]))


def small_bert(folder, words, **changes):
    BertForSequenceClassification(
        BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=3, num_attention_heads=1,
                   intermediate_size=16, max_position_embeddings=4, num_labels=1, **changes)
    ).save_pretrained(folder)  # fmt: skip
    (folder / "vocabulary.json").write_text(json.dumps(words))
    return str(folder)


def test_a_teacher_of_another_vocabulary_is_one_line(tmp_path):
    path = write(tmp_path / "data", own_rows())
    words = list(ratings.load(path).vocabulary)

    def load(teacher, **changes):
        config = check("talking_models", "quick", 0, TINY | {"tasks": ["ratings"], "data": path, "teacher": teacher})
        task = tasks.load_task(config, "ratings", 0)
        return tasks.load_teacher(config, task, 0, tmp_path)

    assert load(small_bert(tmp_path / "right", words)).outputs == 1
    with pytest.raises(WorkbenchError, match="'user u7' is not in the teacher's vocabulary"):
        load(small_bert(tmp_path / "other", [w for w in words if w != "user u7"]))
    (tmp_path / "right" / "vocabulary.json").unlink()
    with pytest.raises(WorkbenchError, match="no vocabulary.json"):
        load(str(tmp_path / "right"))


def test_movielens_as_it_is_packed(tmp_path):
    flags = {"1": 5, "2": 8}  # Comedy, Drama
    lines = [f"{i}|Film {i} (1990)|01-Jan-1990||http://x|" + "|".join("1" if g == f else "0" for g in range(19))
             for i, f in flags.items()]  # fmt: skip
    (tmp_path / "u.item").write_text("\n".join(lines), encoding="latin-1")
    rows = [f"{u}\t{i}\t{1 + u % 5}\t88000{u}" for u in range(60) for i in (1, 2)]
    (tmp_path / "u.data").write_text("\n".join(rows))
    split = ratings.load(str(tmp_path), genre="Drama")
    assert split.genre == "genre Drama" and "genre Comedy" in split.vocabulary
    assert len(split.train) + len(split.validation) + len(split.test) == 54  # 60 of Drama, 6 of them the teacher's
    (tmp_path / "u.item").unlink()
    with pytest.raises(WorkbenchError, match="is not MovieLens-100k"):
        ratings.load(str(tmp_path))


def picture_folder(folder, names=("cat", "dog"), each=40, side=16):
    rng = np.random.default_rng(0)
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 120, (side, side, 3)) + 100 * k
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return str(folder)


def small_vit(folder, labels, side=16):
    ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=side,
                  patch_size=8, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)})
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def test_own_pictures_and_an_own_teacher(tmp_path):
    path = picture_folder(tmp_path / "data")
    teacher = small_vit(tmp_path / "vit", ["cat", "dog"])
    changes = TINY | {"tasks": ["vision"], "data": path, "teacher": teacher, "image_size": 16, "patch": 4,
                      "arms": ["alone", "logit KD", "probe KD", "two-way", "random teacher"]}  # fmt: skip
    # patches of 8 px for the teacher, of 4 px for the student: 5 and 17 tokens
    config = check("talking_models", "quick", 0, changes)
    known = study.run_study(config, Record(tmp_path / "run"), 0)
    assert known["vision", config.gap, "two-way", 0]["error"] <= 1 and len(known) == 6
    other = small_vit(tmp_path / "other", ["fork", "spoon", "knife"])
    wrong = check("talking_models", "quick", 0, changes | {"teacher": other})
    with pytest.raises(WorkbenchError, match='use "probe KD"'):
        study.measure_student(study.Job(wrong, "vision", "logit KD", 0, wrong.gap, tmp_path / "wrong"))
    fits = check("talking_models", "quick", 0, changes | {"teacher": other, "arms": ["probe KD"]})
    assert study.measure_student(study.Job(fits, "vision", "probe KD", 0, fits.gap, tmp_path / "fits"))["error"] <= 1


def test_bad_pictures_and_teachers_are_one_line(tmp_path):
    path = picture_folder(tmp_path / "data")
    with pytest.raises(WorkbenchError, match="no column 'class'"):
        Pictures(path, label="class", size=16)
    with pytest.raises(WorkbenchError, match="empty folder"):
        (tmp_path / "nothing").mkdir()
        Pictures(str(tmp_path / "nothing"), size=16)
    with pytest.raises(WorkbenchError, match="one class only"):
        rows = [{"image": 1.0, "label": "a"}] * 3
        Pictures(write(tmp_path / "one", rows), size=16)
    with pytest.raises(WorkbenchError, match="float, not images"):
        Pictures(write(tmp_path / "numbers", [{"image": 1.0, "label": c} for c in "ab"]), size=16)
    with pytest.raises(WorkbenchError, match="50 is the least"):
        Pictures(picture_folder(tmp_path / "few", each=20), size=16).split(0)
    vit = small_vit(tmp_path / "vit", ["cat", "dog"], side=24)

    def load(**changes):
        config = check(
            "talking_models", "quick", 0, {"tasks": ["vision"], "data": path, "image_size": 16, "gaps": []} | changes
        )
        return tasks.load_teacher(config, tasks.load_task(config, "vision", 0), 0, tmp_path)

    with pytest.raises(WorkbenchError, match="image_size=24"):
        load(teacher=vit)
    with pytest.raises(WorkbenchError, match="is a bert model"):
        load(teacher=small_bert(tmp_path / "bert", ["a", "b"]))
    with pytest.raises(WorkbenchError, match="serve one task"):
        tasks.load_task(check("talking_models", "quick", 0, {"data": path}), "vision", 0)
    own = check("talking_models", "quick", 0, {"tasks": ["vision"], "data": path})
    assert own.gaps and tasks.at_gaps(own) == [own.gap]  # own data have no dial


# --- the full presets -------------------------------------------------------------------------------------------------


def test_the_full_presets_at_their_real_sizes(monkeypatch):
    config = paper.PRESETS["full"]
    labels = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
    task = tasks.Task("vision", labels, (), 224, None, None, None, None, None, None)
    with torch.device("meta"):
        # the published config of vit-base-patch16-224-in21k is ViTConfig's default
        teacher = ViTForImageClassification(ViTConfig(num_labels=10))
        student = tasks.small_model(task, config.student_width, config.student_layers, config.patch, 0)
    count = [sum(p.numel() for p in m.parameters()) for m in (teacher, student)]
    assert count[0] == 85_798_656 + 7_690 and count[1] < count[0] / 5
    stages = paper.Stages(teacher, config.teacher_low, config.teacher_high)
    assert stages.tokens == 197 and paper.Stages(student, config.student_low, config.student_high).tokens == 197
    films = paper.PRESETS["full-ratings"]
    assert films.steps * films.batch > 10 * 100_000 * 0.5 / 10 and films.tasks == ("ratings",)
