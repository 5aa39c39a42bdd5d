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
    lr: float = 3e-3  # peak learning rate


# (Loss weights, peak learning rate) of an arm. One grid for every arm and task at the desk preset's steps and gap:
# weights .1 .3 1 3 at rate .003 (messages: w1 = w2 = w3), then rates .001 and .006 at the best of them, chosen by the
# mean VALIDATION error of tuning seeds 100 and 101; here weight by weight, then rate by rate.
# Ratings (stars RMSE): alone at rates .003 .001 .006 1.011 .996 1.011; logit KD 1.001 .985 .965 .953, .961 .953; probe
# KD 1.002 .988 .969 .957, .966 .956; feature KD 1.005 .990 .973 .960, 1.019 .973; one-way .965 .979 .984 .985, .974
# .980; two-way .977 .964 .966 .975, .995 .968.
# Vision (error rate): alone .356 .404 .340; logit KD .334 .334 .354 .398, .412 .304; probe KD .344 .334 .314 .338, .398
# .314; feature KD .358 .326 .330 .350, .394 .302; one-way .322 .310 .300 .378, .450 .294; two-way .346 .332 .316 .430,
# .440 .278.
# Tried for two-way alone and not taken, ratings then vision: w2 / 10 1.001 .302; 3 w1 .959 .358; L_MC on both depths
# .957 .282; k 64 with voices of 128 .979 .288; l_T 0 .969 .330, l_T 2 .955 .274, which one-way (.966 .320) dislikes.
TUNED: dict[str, dict[str, tuple[tuple[float, ...], float]]] = {
    "ratings": {
        "alone": ((), 1e-3), "logit KD": ((3.0,), 6e-3), "probe KD": ((3.0,), 6e-3), "feature KD": ((3.0,), 3e-3),
        "one-way": ((0.1, 0.1, 0.1), 3e-3), "two-way": ((0.3, 0.3, 0.3), 3e-3),
    },
    "vision": {
        "alone": ((), 6e-3), "logit KD": ((0.3,), 6e-3), "probe KD": ((1.0,), 3e-3), "feature KD": ((0.3,), 6e-3),
        "one-way": ((1.0, 1.0, 1.0), 6e-3), "two-way": ((1.0, 1.0, 1.0), 6e-3),
    },
}  # fmt: skip


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
    lr: Annotated[float | None, Param("peak learning rate (AdamW, cosine; none: as tuned)", gt=0)] = None
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

        def given(own: float | None, usual: float) -> float:
            return usual if own is None else own

        def tuned(method: Literal["alone", "logits", "probe", "features", "messages"], name: str) -> Setup:
            weights, lr = TUNED[task][name]
            if method == "messages":
                w1, w2, w3 = (given(o, u) for o, u in zip((self.w1, self.w2, self.w3), weights, strict=True))
                return Setup(method, w1=w1, w2=w2, w3=w3, rounds=self.rounds, lr=given(self.lr, lr))
            return Setup(method, kd=sum(given(self.kd, w) for w in weights), lr=given(self.lr, lr))

        full = tuned("messages", "two-way")
        return {
            "alone": tuned("alone", "alone"),
            "logit KD": tuned("logits", "logit KD"),
            "probe KD": tuned("probe", "probe KD"),
            "feature KD": tuned("features", "feature KD"),
            "one-way": replace(tuned("messages", "one-way"), two_way=False, rounds=1),
            "two-way": full,
            "no MC": replace(full, w2=0.0),
            "no SC": replace(full, w3=0.0),
            "2 rounds": replace(full, rounds=2),
            "3 rounds": replace(full, rounds=3),
            "random teacher": replace(full, random=True),
            "adapting teacher": replace(full, frozen=False),
        }[arm]


