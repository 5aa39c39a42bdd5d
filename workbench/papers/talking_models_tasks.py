"""Talking Models' two downstream tasks: data, the small models that learn them, where a teacher comes from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)  # fmt: skip
from transformers.utils import logging as transformers_logging

from workbench.data import ratings, shifted_digits
from workbench.data.pictures import Pictures
from workbench.data.provenance import Provenance
from workbench.errors import WorkbenchError
from workbench.models.hub import load_pretrained
from workbench.models.stages import Stages
from workbench.papers.talking_models import predict, prediction_error
from workbench.papers.talking_models_settings import Config
from workbench.training.loop import Recipe, fit
from workbench.training.record import Record

transformers_logging.disable_progress_bar()  # a bar for every small model would drown the notebook

Batch = tuple[dict[str, Tensor], Tensor]


class Examples(Protocol):
    """Inputs and targets by row."""

    def __len__(self) -> int: ...

    def take(self, rows: Tensor) -> Batch:
        """The model's keyword arguments and the targets (n,) of these rows: float for numbers, int64 for classes."""
        ...


@dataclass(frozen=True)
class Table:
    """Examples in memory: one keyword argument (n, ...) of the model, targets (n,)."""

    key: str
    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Tensor) -> Batch:
        return {self.key: self.inputs[rows]}, self.targets[rows]


@dataclass(frozen=True)
class Task:
    """One downstream task at one place of the dial. pretrain and original are None where the teacher came ready."""

    name: str
    labels: tuple[str, ...]  # classes, or () for a number
    words: tuple[str, ...]  # the vocabulary of token ids, or () for pictures
    size: int  # side of pictures in pixels, or 0
    train: Examples
    validation: Examples
    test: Examples
    pretrain: Examples | None
    original: Examples | None
    provenance: Provenance

    @property
    def unit(self) -> str:
        """Unit of the error."""
        return "error rate" if self.labels else "RMSE, stars"


def load_task(config: Config, name: str, seed: int, gap: float | None = None) -> Task:
    """The data of a task. gap: config.gap where None. Raises WorkbenchError: bad data, or own data for two tasks."""
    gap = config.gap if gap is None else gap
    if len(config.tasks) > 1 and (config.data != "built-in" or config.teacher != "small"):
        raise WorkbenchError("own data or an own teacher serve one task: say -p tasks=[ratings] or -p tasks=[vision]")
    return (_ratings if name == "ratings" else _vision)(config, seed, gap)


def _ratings(config: Config, seed: int, gap: float) -> Task:
    if config.data == "built-in":
        split = ratings.world(gap=gap, seed=seed, pretrain=30_000, train=2000, held_out=1600)
    else:
        words = None
        if config.teacher != "small":
            words = {w: i for i, w in enumerate(read_vocabulary(config.teacher))}
        split = ratings.load(config.data, genre=config.genre, seed=seed, vocabulary=words)

    def table(part: ratings.Ratings) -> Table:
        return Table("input_ids", part.ids, part.stars)

    return Task(
        "ratings", (), split.vocabulary, 0, table(split.train), table(split.validation), table(split.test),
        table(split.pretrain), table(split.original), split.provenance,
    )  # fmt: skip


def _vision(config: Config, seed: int, gap: float) -> Task:
    if config.data == "built-in":
        split = shifted_digits.load(gap=gap, seed=seed, pretrain=700, train=60, views=6, turn=30, noisy=True, looks=4)

        def table(part: shifted_digits.Images) -> Table:
            return Table("pixel_values", part.pixels, part.labels)

        return Task(
            "vision", tuple(map(str, range(shifted_digits.CLASSES))), (), shifted_digits.SIDE, table(split.train),
            table(split.validation), table(split.test), table(split.pretrain), table(split.original),
            shifted_digits.provenance(),
        )  # fmt: skip
    pictures = Pictures(config.data, image=config.image_column, label=config.label_column, size=config.image_size)
    split_of = pictures.split(seed, labelled=config.labelled, pretrain=config.teacher == "small")
    train, validation, test, pretrain, original = split_of
    return Task(
        "vision", pictures.labels, (), config.image_size, train, validation, test, pretrain, original,
        pictures.provenance,
    )  # fmt: skip


# --- models -----------------------------------------------------------------------------------------------------------


