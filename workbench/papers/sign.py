"""SIGN: a diffusion model's score distilled into an idempotent generator f; and IGN, its adversarial rival.

x ~ data, z ~ N(0, sigma_max^2 I), D_phi the frozen teacher, f_theta the student (no time input), f_theta' its present
weights held constant, s_fake a second denoiser trained online on the student's samples.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workbench.data import digits
from workbench.data.digits import Images, Split
from workbench.data.mixture import GaussianMixture, ring
from workbench.errors import WorkbenchError
from workbench.losses import idempotent as ign
from workbench.losses import score_distillation as sd
from workbench.models.classifier import SmallClassifier
from workbench.models.edm import (
    Denoiser,
    DenoiserFn,
    PlaneNet,
    denoising,
    fresh,
    karras_sigmas,
    ode_sample,
    ode_step,
    small_unet,
)
from workbench.models.idempotent import Idempotent, from_denoiser, frozen
from workbench.papers.sign_bench import bench
from workbench.papers.sign_settings import (
    ABOUT,
    ARXIV,
    AUTHORS,
    CLAIMS,
    NOTEBOOK,
    PRESETS,
    TITLE,
    Arm,
    Config,
)  # fmt: skip
from workbench.training.loop import Auxiliary, Recipe, fit, step_seed
from workbench.training.record import Record

__all__ = ["ABOUT", "ARXIV", "AUTHORS", "CLAIMS", "NOTEBOOK", "PRESETS", "TITLE", "Config", "bench"]


@dataclass(frozen=True)
class World:
    """Data, a frozen teacher of it, and where students start: all that a distillation needs to know.

    teacher: D_phi, maybe the exact one; start: the denoiser whose weights f and s_fake begin with (on images the
    teacher itself). pairs: z and ODE(z), (P, ...) each. Noise levels in the data's own unit.
    """

    draw: Callable[[torch.Generator, int], Tensor]
    shape: tuple[int, ...]
    teacher: nn.Module
    start: Denoiser
    sigma_min: float
    sigma_max: float
    pairs: tuple[Tensor, Tensor]
    near: float  # noise up to which a point still belongs to one place of the data: L_denoise's highest
    split: Split  # what is measured on: the images' held-out part, or a draw from the mixture
    images: Images | None = None
    judge: SmallClassifier | None = None
    mixture: GaussianMixture | None = None

    def noise(self, generator: torch.Generator, n: int) -> Tensor:
        """z, (n, ...)."""
        return self.sigma_max * torch.randn(n, *self.shape, generator=generator)


def train_denoiser(
    denoiser: Denoiser, draw: Callable[[torch.Generator, int], Tensor], config: Config, *, name: str, steps: int,
    batch: int, seed: int, record: Record | None = None, **loop: Any,
) -> Denoiser:  # fmt: skip
    """Denoising score matching with EDM's weight, ln sigma ~ N(-0.5, 1.2^2); returns the weights' running mean."""

    def batch_fn(generator: torch.Generator) -> dict[str, Tensor]:
        x = draw(generator, batch)
        sigma = (1.2 * torch.randn(batch, generator=generator) - 0.5).exp().clamp(config.sigma_min, config.sigma_max)
        return {"x": x, "sigma": sigma, "noise": torch.randn(x.shape, generator=generator)}

    recipe = Recipe(
        steps=steps, lr=config.teacher_lr, warmup=0.05, schedule="cosine", clip=1.0, ema=0.99, seed=seed
    )  # fmt: skip
    fitted = fit(
        denoiser, lambda d, b: {"loss": denoising(d, b["x"], b["sigma"], b["noise"], denoiser.sigma_data)}, batch_fn,
        recipe, name=name, record=record, **loop,
    )  # fmt: skip
    assert isinstance(fitted.ema, Denoiser)
    return fitted.ema.eval().requires_grad_(False)


def _from(images: Tensor) -> Callable[[torch.Generator, int], Tensor]:
    return lambda generator, n: images[torch.randint(len(images), (n,), generator=generator)]


def train_classifier(images: Images, config: Config, record: Record | None = None, **loop: Any) -> SmallClassifier:
    """The classifier whose features and logits measure generated images; trained on the training part alone."""

    def batch_fn(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        which = torch.randint(len(images.train), (64,), generator=generator)
        x = images.train[which]
        return x + 0.3 * torch.randn(x.shape, generator=generator), images.train_labels[which]

    model = SmallClassifier(config.channels, images.classes)
    recipe = Recipe(steps=config.classifier_steps, lr=3e-3, schedule="cosine", weight_decay=0.01)
    fit(model, lambda m, b: {"loss": nn.functional.cross_entropy(m(b[0]), b[1])}, batch_fn, recipe, name="classifier",
        record=record, **loop)  # fmt: skip
    return model.eval().requires_grad_(False)


def make_pairs(world: World, config: Config, seed: int, folder: Path | None) -> World:
    """The world with z and the teacher's Heun sample from it; kept in `folder`, where a resumed run finds them."""
    path = folder / f"pairs-{seed}.safetensors" if folder else None
    if path and path.exists():
        stored = load_file(path)
        return replace(world, pairs=(stored["z"], stored["x"]))
    z = world.noise(torch.Generator().manual_seed(step_seed(seed, 0)), config.pairs)
    sigmas = karras_sigmas(config.pair_steps, world.sigma_min, world.sigma_max)
    device = next((p.device for p in world.teacher.parameters()), torch.device("cpu"))
    x = torch.cat([ode_sample(world.teacher, part.to(device), sigmas.to(device)).cpu() for part in z.split(512)])
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"z": z, "x": x}, path)
    return replace(world, pairs=(z, x))


