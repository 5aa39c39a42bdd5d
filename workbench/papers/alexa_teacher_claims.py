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


# What tuning gave, seeds 100 and 101 alone; SemER is the mean of three fine-tunings wherever two figures stand
# together. One grid of rates for every kind of encoder, 4e-3 and 8e-3 and beyond. Teacher, seed 100, 2e-3, 4e-3,
# 8e-3: held-out in-domain loss 2.92, 2.72, 3.24 nats, so 4e-3. Students: the loss is lower at 8e-3 (MLM alone 3.47
# and 3.20, direct 3.35 and 3.08), SemER is not: seeds 100 and 101, at 4e-3 then 8e-3, MLM alone 67, 64 then 65, 66 %;
# direct 65, 59 then 62, 64; via the intermediate 65, 58 then 64, 66; of the stage 1 teacher 73, 69 then 71, 63;
# intermediate 59, 48 then 59, 55; on public text 68 then 67 (seed 101). 1.6e-2 is worse for all, so 4e-3 for all.
# Twice the steps: loss .4 nats lower, SemER the same. Fine-tuning at 1e-3, 2e-3, 4e-3: stage 2 48, 46, - and stage 1
# continued 74, 69, -; scratch 84, 76, 74; so 2e-3. The presets then gave on seeds 100 and 101: in-domain loss -6.3
# and -6.1 nats; intent -46 and -28 %, slots -32 and -34 %; intermediate -17 and -30 %, final student -8 and -16 %
# against the teacher of public text; teacher's text -12 and -15 %, student's text -6 and -14 %; distilled -3 and -10
# %; intermediate helps +1 and -2 %; same size -17 and -25 %. One fine-tuning: frozen -24 and -27 %, transfer -17 and
# -17 %, written text 2.9 and 3.0 nats lost, .35 and .3 not kept. Margins: the paper's size for intent, slots and
# intermediate, a third to a half of the smaller value elsewhere, none (lower at all) where a seed is near nothing.
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
