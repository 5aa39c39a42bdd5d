"""SIGN's full path: the real UNet on the meta device; a DDPM folder and an image set of the Hub's format, tiny."""

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image

from workbench.config import override
from workbench.data.images import labelled_images
from workbench.errors import WorkbenchError
from workbench.models.edm import small_unet
from workbench.models.idempotent import load, save
from workbench.models.pretrained_ddpm import load_denoiser
from workbench.papers import sign as paper
from workbench.papers import sign_study as studies

# google/ddpm-cifar10-32's public config.json, as far as it differs from diffusers' defaults
CIFAR = {
    "sample_size": 32, "block_out_channels": [128, 256, 256, 256], "layers_per_block": 2, "attention_head_dim": None,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6, "norm_num_groups": 32,
}  # fmt: skip


def test_the_real_unet_has_its_published_size():
    with torch.device("meta"):
        unet = UNet2DModel.from_config(CIFAR)
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307
    full = paper.PRESETS["full"]
    assert (full.model, full.data, full.size, full.channels) == ("google/ddpm-cifar10-32", "uoft-cs/cifar10", 32, 3)
    assert full.skip, "a network that predicts noise cannot do without"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddpm")
    small_unet((8, 16), size=8, image_channels=3, seed=1).save_pretrained(folder)
    DDPMScheduler().save_pretrained(folder)  # the Hub's folder was saved with this class
    return folder


def write_images(folder, counts, size=12, column="img", by_label=False):
    g = np.random.default_rng(0)
    for split, n in counts.items():
        pictures = [Image.fromarray(g.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(n)]
        data = datasets.Dataset.from_dict(
            {column: pictures, "label": sorted(i % 3 for i in range(n)) if by_label else [i % 3 for i in range(n)]},
            features=datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(num_classes=3)}),
        )
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), {"train": 24, "test": 12})


def full(model, pictures, **changes):
    tiny = {
        "model": str(model), "data": str(pictures), "size": 8, "steps": 2, "batch": 4, "pairs": 8, "pair_steps": 2,
        "classifier_steps": 3, "samples": 16, "save_every": None, "workers": 1, "levels": 4,
    }  # fmt: skip
    return override(paper.PRESETS["full"], {**tiny, **changes})


def test_the_full_path_distils_measures_edits_and_saves(model, pictures, tmp_path):
    c = full(model, pictures)  # bf16, as on a GPU
    world = paper.image_world(c, 0, tmp_path, progress=False)
    assert world.shape == (3, 8, 8) and world.images.train.shape[0] == 22
    assert len(world.images.held_out(world.split)[0]) == 12  # what is measured on is the set's own test split
    assert world.images.provenance.name == str(pictures)
    before = {k: v.clone() for k, v in world.teacher.state_dict().items()}
    for arm in ("sign", "ign"):
        s = paper.distil(world, c, arm, 0, progress=False)
        assert all(np.isfinite(r["loss"]) for r in s.history)
    assert all(torch.equal(v, before[k]) for k, v in world.teacher.state_dict().items())
    s = paper.distil(world, c, "sign", 0, progress=False)
    measures = studies.measure(world, c, s.f, 0)
    # colourising is measured where there is colour, and the input has truly lost it
    assert {"no colour: error", "no colour: accuracy"} <= set(measures) and measures["no colour: error before"] > 0.01
    x, _ = world.images.held_out(world.split)
    perfect = studies.edits(world, lambda given: x, 0)
    assert perfect["no colour: error"] == 0 < perfect["no colour: error before"]
    assert np.isfinite(measures["distance x1"]) and 0 <= measures["noise: accuracy"] <= 1
    save(s.f, tmp_path / "student")
    z = world.noise(torch.Generator().manual_seed(0), 2)
    assert torch.equal(load(UNet2DModel, tmp_path / "student")(z), s.f(z))