@lru_cache(maxsize=1)
def sources(config: Config) -> tuple[Images, Denoiser | None]:
    """The images, and the teacher where it is not trained here: all that can be missing, before anything trains.

    Raises WorkbenchError: data or a model that cannot be had, or a teacher made for images of another size.
    """
    if config.model != "small":
        from workbench.models.pretrained_ddpm import load_denoiser

        teacher: Denoiser | None = load_denoiser(config.model, config.size, config.channels)  # before data are read
    else:
        teacher = None
    if config.data in ("digits", "tinted digits"):
        images = digits.load() if config.data == "digits" else digits.tinted()
    else:
        from workbench.data.images import labelled_images

        images = labelled_images(
            config.data, size=config.size, channels=config.channels, image=config.image_column,
            label=config.label_column,
        )  # fmt: skip
    return images, teacher


def image_world(config: Config, seed: int = 0, folder: Path | None = None, **loop: Any) -> World:
    """Digits (or a labelled image set) with a teacher trained here, or a DDPM from the Hub.

    folder: of the run; what is finished there is loaded. Raises WorkbenchError as `sources` does.
    """
    index = seed % config.teachers if config.teachers else seed
    images, teacher = sources(config)
    record = Record(folder / f"teacher-{index}") if folder else None
    draw = _from(images.train)
    if teacher is None:
        unet = small_unet(size=config.size, image_channels=config.channels, seed=index)
        teacher = train_denoiser(
            Denoiser(unet, images.train.std().item()), draw, config, name="teacher", steps=config.teacher_steps,
            batch=config.teacher_batch, seed=index, record=record, **loop,
        )  # fmt: skip
    world = World(
        draw=draw, shape=tuple(images.train.shape[1:]), teacher=teacher, start=teacher, sigma_min=config.sigma_min,
        sigma_max=config.sigma_max, pairs=(torch.empty(0), torch.empty(0)), near=config.denoise_max,
        split=config.split, images=images, judge=train_classifier(images, config, record, **loop),
    )  # fmt: skip
    return make_pairs(world, config, index, record.folder if record else None)


def plane_world(config: Config, folder: Path | None = None, **loop: Any) -> World:
    """Eight Gaussians crowded on a circle, the exact denoiser as teacher: the method is tested apart from a teacher.

    Networks start from a perceptron trained to denoise the same data (or from scratch, by the arm).
    """
    mixture = ring(crowding=1.4)
    record = Record(folder / "plane") if folder else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = PlaneNet()
    sigma_data = float((mixture.means.square().mean() + mixture.sd**2).sqrt())
    own = replace(config, sigma_min=0.02, sigma_max=5.0)
    start = train_denoiser(
        Denoiser(net, sigma_data), mixture.draw, own, name="start", steps=config.plane_steps, batch=256, seed=0,
        record=record, **loop,
    )  # fmt: skip
    world = World(
        draw=mixture.draw, shape=(2,), teacher=mixture, start=start, sigma_min=0.02, sigma_max=5.0,
        pairs=(torch.empty(0), torch.empty(0)), near=0.4, split=config.split, mixture=mixture,
    )  # fmt: skip
    return make_pairs(world, config, 0, record.folder if record else None)


