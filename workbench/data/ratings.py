"""Ratings: a long-tailed world of users and items with a dial of taste drift, and anyone's own table of ratings.

The world has the shape of MovieLens, whose files may not be passed on: few items gather most ratings (Zipf), few
users give most of them (log-normal), every item has a genre, ratings are whole stars from 1 to 5. A rating is a mean
plus the user's and the item's bias, the match of the user's taste with the item's nature, and noise. In ONE genre, the
downstream one, tastes have drifted since the teacher saw them: `gap` 0: not at all; 1: the old taste says nothing.
What it leaves out: time within a period, text, covers, and the reasons why people choose what they rate.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workbench.data.hub import hub_dataset
from workbench.data.provenance import Provenance
from workbench.errors import WorkbenchError

COLUMNS = ("user", "item", "genre", "rating")
_ML100K_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
CLS = "[CLS]"
_TASTES = 4  # hidden qualities of an item


@dataclass(frozen=True)
class Ratings:
    """One table: token ids (n, 4) of [CLS], user, item, genre, and stars (n,) float32."""

    ids: Tensor
    stars: Tensor

    def __len__(self) -> int:
        return len(self.stars)

    def pairs(self) -> set[tuple[int, int]]:
        """The (user, item) pairs, as token ids."""
        return {(int(u), int(i)) for u, i in self.ids[:, 1:3].tolist()}


@dataclass(frozen=True)
class Split:
    """What the teacher may see, its own held-out part, and one genre downstream; no pair lies in two parts."""

    vocabulary: tuple[str, ...]
    pretrain: Ratings
    original: Ratings  # held-out ratings of the teacher's own task, all genres
    train: Ratings
    validation: Ratings
    test: Ratings
    genre: str
    provenance: Provenance


def _long_tail(rng: np.random.Generator, users: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    activity = rng.lognormal(0.0, 1.1, users)
    popularity = 1.0 / np.arange(1, items + 1) ** 0.9
    return activity / activity.sum(), rng.permutation(popularity / popularity.sum())


def world(
    *, gap: float = 0.0, seed: int = 0, users: int = 300, per_genre: int = 40, genres: int = 6, pretrain: int = 12_000,
    train: int = 1000, held_out: int = 800,
) -> Split:  # fmt: skip
    """The procedural world at one place of the dial. The first genre is the downstream one.

    gap in [0, 1]: the downstream taste is cos(gap π/2) times the old one plus sin(gap π/2) times a fresh one, so its
    correlation with what the teacher learnt falls from 1 to 0. train, held_out: downstream ratings to learn from, and
    of the validation and the test part each. Raises WorkbenchError: a gap outside [0, 1]; more ratings than pairs.
    """
    if not 0 <= gap <= 1:
        raise WorkbenchError(f"the gap lies between 0 (no drift) and 1 (a new taste), got {gap}")
    need, there = train + 2 * held_out, users * per_genre
    if need > 0.8 * there:
        raise WorkbenchError(f"{need} downstream ratings, but only {there} pairs of a user and an item of the genre")
    rng = np.random.default_rng([seed, 7])
    items = per_genre * genres
    genre = np.repeat(np.arange(genres), per_genre)
    activity, popularity = _long_tail(rng, users, items)
    user_bias, item_bias = rng.normal(0, 0.35, users), rng.normal(0, 0.35, items)
    old, fresh = rng.normal(size=(users, _TASTES)), rng.normal(size=(users, _TASTES))
    nature = rng.normal(size=(items, _TASTES)) / math.sqrt(_TASTES)
    angle = gap * math.pi / 2
    now = math.cos(angle) * old + math.sin(angle) * fresh

    def rate(pairs: np.ndarray, taste: np.ndarray) -> np.ndarray:
        u, i = pairs // items, pairs % items
        clean = 3.5 + user_bias[u] + item_bias[i] + 0.8 * (taste[u] * nature[i]).sum(1)
        return np.clip(np.rint(clean + rng.normal(0, 0.5, len(pairs))), 1, 5)

    weight = np.outer(activity, popularity)
    target = np.flatnonzero(np.tile(genre == 0, users))
    flat = weight.ravel()
    # the downstream pairs are set aside first, so that the teacher cannot have seen them
    later = rng.choice(target, need, replace=False, p=flat[target] / flat[target].sum())
    rest = np.setdiff1d(np.arange(users * items), later)
    earlier = rng.choice(rest, pretrain + held_out, replace=False, p=flat[rest] / flat[rest].sum())
    stars_later, stars_earlier = rate(later, now), rate(earlier, old)
    vocabulary = (
        CLS, *(f"user {u}" for u in range(users)), *(f"item {i}" for i in range(items)),
        *(f"genre {g}" for g in range(genres)),
    )  # fmt: skip

    def table(pairs: np.ndarray, stars: np.ndarray) -> Ratings:
        u, i = pairs // items, pairs % items
        ids = np.stack([np.zeros_like(u), 1 + u, 1 + users + i, 1 + users + items + genre[i]], 1)
        return Ratings(torch.from_numpy(ids), torch.from_numpy(stars.astype(np.float32)))

    ends = [0, *np.cumsum([train, held_out, held_out])]
    learn, choose, judge = (table(later[a:b], stars_later[a:b]) for a, b in zip(ends, ends[1:], strict=False))
    digest = hashlib.sha256(later.tobytes() + stars_later.tobytes() + earlier.tobytes() + stars_earlier.tobytes())
    source = Provenance(
        f"ratings world, gap {gap:g}, seed {seed}", "workbench", "procedural", "Apache-2.0", digest.hexdigest(),
        f"{users} users, {items} items, {genres} genres; Zipf items, log-normal users",
    )  # fmt: skip
    return Split(
        vocabulary, table(earlier[:pretrain], stars_earlier[:pretrain]),
        table(earlier[pretrain:], stars_earlier[pretrain:]), learn, choose, judge, "genre 0", source,
    )  # fmt: skip


Row = tuple[str, str, str, float]


def _movielens(folder: Path) -> list[Row]:
    """MovieLens-100k as GroupLens packs it: u.data (tabs), u.item (bars); an item's first genre flag counts."""
    genre = {}
    try:
        for line in (folder / "u.item").read_text(encoding="latin-1").splitlines():
            cells = line.split("|")
            genre[cells[0]] = _ML100K_GENRES[cells[-len(_ML100K_GENRES) :].index("1")]
        cells_of = [line.split("\t") for line in (folder / "u.data").read_text().splitlines()]
        return [(f"user {u}", f"item {i}", f"genre {genre[i]}", float(stars)) for u, i, stars, *_ in cells_of]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise WorkbenchError(f"{folder} is not MovieLens-100k as GroupLens packs it: {error}") from None


