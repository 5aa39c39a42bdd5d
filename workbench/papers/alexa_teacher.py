"""Alexa Teacher Model (FitzGerald et al., KDD 2022, arXiv 2206.07808): staged pre-training, distillation, fine-tuning.

Symbols: x~ the masked input, M the chosen positions, z (|M|, V) logits there, q_T = softmax(z_T / tau), a the weight of
L_mlm, b that of matching hidden states. Stage 1 reads public text (70 % of it in spoken form), stage 2 the assistant's
own utterances; a student is distilled on the same masked batches that its frozen teacher sees.
What the paper does not print (a, tau, learning rates) is marked in the settings and in the notebook.
"""

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from workbench.data.commands import Utterance
from workbench.data.masked_text import masked_batch, trim
from workbench.data.public_text import PublicText
from workbench.data.utterances import Encoded, Labels, encode_utterances
from workbench.errors import WorkbenchError
from workbench.evaluation.understanding import (
    Understood,
    averaged,
    bootstrap_change,
    repaired,
    spans,
    understood,
)
from workbench.losses.knowledge import feature_kd, logit_kd
from workbench.models.encoders import (
    IntentSlotModel,
    MaskedEncoder,
    build_encoder,
    encoder_config,
    encoder_of,
    intent_slot_loss,
    load_encoder,
    parameter_counts,
    save_encoder,
)
from workbench.papers.alexa_teacher_bench import bench
from workbench.papers.alexa_teacher_claims import CLAIMS, COMPARED, claim_values
from workbench.papers.alexa_teacher_settings import (
    ABOUT,
    ARMS,
    ARXIV,
    AUTHORS,
    NOTEBOOK,
    PRESETS,
    TITLE,
    ArmName,
    Config,
)  # fmt: skip
from workbench.papers.alexa_teacher_world import World, load_public, load_world
from workbench.training.loop import Recipe, fit, step_seed
from workbench.training.pool import map_jobs
from workbench.training.record import Record

__all__ = ["ABOUT", "ARXIV", "AUTHORS", "CLAIMS", "NOTEBOOK", "PRESETS", "TITLE", "Config", "bench"]


# --- pre-training and distillation ----------------------------------------------------------------------------------


