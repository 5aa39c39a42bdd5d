"""The world of swatches: real pixels with a known origin, one photograph an image, and a measure that notices two."""

import hashlib
from pathlib import Path

import pytest
import skimage
import torch

from workbench.data import swatches
from workbench.evaluation.agreement import agreement, coverage, shares


@pytest.fixture(scope="module")
def world():
    return swatches.load()


def draw(world, seed=0, batch=64, size=12, **kw):
    return world.draw(torch.Generator().manual_seed(seed), batch, size, **kw)


def test_every_photograph_names_its_origin(world):
    assert {p.package for p in world.provenance} == {"scikit-image", "scikit-learn"}
    assert all(p.licence and len(p.sha256) == 64 for p in world.provenance)
    rocket = next(p for p in world.provenance if p.name.endswith("rocket.jpg"))
    path = Path(skimage.__file__).parent / "data" / "rocket.jpg"
    assert rocket.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "dusk" in rocket.note


def test_images_follow_from_the_generator_alone(world):
    a, labels = draw(world)
    b, _ = draw(world)
    assert torch.equal(a, b) and not torch.equal(a, draw(world, seed=1)[0])
    assert a.shape == (64, 3, 12, 12) and a.abs().max() <= 1 and set(labels.tolist()) == set(range(6))


def test_pixels_come_from_the_photograph_of_the_label(world):
    images, labels = draw(world, batch=8)
    for image, label in zip(images, labels, strict=True):
        inside = image.flatten(1).T
        inside = inside[inside.norm(dim=1) > 0.9]  # deep inside a window, where the cover is complete or nearly so
        photo = world.images[label].flatten(1).T
        exact = (torch.cdist(inside, photo).amin(1) < 1e-6).float().mean()
        assert len(inside) == 0 or exact > 0.5


def test_one_swatch_on_request(world):
    _, labels = draw(world, only=3)
    assert set(labels.tolist()) == {3}


@pytest.mark.parametrize("size", [12, 24, 36])
def test_real_images_agree_at_every_size_and_keep_their_density(world, size):
    images, labels = draw(world, size=size, batch=200)
    found = shares(images, world.palette)
    assert (found.argmax(1) == labels).float().mean() > 0.99
    assert agreement(images, world.palette).mean() > 0.95
    assert 0.3 < coverage(images).mean() < 0.5


def test_agreement_notices_two_photographs_and_chance(world):
    one, a = draw(world, batch=200)
    other, b = draw(world, seed=1, batch=200)
    mixed = torch.cat([one[..., :6], other[..., 6:]], -1)[a != b]
    assert agreement(mixed, world.palette).mean() < 0.75
    empty = torch.zeros(2, 3, 12, 12)
    assert agreement(empty, world.palette).eq(0).all() and coverage(empty).eq(0).all()
