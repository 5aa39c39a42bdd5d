"""The full preset's path on a tiny Stable Diffusion and a local folder of images: only the download is missing."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from workbench.config import override
from workbench.errors import WorkbenchError
from workbench.papers import linfusion as paper
from workbench.training.record import Record


def tokenizer():
    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16)


def text(cls, width=16):
    torch.manual_seed(0)
    return cls(
        CLIPTextConfig(
            vocab_size=54,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=width,
            bos_token_id=52,
            eos_token_id=53,
        )  # fmt: skip
    ).eval()


@pytest.fixture(scope="module", params=["sd", "xl"])
def model(request, tmp_path_factory):
    """A tiny pipeline of Stable Diffusion's own classes, saved as a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    xl = request.param == "xl"
    torch.manual_seed(0)
    extra = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64,
    }  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32 if xl else 16, attention_head_dim=2, **(extra if xl else {}),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    words = tokenizer()
    schedule = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    parts = {"vae": vae, "unet": unet, "scheduler": schedule, "tokenizer": words}
    if xl:
        pipe = StableDiffusionXLPipeline(
            **parts,
            text_encoder=text(CLIPTextModel),
            text_encoder_2=text(CLIPTextModelWithProjection),
            tokenizer_2=words,
        )
    else:
        pipe = StableDiffusionPipeline(
            **parts, text_encoder=text(CLIPTextModel), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    pipe.save_pretrained(folder / "model")
    return request.param, folder / "model"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (20, 28, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": "a cat" if i % 2 else "the sea"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_the_full_preset_runs_from_folders(model, images, tmp_path):
    kind, folder = model
    preset = paper.PRESETS["full" if kind == "sd" else "full-xl"]
    assert preset.alpha == preset.beta == 0.5 and preset.lr == 1e-4
    assert preset.batch * preset.accumulate == (96 if kind == "sd" else 64)
    small = {
        "batch": 2,
        "accumulate": 2,
        "steps": 2,
        "size": 16,
        "held_out": 2,
        "samples": 2,
        "sample_steps": 2,
        "rank": 0.5,
    }
    config = override(preset, {"model": str(folder), "data": str(images), "precision": "no", **small})
    task = paper.load_task(config, 0, tmp_path)
    first = [p.detach().clone() for p in task.unet.parameters()]
    student = paper.distil(config, task, "paper", 0, Record(tmp_path), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first, task.unet.parameters(), strict=True))
    for scale in config.scales:
        losses = paper.held_out(config, task, student.unet, 0, scale)
        assert losses["kd"] > 0 and len(losses["feat_layers"]) == len(student.layers)
        pictures = paper.draw_samples(config, task, student.unet, 0, scale, 2)  # guidance 7.5
        assert pictures.shape == (2, 3, 16 * scale, 16 * scale) and pictures.isfinite().all()
    assert paper.study(config, tmp_path / "study", Record(tmp_path / "study"), 0)["paper", 0]["kd x1"] > 0


def test_latents_and_text_states_are_cached_and_the_same(model, images, tmp_path):
    _, folder = model
    config = override(paper.PRESETS["full"], {"model": str(folder), "data": str(images), "size": 16})
    batches = []
    for cache in (tmp_path, tmp_path, None):
        task = paper.load_task(config, 0, cache)
        batches.append(paper.noisy_batch(task, torch.Generator().manual_seed(0), 4, 16))
    files = list(tmp_path.rglob("*.safetensors"))
    assert 1 <= len(files) <= 4
    for other in batches[1:]:
        assert torch.equal(batches[0]["x0"], other["x0"])
        states = [b["condition"]["encoder_hidden_states"] for b in (batches[0], other)]
        assert torch.equal(*states)
    assert batches[0]["x0"].shape == (4, 4, 8, 8)


def test_what_is_missing_is_told_in_one_line(tmp_path, images):
    config = override(paper.PRESETS["full"], {"model": str(tmp_path / "none"), "data": str(images)})
    with pytest.raises(WorkbenchError) as error:
        paper.load_task(config)
    assert "\n" not in str(error.value)