def layer_map(student: int, teacher: int) -> list[int]:
    """g(k): which of `teacher` layers each of `student` layers is matched with, evenly spaced, last with last."""
    return [(k + 1) * teacher // student - 1 for k in range(student)]


def pretraining_losses(
    student: Any, teacher: MaskedEncoder | None, batch: dict[str, Tensor], config: Config
) -> dict[str, Tensor]:
    """L = a L_mlm + (1 - a) L_soft + b L_hidden on one masked batch; without a teacher L = L_mlm.

    L_mlm = -mean_{t in M} log p_S(x_t | x~). L_soft is tau^2 KL(q_T || p_S), whose gradient is that of the paper's
    soft cross-entropy (they differ by the teacher's entropy). Both are means over the chosen positions of the batch:
    nothing is computed anywhere else. The teacher sees the same x~ and gets no gradient.
    """
    chosen = batch["chosen"]
    z, states = student(batch["ids"], batch["attention"], chosen)
    mlm = F.cross_entropy(z.float(), batch["targets"][chosen])
    if teacher is None:
        return {"loss": mlm, "mlm": mlm}
    with torch.no_grad():
        wanted, theirs = teacher(batch["ids"], batch["attention"], chosen)
    soft = logit_kd(z, wanted, temperature=config.tau)
    loss = config.mlm * mlm + (1 - config.mlm) * soft
    if not config.hidden:
        return {"loss": loss, "mlm": mlm, "soft": soft}
    bare = getattr(student, "module", student)
    matched = zip(states, bare.projections, layer_map(len(states), len(theirs)), strict=True)
    hidden = torch.stack([feature_kd(p(h), theirs[g], normalise=False) for h, p, g in matched]).sum()
    return {"loss": loss + config.hidden * hidden, "mlm": mlm, "soft": soft, "hidden": hidden}


def pretrain(
    config: Config, world: World, name: ArmName, net: Any, teacher: Any = None, *, seed: int,
    record: Record | None = None, **loop: Any,
) -> Any:  # fmt: skip
    """Train one arm's masked-LM network (in place) on its text, with its teacher; returns it in eval mode.

    Raises WorkbenchError when teacher and student do not share a vocabulary: their logits would name other tokens.
    """
    arm = ARMS[name]
    if teacher is not None and teacher.config.vocab_size != net.config.vocab_size:
        raise WorkbenchError(
            f"the teacher has {teacher.config.vocab_size} tokens, the student {net.config.vocab_size}: "
            "distillation needs one vocabulary"
        )
    frozen = None
    if teacher is not None:
        frozen = MaskedEncoder(teacher, hidden=bool(config.hidden)).requires_grad_(False)
        frozen.train(config.teacher_mode == "train")  # eval: its dropout is off
        frozen.to("cuda" if torch.cuda.is_available() else "cpu")
    width = int(teacher.config.hidden_size) if teacher is not None and config.hidden else None
    steps, lr = config.student_steps, config.student_lr
    if arm.role == "teacher":
        steps = config.stage1_steps if name == "stage 1" else config.stage2_steps
        lr = config.stage2_lr if arm.start else config.lr
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MaskedEncoder(net, hidden=width is not None, teacher_width=width)
    recipe = Recipe(
        steps=steps, lr=lr, weight_decay=0.01, betas=(0.9, 0.98), clip=1.0, warmup=0.06, schedule="cosine",
        accumulate=config.accumulate, precision=config.precision, seed=seed, save_every=config.save_every,
    )  # fmt: skip
    text = config.second_text if name.startswith("stage 2") else arm.text
    fit(
        model.train(), lambda m, batch: pretraining_losses(m, frozen, batch, config),
        world.batches(config, text, arm.share), recipe, name=name, record=record, **loop,
    )  # fmt: skip
    return net.eval()


def needed(arms: Sequence[ArmName]) -> list[ArmName]:
    """The arms and all they start from or learn from, in an order in which each comes after what it needs."""
    wanted: set[ArmName] = set()
    todo = list(arms)
    while todo:
        name = todo.pop()
        wanted.add(name)
        todo += [a for a in (ARMS[name].start, ARMS[name].teacher) if a and a not in wanted]
    return [name for name in ARMS if name in wanted]


def train_arm(
    config: Config, world: World, name: ArmName, nets: dict[ArmName, Any], *, seed: int, record: Record | None = None,
    **loop: Any,
) -> Any:  # fmt: skip
    """One arm's encoder, trained (or loaded where `record` holds it finished). nets: the arms it needs, trained."""
    arm = ARMS[name]
    if config.teacher and arm.role == "teacher":
        net = (
            load_encoder(config.teacher)[0]
            if name in ("stage 1", "stage 2 alone")
            else copy.deepcopy(nets[cast(ArmName, arm.start)])
        )
        if name == "stage 1":
            return net.eval()
    elif arm.start:
        net = copy.deepcopy(nets[arm.start])
    else:
        size = {"teacher": config.teacher_size, "intermediate": config.intermediate_size}.get(
            arm.role, config.student_size
        )
        shape = encoder_config(
            size, world.tokenizer, context=config.context, dropout=config.dropout, spread=config.spread
        )
        shape.vocab_size = max(shape.vocab_size, *(n.config.vocab_size for n in nets.values()), 0)
        net = build_encoder(shape, step_seed(seed, 0))
    if arm.text == "none":
        return net.eval()
    return pretrain(
        config, world, name, net, nets[arm.teacher] if arm.teacher else None, seed=seed, record=record, **loop
    )


@torch.no_grad()
def held_out_nll(net: Any, rows: Tensor, world: World, rate: float, batch: int = 128) -> float:
    """L_mlm in nats a chosen token on rows (N, T) that no training saw; the same masks for every network."""
    generator = torch.Generator().manual_seed(1)
    model = MaskedEncoder(net).eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for part in rows.split(batch):
        b = masked_batch(trim(list(part), world.vocabulary.pad), world.vocabulary, generator, rate)
        b = {key: value.to(device) for key, value in b.items()}
        z, _ = model(b["ids"], b["attention"], b["chosen"])
        total += float(F.cross_entropy(z.float(), b["targets"][b["chosen"]], reduction="sum"))
        count += int(b["chosen"].sum())
    return total / count


# --- fine-tuning ----------------------------------------------------------------------------------------------------


def fine_tune(
    config: Config, world: World, net: Any, *, seed: int, frozen: bool = False, labels: int | None = None,
    name: str = "fine-tune", record: Record | None = None, **loop: Any,
) -> IntentSlotModel:  # fmt: skip
    """Intent classification and slot filling on the labelled utterances, on a copy of the encoder.

    Every encoder gets the same heads, batches and steps. frozen: only the heads learn. labels: the first so many
    labelled utterances of each language (None: all).
    """
    data = world.encoded["labelled"]
    tongues = [u.language for u in world.labelled]
    kept = torch.tensor([i for i, own in enumerate(tongues) if labels is None or tongues[:i].count(own) < labels])
    model = IntentSlotModel(
        copy.deepcopy(encoder_of(net)), len(world.labels.intents), len(world.labels.tags), hidden=config.heads,
        pooling=config.pooling, frozen=frozen, seed=step_seed(seed, 0, 1),
    )  # fmt: skip
    recipe = Recipe(
        steps=config.tune_steps, lr=config.tune_lr, weight_decay=0.01, clip=1.0, warmup=0.06, schedule="cosine",
        precision=config.precision, seed=seed,
    )  # fmt: skip

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        rows = kept[torch.randint(len(kept), (config.tune_batch,), generator=generator)]
        ids = data.ids[rows]
        width = int((ids != world.vocabulary.pad).sum(1).max())
        return {"ids": ids[:, :width], "intents": data.intents[rows], "tags": data.tags[rows, :width]}

    def loss(m: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        intent, slot = m(batch["ids"], (batch["ids"] != world.vocabulary.pad).long())
        return intent_slot_loss(intent, slot, batch["intents"], batch["tags"], config.slot_weight)

    fit(model.train(), loss, draw, recipe, name=name, record=record, **loop)
    return model.eval()


@torch.no_grad()
def predict(model: IntentSlotModel, data: Encoded, labels: Labels, pad: int) -> tuple[list[str], list[list[str]]]:
    """Intent and BIO tags (one a word, read off the word's first piece) of every utterance."""
    device = next(model.parameters()).device
    intents: list[str] = []
    tags: list[list[str]] = []
    for ids, first in zip(data.ids.split(256), data.first.split(256), strict=True):
        intent, slot = model(ids.to(device), (ids != pad).long().to(device))
        intents += [labels.intents[i] for i in intent.argmax(-1).tolist()]
        for row, places in zip(slot.argmax(-1).cpu(), first, strict=True):
            tags.append(repaired([labels.tags[i] for i in row[places[places >= 0]].tolist()]))
    return intents, tags


def evaluate(model: IntentSlotModel, world: World) -> dict[str, Understood]:
    """The scores on every test set."""
    out = {}
    for name, utterances in world.tests.items():
        intents, tags = predict(model, world.encoded[name], world.labels, world.vocabulary.pad)
        gold = [u.intent for u in utterances]
        out[name] = understood([u.words for u in utterances], (gold, intents), ([u.tags for u in utterances], tags))
    return out


def tuned_scores(
    config: Config, world: World, net: Any, *, seed: int, name: str, record: Record | None = None, **kind: Any
) -> dict[str, Understood]:  # fmt: skip
    """The scores on every test set, averaged over config.tunes fine-tunings; kind: fine_tune's frozen or labels.

    Heads and batches differ from one fine-tuning to the next, and are the same for every encoder.
    """
    runs = []
    for r in range(config.tunes):
        label = f"{name}, again {r}" if r else name
        model = fine_tune(config, world, net, seed=seed + 1000 * r, name=label, record=record, progress=False, **kind)
        runs.append(evaluate(model, world))
    return {test: averaged([run[test] for run in runs]) for test in runs[0]}


def parse(model: IntentSlotModel, world: World, text: str, language: str) -> dict[str, Any]:
    """What a fine-tuned model makes of a sentence: spoken words, intent probabilities (I,), slot probabilities (W, K).

    Raises WorkbenchError for a sentence without words.
    """
    from workbench.data.spoken import LANGUAGES, spoken

    words = tuple((spoken(text, language) if language in LANGUAGES else text.lower()).split())
    if not words:
        raise WorkbenchError("type a sentence with at least one word")
    one = Utterance(words, ("O",) * len(words), world.labels.intents[0], language)
    data = encode_utterances([one], world.tokenizer, world.labels, 10**6)
    limit = int(getattr(model.encoder.config, "max_position_embeddings", 10**6)) - world.vocabulary.pad - 1
    if data.ids.shape[1] > limit:
        raise WorkbenchError(f"the sentence has {data.ids.shape[1]} tokens, the encoder takes {limit}")
    with torch.no_grad():
        intent, slot = model(data.ids, torch.ones_like(data.ids))
    tags = repaired([world.labels.tags[i] for i in slot[0, data.first[0]].argmax(-1).tolist()])
    found = [(label, " ".join(words[a:b])) for label, a, b in spans(tags)]
    return {"words": words, "intent": intent[0].softmax(-1), "slots": slot[0, data.first[0]].softmax(-1),
            "tags": tags, "spans": found}  # fmt: skip


def save_understanding(model: IntentSlotModel, world: World, folder: Path) -> Path:
    """The fine-tuned encoder as a folder AutoModel opens, its heads (heads.safetensors) and their labels.json."""
    save_encoder(model.encoder, world.tokenizer, folder)
    heads = {key: t.contiguous() for key, t in model.state_dict().items() if not key.startswith("encoder.")}
    save_file(heads, folder / "heads.safetensors")
    labels = dataclasses.asdict(world.labels) | {"pooling": model.pooling}
    (folder / "labels.json").write_text(json.dumps(labels, ensure_ascii=False) + "\n")
    return folder


# --- the study ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """All arms of one seed, in whatever process."""

    config: Config
    seed: int
    folder: Path
    public: PublicText | None = None

    @property
    def record(self) -> Record:
        return Record(self.folder / "seeds" / str(self.seed))

    def model(self, name: str) -> Path:
        """Folder of an arm's encoder."""
        return self.folder / "models" / f"seed-{self.seed}" / name.replace(" ", "-")


def measure_seed(job: Job) -> dict[str, Any]:
    """Train, save, fine-tune and score every arm of a seed. {"arms": {name: measures}, "changes": intervals}."""
    config, seed, record = job.config, job.seed, job.record
    world = load_world(config, seed, job.public)
    nets: dict[ArmName, Any] = {}
    arms: dict[str, dict[str, Any]] = {}
    raw: dict[str, Understood] = {}
    for name in needed(config.arms):
        net = nets[name] = train_arm(config, world, name, nets, seed=seed, record=record, progress=False)
        save_encoder(net, world.tokenizer, job.model(name))
        measures: dict[str, Any] = {"parameters": parameter_counts(net), "arm": name}
        measures["nll"] = {text: held_out_nll(net, rows, world, config.rate) for text, rows in world.held_out.items()}
        tune = partial(tuned_scores, config, world, net, seed=seed, record=record)
        for frozen in (False, True) if name in config.frozen else (False,):
            kind = "frozen" if frozen else "tuned"
            scores = tune(frozen=frozen, name=f"{name}, {kind}")
            measures[kind] = {test: u.scores() for test, u in scores.items()}
            if not frozen:
                raw[name] = scores["covered"]
        if name in config.label_arms:
            measures["labels"] = {}
            for count in (n for n in config.label_counts if n < config.labels):
                scores = tune(labels=count, name=f"{name}, {count} labels")
                measures["labels"][str(count)] = {test: u.scores() for test, u in scores.items()}
        arms[name] = measures
    changes = {
        f"{new} / {base}": list(bootstrap_change(raw[new], raw[base], seed=seed))
        for new, base in COMPARED if new in raw and base in raw
    }  # fmt: skip
    return {"arms": arms, "changes": changes}


def study(
    config: Config, folder: Path, record: Record, seed: int = 0, public: PublicText | None = None
) -> dict[int, Any]:
    """Every arm for every seed (two cores: two seeds at a time); stores what the claims are judged by.

    Returns {seed: measures}. Seeds measured in an earlier sitting of the same run are not repeated.
    """
    seeds = range(seed, seed + config.seeds)
    known = {r["seed"]: r["measures"] for r in record.records("seed")}
    todo = [s for s in seeds if s not in known]
    public = public or (load_public(config) if todo else None)
    jobs = [Job(config, s, folder, public) for s in todo]
    done = map_jobs(measure_seed, jobs, workers=config.workers or None, record=record, text="seeds")
    for s, measures in zip(todo, done, strict=True):
        known[s] = measures
        record.write("seed", seed=s, measures=measures)
        for measure, value in claim_values(measures["arms"]).items():
            record.result(measure, value, seed=s)
    return {s: known[s] for s in seeds}