def small_model(task: Task, width: int, layers: int, patch: int, seed: int) -> PreTrainedModel:
    """A fresh ViT (pictures) or BERT over [CLS], user, item, genre (ratings) that transformers opens by itself."""
    common: dict[str, Any] = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 16,
        "intermediate_size": 2 * width, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.1 if width < 128 else 0.02, "num_labels": max(1, len(task.labels)),
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if task.words:
            config: Any = BertConfig(
                vocab_size=len(task.words), max_position_embeddings=4, type_vocab_size=1, pad_token_id=None,
                problem_type="regression", **common,
            )  # fmt: skip
            model: Any = BertForSequenceClassification(config)
            stars = task.train.take(torch.arange(len(task.train)))[1]
            # numbers far from 0 would take most of the training to reach
            nn.init.constant_(model.classifier.bias, float(stars.mean()))
            return model
        if task.size % patch:
            raise WorkbenchError(f"pictures of {task.size} px cannot be cut into patches of {patch} px")
        config = ViTConfig(
            image_size=task.size, patch_size=patch, id2label=dict(enumerate(task.labels)),
            label2id={label: i for i, label in enumerate(task.labels)}, **common,
        )  # fmt: skip
        return ViTForImageClassification(config)


def save_model(model: PreTrainedModel, folder: Path, task: Task) -> None:
    """A folder that AutoModel...from_pretrained opens; what token ids stand for is in vocabulary.json beside it."""
    model.save_pretrained(folder, safe_serialization=True)
    if task.words:
        (folder / "vocabulary.json").write_text(json.dumps(task.words, ensure_ascii=False) + "\n", encoding="utf8")


def read_vocabulary(folder: str) -> tuple[str, ...]:
    """The words of a ratings teacher by token id. Raises WorkbenchError where its folder has none."""
    path = Path(folder) / "vocabulary.json"
    try:
        return tuple(json.loads(path.read_text(encoding="utf8")))
    except (OSError, ValueError):
        raise WorkbenchError(
            f"teacher {folder!r} has no vocabulary.json: the list of [CLS], users, items and genres by token id"
        ) from None


def batches(examples: Examples, size: int) -> Any:
    """Draws `size` examples with replacement, by the loop's generator alone."""

    def draw(generator: torch.Generator) -> Batch:
        return examples.take(torch.randint(len(examples), (size,), generator=generator))

    return draw


def evaluate(model: nn.Module, examples: Examples) -> float:
    """Error (see prediction_error) of a model on all examples."""
    device = next(model.parameters()).device
    outputs, targets = [], []
    for rows in torch.arange(len(examples)).split(512):
        inputs, target = examples.take(rows)
        outputs.append(predict(model, {k: v.to(device) for k, v in inputs.items()}).cpu())
        targets.append(target)
    return prediction_error(torch.cat(outputs), torch.cat(targets))


def load_teacher(config: Config, task: Task, seed: int, folder: Path, *, random: bool = False) -> Stages:
    """The teacher, cut into stages: a small one (trained into `folder` once, then loaded), or one by Hub id or folder.

    random: the same architecture with fresh weights. Raises WorkbenchError: a model that is neither ViT nor BERT; a
    vocabulary or picture size that is not the data's.
    """
    if config.teacher == "small":
        path = folder / f"{task.name}-{seed}"
        if random:
            model = small_model(task, config.teacher_width, config.teacher_layers, config.patch, 7_000 + seed)
        else:
            if not (path / "config.json").is_file():
                train_teacher(config, task, seed, path)
            model = _open(str(path), task)
    else:
        model = _open(config.teacher, task)
        if random:
            with torch.random.fork_rng():
                torch.manual_seed(7_000 + seed)
                model = type(model)(model.config)
    return Stages(model, config.teacher_low, config.teacher_high)


def _open(id: str, task: Task) -> PreTrainedModel:
    found = load_pretrained(AutoConfig, id)
    wanted = "bert" if task.words else "vit"
    if found.model_type != wanted:
        raise WorkbenchError(f"teacher {id!r} is a {found.model_type} model; the task {task.name} takes a {wanted}")
    if task.words and found.vocab_size != len(task.words):
        raise WorkbenchError(
            f"teacher {id!r} knows {found.vocab_size} words, the data have {len(task.words)}: another vocabulary"
        )
    if task.words and found.num_labels != 1:
        raise WorkbenchError(f"teacher {id!r} predicts {found.num_labels} classes; a rating is one number")
    if not task.words and found.image_size != task.size:
        raise WorkbenchError(
            f"teacher {id!r} takes pictures of {found.image_size} px, the data have {task.size}: say "
            f"-p image_size={found.image_size}"
        )
    cls = BertForSequenceClassification if task.words else ViTForImageClassification
    return load_pretrained(cls, id, dtype=torch.float32)


