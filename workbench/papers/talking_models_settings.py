"""What a Talking Models run can be told (parameters, presets, arms) and what it is judged by (claims)."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from workbench.config import Param, config
from workbench.evaluation.claims import Claim

TITLE = "Talking Models: Distill Pre-trained Knowledge to Downstream Models via Interactive Communication"
AUTHORS = "Zhe Zhao, Qingyun Liu, Huan Gui, Bang An, Lichan Hong, Ed H. Chi"
ARXIV = "2310.03188"
ABOUT = (
    "Teacher and student each learn to put their hidden states into messages and to read any message back. The student "
    "asks about the downstream input, the teacher thinks with its pre-trained layers and replies."
)
NOTEBOOK = "06_talking_models.ipynb"

TaskName = Literal["ratings", "vision"]
Arm = Literal[
    "alone", "logit KD", "probe KD", "feature KD", "one-way", "two-way", "no MC", "no SC", "2 rounds", "3 rounds",
    "random teacher", "adapting teacher",
]  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What one arm does: which knowledge it takes from the teacher, with which weights and which teacher."""

    method: Literal["alone", "logits", "probe", "features", "messages"]
    kd: float = 0.0  # weight of logit or feature distillation
    w1: float = 0.0  # of L_interact
    w2: float = 0.0  # of L_MC
    w3: float = 0.0  # of L_SC
    rounds: int = 1
    two_way: bool = True  # False: the teacher replies from its own reading of x; nobody asks
    frozen: bool = True
    random: bool = False


@dataclass(frozen=True)
class Tuned:
    """Loss weights of a task, from a small grid an arm on one tuning seed, near the desk preset's steps and gap."""

    logits: float
    probe: float
    features: float
    one_way: tuple[float, float, float]
    two_way: tuple[float, float, float]


# Validation errors of tuning seed 100 at 160 steps. Ratings (stars RMSE, gap .5; alone 1.010): logit KD .928 .920 at
# weights 1 3, feature KD .956 .959; two-way .952 .942 at w2 = .1 1 with w1 = w3 = .1 (.941 at 1 1 1 and L_MC on both
# depths), one-way .946 .940. Vision (error rate, gap .35; alone .41): logit KD .612 .408 at 1 .3, probe KD .392 .380,
# feature KD .404 at .3; two-way .392 .428 at w2 = .1 1, one-way .424 at 1. Ratings' probe was not tuned by itself.
TUNED: dict[str, Tuned] = {
    "ratings": Tuned(logits=3.0, probe=3.0, features=1.0, one_way=(0.1, 1.0, 0.1), two_way=(0.1, 1.0, 0.1)),
    "vision": Tuned(logits=0.3, probe=0.3, features=0.3, one_way=(0.1, 0.1, 0.1), two_way=(0.1, 0.1, 0.1)),
}