def test_a_vp_student_starts_as_its_teachers_own_step(model):
    """With the skip and at the constant level's own scale, f before training is D(x, level)."""
    teacher = load_denoiser(str(model), 8, 3)
    from workbench.models.idempotent import from_denoiser

    f = from_denoiser(teacher, 1.0, skip=True, normalise=False)
    # a VP network's input is scaled for unit data variance: f's own constant says 0.5, so compare at that scale
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scaled = x * ((1 + 1.0) / (1 + teacher.sigma_data**2)) ** 0.5
    torch.testing.assert_close(f(x), teacher(scaled, torch.ones(2)), rtol=1e-4, atol=1e-5)


def test_a_teacher_of_another_resolution_is_refused_before_data_are_read(model):
    c = full(model, "no/such-data", size=16)
    with pytest.raises(WorkbenchError, match="works at 8 px with 3 channels, the run at 16 px with 3: [^\n]*$"):
        paper.image_world(c, 0, progress=False)
    with pytest.raises(WorkbenchError, match="run at 8 px with 1"):
        load_denoiser(str(model), 8, 1)


def test_a_teacher_that_does_not_predict_noise_is_refused(tmp_path):
    small_unet((8, 16), size=8, image_channels=3).save_pretrained(tmp_path / "unet")
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    with pytest.raises(WorkbenchError, match="predicts 'v_prediction', not the noise"):
        load_denoiser(str(tmp_path), 8, 3)


def test_an_empty_or_wrong_training_set_is_one_clear_line(model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(WorkbenchError, match="is an empty folder [^\n]*$|is an empty folder"):
        paper.image_world(full(model, tmp_path / "empty"), 0, progress=False)
    (tmp_path / "none").mkdir()
    with pytest.raises(WorkbenchError, match="'train', is empty"):
        paper.image_world(full(model, write_images(tmp_path / "none", {"train": 0})), 0, progress=False)
    (tmp_path / "small").mkdir()
    write_images(tmp_path / "small", {"train": 4}, size=6)
    with pytest.raises(WorkbenchError, match="6 x 6 px, the model works at 8"):
        paper.image_world(full(model, tmp_path / "small"), 0, progress=False)
    with pytest.raises(WorkbenchError, match="no column 'picture'"):
        paper.image_world(full(model, tmp_path / "small", image_column="picture"), 0, progress=False)
    with pytest.raises(WorkbenchError, match="digits are 8 px with channels=1"):
        paper.image_world(full(model, tmp_path / "small", data="digits"), 0, progress=False)


def pictures_of(images):
    """Every part's pictures as a set of byte strings."""
    return [{x.numpy().tobytes() for x in part} for part in (images.train, images.validation, images.test)]


def test_a_users_set_is_cut_into_three_disjoint_parts(tmp_path):
    write_images(tmp_path, {"train": 20})
    images = labelled_images(str(tmp_path), size=8)
    assert (len(images.train), len(images.validation), len(images.test), images.classes) == (16, 2, 2, 3)
    train, validation, test = pictures_of(images)
    assert len(train | validation | test) == 20  # nothing is lost, nothing is in two parts
    again = labelled_images(str(tmp_path), size=8)
    assert torch.equal(again.train, images.train) and torch.equal(again.test, images.test)
    grey = labelled_images(str(tmp_path), size=8, channels=1)
    assert grey.train.shape == (16, 1, 8, 8)


def test_a_test_split_is_kept_whole_and_validation_comes_out_of_training(tmp_path):
    write_images(tmp_path, {"train": 60, "test": 5}, by_label=True)
    images = labelled_images(str(tmp_path), size=8)
    assert (len(images.train), len(images.validation), len(images.test)) == (54, 6, 5)
    train, validation, _ = pictures_of(images)
    assert not train & validation
    assert len(images.validation_labels.unique()) == 3  # shuffled first, as this set is sorted by label


def test_two_images_are_too_few_to_train_on(tmp_path):
    write_images(tmp_path, {"train": 2})
    with pytest.raises(WorkbenchError, match="too few images: nothing is left to train on"):
        labelled_images(str(tmp_path), size=8)
