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


# What tuning gave, seeds 100 and 101 alone. One grid of rates, 2e-3, 4e-3 and 8e-3, seed 100, 800 steps: the teacher's
# held-out in-domain loss at half the tokens masked 2.92, 2.72 and 3.24 nats (at 15 % masked 2.57, 2.34 and 2.95), so
# 4e-3; fine-tuning on 150 labels, SemER of stage 2 (4e-3) 50, 57 and 67 %, of 300 steps of stage 1 84, 87 and 95 %, so
# 2e-3. The students' own grid was not run: they take the teacher's rate, every one of them.
# Seed 101, every arm, 150 labels, fine-tuning still at 4e-3: in-domain loss -6.1 nats; intent +7 %, slots -19 %, frozen
# -27 %; intermediate -17 % and final student -1 % against the teacher of public text; teacher's text -13 %, student's
# text -8 %, distilled -14 %, intermediate helps -5 %, same size -17 %, transfer -17 %; written text 3.0 nats lost, and
# 0.3 not kept by the mix. Margins: the paper's size for intent, slots and intermediate, a third to a half of the seed's
# value elsewhere, no margin (lower at all) for the two smallest. Seed 100,
# the presets as they are (120 labels): -6.3 nats; intent -49 %, slots -43 %, frozen -24 %; intermediate -26 %, final
# student -13 %; teacher's text -2 %, student's text -1 %, distilled +5 %, intermediate helps 0 %, same size -13 %,
# transfer -17 %; written 2.9 and .35 nats. The final student's rate, seed 100: in-domain loss 3.73, 3.27 and 2.87 nats
# at 2, 4 and 8e-3, SemER 69, 70 and 61 % tuned at 4e-3: students want a larger rate than the teacher, to be tuned
# before judging.
CLAIMS: tuple[Claim, ...] = (
    claim(
        "indomain_loss",
        "Stage 2 teaches the assistant's language: held-out in-domain loss, stage 2 minus stage 1 continued",
        "no figure",
        "Stage 2 pre-training",
        "nats",
        "<=",
        -3.0,
    ),
    claim(
        "stage2_intent",
        "Stage 2 lowers the intent error against as many more steps of stage 1: relative change",
        "-3.86 %",
        "abstract",
        "%",
        "<=",
        -3.86,
    ),
    claim("stage2_slots", "and the slot error", "-7.01 %", "abstract", "%", "<=", -7.01),
    claim("stage2_frozen", "and SemER where the encoder is frozen", "no figure", "ours", "%", "<=", -10.0),
    claim(
        "intermediate_beats_teacher",
        "The intermediate student of the in-domain teacher beats the larger public-text teacher: SemER",
        "-2.88 % IC, -7.69 % SF against 14x the size",
        "abstract",
        "%",
        "<=",
        -3.0,
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
        -4.0,
    ),
    claim(
        "indomain_text",
        "The student's own pre-training text matters: distilled on utterances against on public text, SemER",
        "no figure",
        "distillation data",
        "%",
        "<=",
        -4.0,
    ),
    claim(
        "distilled",
        "Distillation beats the same student by MLM alone: SemER",
        "no figure",
        "Section on distillation",
        "%",
        "<=",
        -5.0,
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
        -5.0,
    ),
    claim(
        "transfer",
        "Pre-training carries intents to a language without labels: intent error against no pre-training",
        "no figure in what could be checked",
        "cross-lingual transfer",
        "%",
        "<=",
        -5.0,
    ),
    claim(
        "written_lost",
        "Public text in spoken form alone unlearns written text: held-out written loss, all spoken minus 70 % spoken",
        "no figure",
        "spoken-form mix (70 %)",
        "nats",
        ">=",
        1.0,
    ),
    claim(
        "written_kept",
        "The mix keeps written text: held-out written loss, 70 % spoken minus nothing spoken",
        "no figure",
        "spoken-form mix (70 %)",
        "nats",
        "<=",
        0.6,
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