@config
class Config:
    """Everything a run depends on besides its seed."""

    tasks: Annotated[tuple[TaskName, ...], Param("downstream tasks", min_length=1)] = ("ratings", "vision")
    arms: Annotated[tuple[Arm, ...], Param("which students to train", min_length=1)] = ("alone", "logit KD", "two-way")
    seeds: Annotated[int, Param("students of each arm, seeds counted from the run's seed", ge=1)] = 1
    gap: Annotated[float, Param("distance of the downstream task from the teacher's (0: none, 1: far)", ge=0, le=1)] = (
        0.4
    )
    gaps: Annotated[tuple[float, ...], Param("further places of the dial, for the arms in gap_arms")] = ()
    gap_arms: Annotated[tuple[Arm, ...], Param("arms that are trained at every place of the dial")] = (
        "alone",
        "logit KD",
        "two-way",
    )
    teacher: Annotated[str, Param('"small" (trained here), or a ViT or BERT classifier by Hub id or folder')] = "small"
    teacher_width: Annotated[int, Param("width of a small teacher", ge=16, multiple_of=16)] = 64
    teacher_layers: Annotated[int, Param("its layers", ge=2)] = 3
    teacher_low: Annotated[int, Param("l_T: layers before the teacher's lower state", ge=0)] = 1
    teacher_high: Annotated[int, Param("h_T: layers before its higher state", ge=1)] = 3
    teacher_steps: Annotated[int, Param("optimiser steps of a small teacher", unit="steps", ge=1)] = 400
    student_width: Annotated[int, Param("width of the student", ge=16, multiple_of=16)] = 16
    student_layers: Annotated[int, Param("its layers", ge=1)] = 2
    student_low: Annotated[int, Param("l_S: layers before the student's lower state", ge=0)] = 1
    student_high: Annotated[int, Param("h_S: layers before its higher state", ge=1)] = 2
    message: Annotated[int, Param("k: width of a message", ge=1)] = 32
    voice: Annotated[int, Param("hidden width of encoders and decoders", ge=1)] = 64
    rounds: Annotated[int, Param("N: rounds of the arms that do not fix them", ge=1, le=8)] = 1
    w1: Annotated[float | None, Param("weight of L_interact (none: as tuned)", ge=0)] = None
    w2: Annotated[float | None, Param("weight of L_MC (none: as tuned)", ge=0)] = None
    w3: Annotated[float | None, Param("weight of L_SC (none: as tuned)", ge=0)] = None
    kd: Annotated[float | None, Param("weight of logit and feature distillation (none: as tuned)", ge=0)] = None
    temperature: Annotated[float, Param("of logit distillation (classes only)", gt=0)] = 4.0
    stop: Annotated[Literal["none", "reply", "student"], Param("side of L_interact that gets no gradient")] = "none"
    distance: Annotated[
        Literal["correlation", "layer norm"], Param("d: over the batch, or of every state by itself")
    ] = "correlation"
    mc_high: Annotated[bool, Param("L_MC also between the higher states' messages")] = False
    teacher_rate: Annotated[float, Param("an adapting teacher's learning rate, as a share of the student's", gt=0)] = (
        0.1
    )
    steps: Annotated[int, Param("optimiser steps of a student", unit="steps", ge=1)] = 120
    batch: Annotated[int, Param("examples a step", unit="examples", ge=2)] = 48
    lr: Annotated[float, Param("peak learning rate (AdamW, cosine)", gt=0)] = 3e-3
    decay: Annotated[float, Param("weight decay", ge=0)] = 0.1
    precision: Annotated[Literal["no", "bf16", "fp16"], Param("mixed precision")] = "no"
    save_every: Annotated[int | None, Param("steps between checkpoints", unit="steps", ge=1)] = None
    data: Annotated[str, Param('"built-in", or own ratings or pictures by folder or Hub id (one task only)')] = (
        "built-in"
    )
    genre: Annotated[str, Param("downstream genre of own ratings (empty: the most rated)")] = ""
    image_column: Annotated[str, Param("column of own pictures")] = "image"
    label_column: Annotated[str, Param("column of their classes")] = "label"
    image_size: Annotated[int, Param("side of own pictures", unit="px", ge=8)] = 32
    patch: Annotated[int, Param("patch side of small models", unit="px", ge=1)] = 4
    labelled: Annotated[int, Param("own pictures the student learns from (0: all)", unit="images", ge=0)] = 0
    workers: Annotated[int, Param("students trained at the same time (0: one a core)", ge=0)] = 0

    def setup(self, task: str, arm: str) -> Setup:
        """What an arm does on a task: the tuned weights, unless this config names others."""
        tuned = TUNED[task]

        def given(own: float | None, usual: float) -> float:
            return usual if own is None else own

        def talk(weights: tuple[float, float, float], two_way: bool = True) -> Setup:
            w1, w2, w3 = (given(o, u) for o, u in zip((self.w1, self.w2, self.w3), weights, strict=True))
            return Setup("messages", w1=w1, w2=w2, w3=w3, rounds=self.rounds if two_way else 1, two_way=two_way)

        full = talk(tuned.two_way)
        return {
            "alone": Setup("alone"),
            "logit KD": Setup("logits", kd=given(self.kd, tuned.logits)),
            "probe KD": Setup("probe", kd=given(self.kd, tuned.probe)),
            "feature KD": Setup("features", kd=given(self.kd, tuned.features)),
            "one-way": talk(tuned.one_way, two_way=False),
            "two-way": full,
            "no MC": replace(full, w2=0.0),
            "no SC": replace(full, w3=0.0),
            "2 rounds": replace(full, rounds=2),
            "3 rounds": replace(full, rounds=3),
            "random teacher": replace(full, random=True),
            "adapting teacher": replace(full, frozen=False),
        }[arm]