def _rows(path: str) -> list[Row]:
    if (Path(path) / "u.data").is_file():
        return _movielens(Path(path))
    rows: list[Row] = []
    for number, row in enumerate(hub_dataset(path, columns=COLUMNS), 1):
        user, item, genre, stars = (row[c] for c in COLUMNS)
        if user is None or item is None or genre is None:
            raise WorkbenchError(f"{path}, row {number}: user, item and genre are never empty")
        if isinstance(stars, bool) or not isinstance(stars, int | float) or not math.isfinite(stars):
            raise WorkbenchError(f"{path}, row {number}: a rating is a number, got {stars!r}")
        rows.append((f"user {user}", f"item {item}", f"genre {genre}", float(stars)))
    return rows


def load(path: str, *, genre: str = "", seed: int = 0, vocabulary: Mapping[str, int] | None = None) -> Split:
    """Anyone's ratings: jsonl or parquet with columns user, item, genre, rating (a number), or MovieLens-100k.

    genre: the downstream one; the genre with the most ratings where empty. Its rows are split 50/25/25 into what the
    student learns from, validation and test; of the other half of it nothing is held back from the teacher, who sees a
    tenth of its rows besides all other genres (less a tenth that is held out). vocabulary: of a teacher that exists
    already; a user, item or genre it lacks is refused. Raises WorkbenchError: wrong column, empty file, too few rows.
    """
    rows = _rows(path)
    counts: dict[str, int] = {}
    for *_, name, _stars in rows:
        counts[name] = counts.get(name, 0) + 1
    chosen = f"genre {genre}" if genre else max(counts, key=lambda g: counts[g])
    if chosen not in counts:
        names = ", ".join(sorted(g.removeprefix("genre ") for g in counts)[:12])
        raise WorkbenchError(f"{path} has no genre {genre!r}: it has {names}")
    if len({(u, i) for u, i, _, _ in rows}) < len(rows):
        raise WorkbenchError(f"{path}: a user rates an item once; some pair of user and item appears twice")
    if vocabulary is None:
        words = [w for column in zip(*(row[:3] for row in rows), strict=True) for w in sorted(set(column))]
        vocabulary = {word: i for i, word in enumerate([CLS, *words])}
    for row in rows:
        for word in row[:3]:
            if word not in vocabulary:
                raise WorkbenchError(
                    f"{path}: {word!r} is not in the teacher's vocabulary; it was trained on other data"
                )
    order = np.random.default_rng([seed, 11]).permutation(len(rows))
    inside = [i for i in order if rows[i][2] == chosen]
    outside = [i for i in order if rows[i][2] != chosen]
    if len(inside) < 40 or len(outside) < 40:
        raise WorkbenchError(
            f"{path}: {len(inside)} ratings of {chosen} and {len(outside)} of others; 40 of each is the least"
        )
    seen, inside = inside[: len(inside) // 10], inside[len(inside) // 10 :]
    half, quarter = len(inside) // 2, len(inside) // 4
    kept = len(outside) // 10

    def table(numbers: Sequence[int]) -> Ratings:
        ids = [[vocabulary[CLS], *(vocabulary[word] for word in rows[i][:3])] for i in numbers]
        return Ratings(torch.tensor(ids), torch.tensor([rows[i][3] for i in numbers]))

    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    source = Provenance(Path(path).name, "own data", "-", "the owner's", digest, f"{len(rows):,} ratings")
    return Split(
        tuple(sorted(vocabulary, key=lambda w: vocabulary[w])), table([*outside[kept:], *seen]), table(outside[:kept]),
        table(inside[:half]), table(inside[half : half + quarter]), table(inside[half + quarter :]), chosen, source,
    )  # fmt: skip