def draw_batch(world: World, config: Config, generator: torch.Generator, n: int) -> dict[str, Tensor]:
    """All that one step draws, n each: x, z, a stored pair, L_flow's level, and noise for three terms."""
    x = world.draw(generator, n)
    pair = torch.randint(len(world.pairs[0]), (n,), generator=generator)
    grid = karras_sigmas(1000, world.sigma_min, world.sigma_max)
    return {
        "x": x, "z": world.noise(generator, n), "pair_z": world.pairs[0][pair], "pair_x": world.pairs[1][pair],
        "level": torch.randint(config.levels, (n,), generator=generator),
        "sigma": grid[torch.randint(20, 981, (n,), generator=generator)],  # DMD: the middle 2 to 98 % of the grid
        "denoise_sigma": world.near * torch.rand(n, generator=generator),
        **{f"{k}_noise": torch.randn(x.shape, generator=generator) for k in ("flow", "dmd", "denoise")},
    }  # fmt: skip


def noised(x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x_t = x + sigma_t eps."""
    return x + sigma.view(-1, *[1] * (x.dim() - 1)) * noise


def trajectory(world: World, batch: dict[str, Tensor], config: Config) -> tuple[Tensor, Tensor]:
    """x_{n+1} = x + sigma_{n+1} eps and xhat_n, one step of the teacher's flow further down."""
    grid = karras_sigmas(config.levels, world.sigma_min, world.sigma_max).to(batch["x"].device)
    high, low = grid[batch["level"]], grid[batch["level"] + 1]
    x_high = noised(batch["x"], high, batch["flow_noise"])
    with torch.no_grad():
        return x_high, ode_step(world.teacher, x_high, high, low, heun=config.heun)


def losses(
    world: World, f: nn.Module, fake: DenoiserFn | None, batch: dict[str, Tensor], arm: Arm, config: Config
) -> dict[str, Tensor]:
    """L = sum_i w_i L_i with SIGN's six terms and IGN's L_tight; a term of weight 0 is not computed.

    L_SIGN = L_rec + L_idem + l1 L_flow + l2 L_dmd + l3 L_reg + l4 L_denoise; the forms of the last four are inferred.
    L_IGN = w_r L_rec + w_i L_idem + w_t L_tight. All first applications of f are one forward pass.
    """
    w, norm = arm.weights, arm.norm
    x, bare = batch["x"], getattr(f, "module", f)
    inputs: dict[str, Tensor] = {}
    if w["rec"] or (w["tight"] and arm.clamp):
        inputs["x"] = x
    if w["idem"] or w["dmd"] or w["tight"]:
        inputs["z"] = batch["z"]
    if w["reg"]:
        inputs["pair"] = batch["pair_z"]
    if w["denoise"]:
        inputs["noisy"] = noised(x, batch["denoise_sigma"], batch["denoise_noise"])
    if w["flow"]:
        inputs["high"], low = trajectory(world, batch, config)
    out = dict(zip(inputs, f(torch.cat(list(inputs.values()))).chunk(len(inputs)), strict=True))

    terms: dict[str, Tensor] = {}
    if w["rec"]:
        terms["rec"] = ign.reconstruction(out["x"], x, norm)
    if w["idem"]:
        terms["idem"] = ign.idempotence(frozen(bare, out["z"]), out["z"], norm)
    if w["tight"]:
        fz = out["z"].detach()  # f_theta'(z)
        bound = ign.distance(out["x"], x, norm) if arm.clamp else None
        terms["tight"] = ign.tightness(f(fz), fz, bound=bound, clamp=config.ign_clamp, norm=norm)
    if w["flow"]:
        with torch.no_grad():
            terms_low = bare(low)
        terms["flow"] = sd.flow_consistency(out["high"], terms_low, norm)
    if w["dmd"]:
        assert fake is not None
        g = sd.score_difference(out["z"].detach(), batch["sigma"], batch["dmd_noise"], fake, world.teacher)
        terms["dmd"] = sd.distribution_matching(out["z"], g)
    if w["reg"]:
        terms["reg"] = sd.regression(out["pair"], batch["pair_x"], norm)
    if w["denoise"]:
        terms["denoise"] = sd.projection(out["noisy"], x, norm)
    return {"loss": torch.stack([w[name] * value for name, value in terms.items()]).sum(), **terms}


def fake_loss(f: nn.Module, fake: DenoiserFn, batch: dict[str, Tensor], sigma_data: float) -> dict[str, Tensor]:
    """Denoising score matching of s_fake on sg(f(z))."""
    with torch.no_grad():
        fz = f(batch["z"])
    return {"loss": denoising(fake, fz, batch["sigma"], batch["dmd_noise"], sigma_data)}


@dataclass
class Student:
    """A distilled f (the running mean of its weights), s_fake where there was one, and the record of the training."""

    f: Idempotent
    fake: Denoiser | None
    history: list[dict[str, Any]]
    seconds: float


def build_student(world: World, config: Config, arm: Arm, seed: int) -> Idempotent:
    """f before its first step: the start's weights, or fresh ones of the same network."""
    f = from_denoiser(world.start, config.level, skip=config.skip, normalise=config.normalise)
    if arm.scratch:
        f.net = fresh(f.net, step_seed(seed, 0, 2) % 2**31)
    return f.train()


def distil(
    world: World, config: Config, name: str = "sign", seed: int = 0, record: Record | None = None,
    watch: Callable[[int, Idempotent], None] | None = None, on_step: Callable[..., None] | None = None, **loop: Any,
) -> Student:  # fmt: skip
    """Distil one student by the arm's name. watch(step, f) sees the present weights about twelve times.

    Raises WorkbenchError for an arm whose every weight the config has set to 0.
    """
    plane = world.mixture is not None
    arm = config.arm(name, plane=plane)
    if not any(arm.weights.values()):
        raise WorkbenchError(f"the arm {name!r} has no term left: every weight it uses is 0")
    f = build_student(world, config, arm, seed)
    steps = round(arm.length * (config.plane_steps if plane else config.steps))
    size = config.plane_batch if plane else config.batch
    fake = world.start.copy().train() if arm.weights["dmd"] else None
    recipe = Recipe(
        steps=steps, lr=arm.lr, betas=(0.5, 0.99), clip=config.clip, ema=config.ema,
        precision=config.precision, save_every=config.save_every, log_every=max(1, steps // 48), seed=seed,
    )  # fmt: skip

    def logged(step: int, values: dict[str, Any]) -> None:
        if watch and (step // recipe.log_every % 4 == 0 or step == recipe.steps):
            watch(step, f)
        if on_step:
            on_step(step, values)

    aside = {}
    if fake is not None:
        aside["s_fake"] = Auxiliary(
            fake, lambda own, batch: fake_loss(f, own, batch, world.start.sigma_data), lr=config.fake_lr,
            betas=(0.5, 0.99), clip=config.clip, repeats=config.fake_steps,
        )  # fmt: skip
    fitted = fit(
        f, lambda f, batch: losses(world, f, fake, batch, arm, config),
        lambda generator: draw_batch(world, config, generator, size), recipe, name=f"{name}, seed {seed}",
        record=record, auxiliaries=aside, on_step=logged, **loop,
    )  # fmt: skip
    assert isinstance(fitted.ema, Idempotent)
    return Student(fitted.ema.eval().requires_grad_(False), fake, fitted.history, fitted.seconds)


@contextmanager
def counted(*modules: nn.Module) -> Iterator[list[int]]:
    """Within the block, the rows each module has evaluated."""
    rows = [0] * len(modules)

    def count(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Any) -> None:
            rows[i] += len(inputs[0])

        return hook

    handles = [m.register_forward_hook(count(i)) for i, m in enumerate(modules)]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def evaluations_per_step(world: World, config: Config, name: str) -> dict[str, float]:
    """Network evaluations of one step, by sample: student, teacher, s_fake (its own updates included)."""
    arm, n = config.arm(name), 4
    f = build_student(world, config, arm, 0)
    fake = world.start.copy()
    teacher = copy.deepcopy(world.teacher)  # on images the start is the teacher, and hooks must not meet
    batch = draw_batch(world, config, torch.Generator().manual_seed(0), n)
    with counted(f, teacher, fake) as rows:
        losses(replace(world, teacher=teacher), f, fake, batch, arm, config)
        if arm.weights["dmd"]:
            for _ in range(config.fake_steps):
                fake_loss(f, fake, batch, world.start.sigma_data)
    return dict(zip(("student", "teacher", "s_fake"), (r / n for r in rows), strict=True))