def knows_labels(model: Any, task: Task) -> bool:
    """Whether the teacher's own head predicts the task's classes, in the task's order (a rating it always does)."""
    names = tuple(str(model.config.id2label[i]) for i in range(model.config.num_labels))
    return not task.labels or names == task.labels


def train_teacher(config: Config, task: Task, seed: int, path: Path) -> None:
    """Pre-train a small teacher on its own broad data, never on a downstream example, and save it to `path`."""
    if task.pretrain is None:
        raise WorkbenchError("there is nothing to pre-train a small teacher on: name one with -p teacher=FOLDER")
    model = small_model(task, config.teacher_width, config.teacher_layers, config.patch, seed)
    stages = Stages(model, config.teacher_low, config.teacher_high)
    recipe = Recipe(
        steps=config.teacher_steps, lr=3e-3, weight_decay=0.05, warmup=0.1, schedule="cosine", clip=1.0, seed=seed,
        precision=config.precision, save_every=config.save_every,
    )  # fmt: skip

    def loss(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        inputs, target = batch
        out = model(inputs)
        if target.is_floating_point():
            return {"loss": F.mse_loss(out[:, 0].float(), target)}
        return {"loss": F.cross_entropy(out.float(), target)}

    record = Record(path.parent / f"{path.name}-training")
    fit(stages.train(), loss, batches(task.pretrain, 96), recipe, name="teacher", record=record, progress=False)
    save_model(model.eval(), path, task)


def fit_probe(teacher: Stages, task: Task, *, limit: int = 5000) -> nn.Linear:
    """A linear map from the teacher's mean higher state to the downstream targets, fitted on the training examples.

    scikit-learn's logistic or ridge regression on standardised features; at most `limit` examples.
    """
    from sklearn.linear_model import LogisticRegression, RidgeCV

    states, targets = states_of(teacher, task.train, limit)
    x, y = states.mean(1).double().numpy(), targets.numpy()
    centre, scale = x.mean(0), x.std(0) + 1e-6
    z = (x - centre) / scale
    if task.labels:
        fitted: Any = LogisticRegression(C=0.1, max_iter=500).fit(z, y)
        weight = np.zeros((len(task.labels), x.shape[1]))
        bias = np.full(len(task.labels), -20.0)  # a class that was never seen is not proposed
        rows = fitted.classes_ if len(fitted.classes_) > 2 else fitted.classes_[1:]
        weight[rows], bias[rows] = fitted.coef_, fitted.intercept_
        if len(fitted.classes_) == 2:
            bias[fitted.classes_[0]] = 0.0
    else:
        fitted = RidgeCV(np.logspace(-1, 4, 11)).fit(z, y)
        weight, bias = fitted.coef_[None], np.array([fitted.intercept_])
    probe = nn.Linear(x.shape[1], len(weight))
    with torch.no_grad():
        probe.weight.copy_(torch.from_numpy(weight / scale))
        probe.bias.copy_(torch.from_numpy(bias - (weight * (centre / scale)).sum(1)))
    return probe


@torch.no_grad()
def states_of(model: Stages, examples: Examples, limit: int = 5000, which: str = "high") -> tuple[Tensor, Tensor]:
    """States (n, N, D), "low" or "high", and targets (n,) of the first `limit` examples."""
    found, targets = [], []
    device = next(model.parameters()).device
    for rows in torch.arange(min(limit, len(examples))).split(256):
        inputs, target = examples.take(rows)
        state = model.low({k: v.to(device) for k, v in inputs.items()})
        found.append((state if which == "low" else model.mid(state)).cpu())
        targets.append(target)
    return torch.cat(found), torch.cat(targets)


def at_gaps(config: Config) -> Sequence[float]:
    """Every place of the dial a run visits, the main one first; own data lie where they lie, at one place."""
    return list(dict.fromkeys([config.gap, *(config.gaps if config.data == "built-in" else ())]))
