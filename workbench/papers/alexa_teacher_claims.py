"""What a run of the Alexa Teacher Model is judged by: the claims, and their measures from the scores of every arm."""

from typing import Any

from workbench.evaluation.claims import Claim, claim
from workbench.evaluation.understanding import relative_change
from workbench.papers.alexa_teacher_settings import ArmName

# what is compared with what: (new, base) arms
COMPARED: tuple[tuple[ArmName, ArmName], ...] = (
    ("stage 2", "stage 1 continued"), ("intermediate", "stage 1 continued"), ("via intermediate", "stage 1 continued"),
    ("direct", "stage 1 teacher"), ("direct", "public text"), ("direct", "MLM alone"),
    ("via intermediate", "MLM alone"), ("via intermediate", "direct"), ("via intermediate", "stage 1 student"),
    ("via intermediate", "scratch"),
)  # fmt: skip


# What tuning seeds gave. Seed 100 (2 x 48 teacher, 150 + 350 steps, 200 of fine-tuning): in-domain loss -3.1 nats, but
# intent error +21 % and slot error +12 %: stage 2 was too short, the trap of an under-trained encoder. Seed 101
# (1 x 32, 60 + 800, 400): -3.5 nats, intent +5 %, slots -3 %, SemER -1 %, intent in the left-out language -16 %.
# As the presets are now, seeds 101 and 102: -3.7 and -3.4 nats; intent +5 and -13 %, slots +4 and -2 %; intermediate
# against stage 1 -2 and -15 %, final student +10 and -14 %, transfer against scratch +3 and 0 %. Nothing but the loss
# is of one sign: at 4.2 to 4.4 nats the miniature encoders are far from having learned the commands. Frozen encoders
# were looked at on seed 0 only (SemER -12 %), which is therefore not among the judged seeds (1, 2, 3).
# The margin of the relative changes is therefore the weakest there is, lower at all, fixed before any judging seed.
CLAIMS: tuple[Claim, ...] = (
    claim(
        "indomain_loss",
        "Stage 2 teaches the assistant's language: held-out in-domain loss, stage 2 minus stage 1 continued",
        "no figure",
        "Stage 2 pre-training",
        "nats",
        "<=",
        -0.5,
    ),
    claim(
        "stage2_intent",
        "Stage 2 lowers the intent error against as many more steps of stage 1: relative change",
        "-3.86 %",
        "abstract",
        "%",
        "<=",
        0.0,
    ),
    claim("stage2_slots", "and the slot error", "-7.01 %", "abstract", "%", "<=", 0.0),
    claim("stage2_frozen", "and SemER where the encoder is frozen", "no figure", "ours", "%", "<=", 0.0),
    claim(
        "intermediate_beats_teacher",
        "The intermediate student of the in-domain teacher beats the larger public-text teacher: SemER",
        "-2.88 % IC, -7.69 % SF against 14x the size",
        "abstract",
        "%",
        "<=",
        0.0,
    ),
    claim(
        "student_beats_teacher",
        "So does the final student, distilled through the intermediate",
        "17M beats public models of 42M and 85M",
        "abstract",
        "%",
        "<=",
        0.0,
    ),
    claim(
        "indomain_teacher",
        "The teacher's text matters: student of the stage 2 teacher against that of the stage 1 teacher, SemER",
        "-3.74 to -4.91 % dissatisfaction",
        "abstract (another baseline)",
        "%",
        "<=",
        0.0,
    ),
    claim(
        "indomain_text",
        "The student's own pre-training text matters: distilled on utterances against on public text, SemER",
        "no figure",
        "distillation data",
        "%",
        "<=",
        0.0,
    ),
    claim(
        "distilled",
        "Distillation beats the same student by MLM alone: SemER",
        "no figure",
        "Section on distillation",
        "%",
        "<=",
        0.0,
    ),
    claim(
        "intermediate_helps",
        "The intermediate teacher helps the final student: SemER",
        "no figure",
        "two-step distillation",
        "%",
        "<=",
        0.0,
    ),
    claim(
        "same_size_stage1",
        "The final student beats a same-size encoder with stage 1 only: SemER",
        "-4.23 %, -6.14 %",
        "abstract (public models 2.5 to 5 times the size)",
        "%",
        "<=",
        0.0,
    ),
    claim(
        "transfer",
        "Pre-training carries intents to a language without labels: intent error against no pre-training",
        "no figure in what could be checked",
        "cross-lingual transfer",
        "%",
        "<=",
        0.0,
    ),
)


def claim_values(arms: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The measures of CLAIMS that one seed's arms allow: relative changes in %, negative is better, and nats."""
    out: dict[str, float] = {}

    def change(measure: str, new: str, base: str, score: str = "semer", test: str = "covered", kind: str = "tuned"):
        if all(name in arms and test in arms[name].get(kind, {}) for name in (new, base)):
            out[measure] = relative_change(arms[new][kind][test][score], arms[base][kind][test][score])

    if "stage 2" in arms and "stage 1 continued" in arms:
        after, before = (arms[name]["nll"]["in-domain"] for name in ("stage 2", "stage 1 continued"))
        out["indomain_loss"] = after - before
    change("stage2_intent", "stage 2", "stage 1 continued", "intent")
    change("stage2_slots", "stage 2", "stage 1 continued", "slots")
    change("stage2_frozen", "stage 2", "stage 1 continued", kind="frozen")
    change("intermediate_beats_teacher", "intermediate", "stage 1 continued")
    change("student_beats_teacher", "via intermediate", "stage 1 continued")
    change("indomain_teacher", "direct", "stage 1 teacher")
    change("indomain_text", "direct", "public text")
    change("distilled", "via intermediate", "MLM alone")
    change("intermediate_helps", "via intermediate", "direct")
    change("same_size_stage1", "via intermediate", "stage 1 student")
    change("transfer", "via intermediate", "scratch", "intent", "left out")
    if "written student" in arms and "spoken student" in arms and "stage 1 student" in arms:
        nll = {
            name: arms[name]["nll"]["public written"]
            for name in ("written student", "stage 1 student", "spoken student")
        }
        out["written_kept"] = nll["stage 1 student"] - nll["written student"]
        out["written_lost"] = nll["spoken student"] - nll["stage 1 student"]
    return out