_ALL: tuple[Arm, ...] = (
    "alone", "logit KD", "probe KD", "feature KD", "one-way", "two-way", "no MC", "no SC", "3 rounds",
    "random teacher", "adapting teacher",
)  # fmt: skip
_FULL_VISION: dict[str, Any] = {
    "tasks": ("vision",), "teacher": "google/vit-base-patch16-224-in21k", "data": "uoft-cs/cifar10",
    "image_column": "img", "image_size": 224, "patch": 16, "teacher_low": 4, "teacher_high": 10, "student_width": 192,
    "student_layers": 4, "student_low": 1, "student_high": 3, "message": 128, "voice": 512, "steps": 35_000,
    "batch": 128, "lr": 1e-3, "decay": 0.05, "precision": "bf16", "save_every": 1000, "seeds": 5,
    "arms": ("alone", "probe KD", "feature KD", "one-way", "two-way", "no MC", "no SC", "3 rounds", "random teacher"),
}  # fmt: skip
PRESETS = {
    "quick": Config(
        arms=("alone", "logit KD", "one-way", "two-way", "no MC"), steps=60, teacher_steps=150, gaps=(1.0,)
    ),
    "desk": Config(arms=_ALL, seeds=6, steps=300, teacher_steps=800, gaps=(0.0, 0.7, 1.0)),
    "full": Config(**_FULL_VISION),
    # MovieLens may not be passed on: give -p data=FOLDER, the unpacked ml-100k
    "full-ratings": Config(
        tasks=("ratings",), data="ml-100k", teacher_width=128, teacher_layers=4, teacher_low=1, teacher_high=3,
        teacher_steps=10_000, student_width=16, message=64, voice=128, steps=3_000, batch=256, lr=1e-3, arms=_ALL,
        seeds=5,
    ),
}  # fmt: skip


_FIRST = "the full method comes first"
_LEAST = 0.01  # stars or share of pictures: the least one would call an improvement


def _claims(
    id: str, sentence: str, margins: tuple[float, float], *, figure: str = _FIRST, source: str = "", unit: str = ""
) -> tuple[Claim, ...]:
    """The sentence's claim on both tasks, ratings first; each asks for its margin or more."""
    found = []
    for task, margin, table, usual in (
        ("ratings", margins[0], "Table 3, RMSE", "stars RMSE"),
        ("vision", margins[1], "Table 4, accuracy", "error rate"),
    ):  # fmt: skip
        name = f"{id}_{task}"
        found.append(
            Claim(name, f"{sentence} ({task})", figure, f"{source or table} (values not readable)", name, unit or usual,
                  ">=", margin)
        )  # fmt: skip
    return tuple(found)


# Margins were set before any judging seed (20 and up) was trained: _LEAST, or at most two thirds of what tuning seeds
# 100 and 101 gave where that is more. Their gains on the validation part, ratings then vision: kd_gain .044 .036,
# talk_gain .033 .062, over_kd -.011 .026, over_hint -.004 .024, question .001 .016, knowledge .034 .008, wording .052
# .054, decoding .010 .068, rounds -.001 -.014. Where that is below the margin the paper's direction stays, and so does
# the margin. gap was not tried on them; 1.5 times in consistency and copies is what tiny studies in the tests reach.
CLAIMS: tuple[Claim, ...] = (
    *_claims("kd_gain", "Logit distillation beats the student alone: error saved", (0.02, 0.02), figure="KD helps"),
    *_claims("talk_gain", "Two-way communication beats the student alone: error saved", (0.02, 0.03)),
    *_claims("over_kd", "It beats logit distillation: error saved", (_LEAST, _LEAST)),
    *_claims("over_hint", "It beats feature distillation: error saved", (_LEAST, _LEAST)),
    *_claims("question", "The question matters: error saved over one-way messages", (_LEAST, _LEAST)),
    *_claims("knowledge", "What helps is the teacher's knowledge: error saved over a random teacher", (0.02, _LEAST),
             figure="not tested", source="reviewers' question"),
    *_claims("wording", "Message consistency L_MC helps the student: error saved over no L_MC", (0.02, 0.02),
             figure="small effect on the task", source="ablation"),
    *_claims("decoding", "State consistency L_SC helps the student: error saved over no L_SC", (_LEAST, 0.03),
             figure="small effect on the task", source="ablation"),
    *_claims("rounds", "Further rounds help: error saved by three rounds over one", (_LEAST, _LEAST),
             figure="not readable", source="ablation"),
    *_claims("consistency", "L_MC makes both word one input alike: message distance, without over with", (1.5, 1.5),
             figure="the loss's purpose", source="ablation", unit="x"),
    *_claims("copies", "L_SC makes messages that give the state back: its error, without over with", (1.5, 1.5),
             figure="the loss's purpose", source="ablation", unit="x"),
    *_claims("gap", "The gain over logit distillation grows with the gap: far end minus near end", (_LEAST, _LEAST),
             figure="the motivation", source="abstract"),
)  # fmt: skip