_ALL: tuple[Arm, ...] = (
    "alone", "logit KD", "probe KD", "feature KD", "one-way", "two-way", "no MC", "2 rounds", "random teacher",
    "adapting teacher",
)  # fmt: skip
_FULL_VISION: dict[str, Any] = {
    "tasks": ("vision",), "teacher": "google/vit-base-patch16-224-in21k", "data": "uoft-cs/cifar10",
    "image_column": "img", "image_size": 224, "patch": 16, "teacher_low": 4, "teacher_high": 10, "student_width": 192,
    "student_layers": 4, "student_low": 1, "student_high": 3, "message": 128, "voice": 512, "steps": 35_000,
    "batch": 128, "lr": 1e-3, "decay": 0.05, "precision": "bf16", "save_every": 1000, "seeds": 5,
    "arms": ("alone", "probe KD", "feature KD", "one-way", "two-way", "no MC", "no SC", "2 rounds", "random teacher"),
}  # fmt: skip
PRESETS = {
    "quick": Config(
        arms=("alone", "logit KD", "one-way", "two-way", "no MC"), steps=60, teacher_steps=150, gaps=(1.0,)
    ),
    "desk": Config(arms=_ALL, seeds=4, gaps=(0.0, 1.0)),
    "full": Config(**_FULL_VISION),
    # MovieLens may not be passed on: give -p data=FOLDER, the unpacked ml-100k
    "full-ratings": Config(
        tasks=("ratings",), data="ml-100k", teacher_width=128, teacher_layers=4, teacher_low=1, teacher_high=3,
        teacher_steps=10_000, student_width=16, message=64, voice=128, steps=3_000, batch=256, lr=1e-3, arms=_ALL,
        seeds=5,
    ),
}  # fmt: skip


def _claim(
    id: str, sentence: str, task: str, direction: Literal[">=", "<="], margin: float, *, figure: str = "n/a",
    source: str = "", unit: str = "",
) -> Claim:  # fmt: skip
    table = {"ratings": "Table 3, RMSE", "vision": "Table 4, accuracy"}[task]
    name = f"{id}_{task}"
    return Claim(
        name, f"{sentence} ({task})", figure, f"{source or table} (values not readable)", name,
        unit or {"ratings": "stars RMSE", "vision": "error rate"}[task], direction, margin,
    )  # fmt: skip


_TASKS = ("ratings", "vision")
_FIRST = "the full method comes first"
# Margins were set before any judging seed. Tuning seed 101 at the desk preset's settings gave, ratings then vision:
# kd_gain .067, -.027; talk_gain .035, .056; over_kd -.032, .083; knowledge .000, .056 (100: .018,
# -.013). No seed of ours decided question, over_hint and gap, so that their margin is 0, the sign of the paper's
# statement; consistency's 1.5 comes from the tiny study in the tests (seeds 100 to 102).
CLAIMS: tuple[Claim, ...] = (
    *(_claim("kd_gain", "Logit distillation beats the student alone: error saved", t, ">=", m, figure="KD helps")
      for t, m in zip(_TASKS, (0.02, 0.0), strict=True)),
    *(_claim("talk_gain", "Two-way communication beats the student alone: error saved", t, ">=", m, figure=_FIRST)
      for t, m in zip(_TASKS, (0.01, 0.02), strict=True)),
    *(_claim("over_kd", "It beats logit distillation: error saved", t, ">=", 0.0, figure=_FIRST) for t in _TASKS),
    *(_claim("over_hint", "It beats feature distillation: error saved", t, ">=", 0.0, figure=_FIRST) for t in _TASKS),
    *(_claim("question", "The question matters: error saved over one-way messages", t, ">=", 0.0, figure=_FIRST)
      for t in _TASKS),
    *(_claim("knowledge", "What helps is the teacher's knowledge: error saved over a random teacher", t, ">=", 0.0,
             figure="not tested", source="reviewers' question") for t in _TASKS),
    *(_claim("consistency", "L_MC makes both word one input alike: message distance, without over with", t, ">=", 1.5,
             figure="small effect on the task", source="ablation", unit="x") for t in _TASKS),
    *(_claim("gap", "The gain over logit distillation grows with the gap: far end minus near end", t, ">=", 0.0,
             figure="the motivation", source="abstract") for t in _TASKS),
)  # fmt: skip
