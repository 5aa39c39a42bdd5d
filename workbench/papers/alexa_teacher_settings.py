"""What a run of the Alexa Teacher Model can be told (parameters, presets) and the encoders it trains (arms)."""

from dataclasses import dataclass
from typing import Annotated, Literal

from workbench.config import Param, config

TITLE = "Alexa Teacher Model: pretraining and distilling multi-billion-parameter encoders for NLU"
AUTHORS = "Jack FitzGerald and 31 others (KDD 2022)"
ARXIV = "2206.07808"
ABOUT = (
    "Multilingual encoders are pre-trained on public text turned into spoken form, then on an assistant's own "
    "utterances, and distilled in two steps. For understanding commands, text of the right kind outweighs parameters."
)
NOTEBOOK = "07_alexa_teacher.ipynb"

ArmName = Literal[
    "stage 1", "stage 1 continued", "stage 2", "stage 2 alone", "intermediate", "via intermediate", "direct",
    "stage 1 teacher", "public text", "MLM alone", "stage 1 student", "written student", "spoken student", "scratch",
]  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One encoder. role: whose size it has; start: the arm it goes on from; teacher: the arm it is distilled from.

    text: what it reads; share: spoken share, where it differs from the config's; says: what a reader is told.
    """

    role: Literal["teacher", "intermediate", "student"]
    text: Literal["public", "in-domain", "none"]
    says: str
    start: ArmName | None = None
    teacher: ArmName | None = None
    share: float | None = None


# In an order in which everything an arm needs comes before it
ARMS: dict[ArmName, Arm] = {
    "stage 1": Arm("teacher", "public", "teacher, public text"),
    "stage 1 continued": Arm("teacher", "public", "the same, as many steps more as stage 2 takes", "stage 1"),
    "stage 2": Arm("teacher", "in-domain", "teacher, then unlabelled utterances", "stage 1"),
    "stage 2 alone": Arm("teacher", "in-domain", "teacher, unlabelled utterances without stage 1"),
    "intermediate": Arm("intermediate", "in-domain", "distilled from stage 2", teacher="stage 2"),
    "via intermediate": Arm("student", "in-domain", "distilled from the intermediate", teacher="intermediate"),
    "direct": Arm("student", "in-domain", "distilled from stage 2, no intermediate", teacher="stage 2"),
    "stage 1 teacher": Arm("student", "in-domain", "distilled from stage 1 continued", teacher="stage 1 continued"),
    "public text": Arm("student", "public", "distilled from stage 2 on public text", teacher="stage 2"),
    "MLM alone": Arm("student", "in-domain", "the same text and steps, no teacher"),
    "stage 1 student": Arm("student", "public", "public text alone, no teacher"),
    "written student": Arm("student", "public", "the same, nothing spoken", share=0.0),
    "spoken student": Arm("student", "public", "the same, everything spoken", share=1.0),
    "scratch": Arm("student", "none", "no pre-training at all"),
}


@config
class Config:
    """Everything a run depends on besides its seed."""

    data: Annotated[
        str, Param('"commands", or utterances with intents and slots by Hub id or folder (MASSIVE\'s columns)')
    ] = "commands"
    public: Annotated[
        str, Param('"packages", or public text by Hub id or folder (columns text, and language in a folder)')
    ] = "packages"
    teacher: Annotated[
        str, Param("masked-LM encoder that stands for stage 1, by Hub id or folder; empty: train it")
    ] = ""
    languages: Annotated[tuple[str, ...], Param("languages of all text", min_length=1)] = ("en", "es")
    left_out: Annotated[str, Param("language without labels (empty: none); it is read in pre-training")] = "es"
    intents: Annotated[int, Param("intents of the command grammar, those with most templates (0: all)", ge=0)] = 8
    values: Annotated[int, Param("values of each open slot of the command grammar (0: all)", ge=0)] = 12
    alpha: Annotated[float, Param("exponent of the sampling of languages (1: as they come)", ge=0, le=1)] = 0.5
    spoken: Annotated[float, Param("share of public text in spoken form", ge=0, le=1)] = 0.7
    vocabulary: Annotated[int, Param("size of the BPE vocabulary trained here", unit="tokens", ge=300)] = 2000
    public_lines: Annotated[int, Param("lines of public text a language (a Hub's or folder's)", ge=10)] = 4000
    pool: Annotated[int, Param("unlabelled in-domain utterances, all languages", ge=100)] = 12_000
    labels: Annotated[int, Param("labelled utterances a language", ge=4)] = 120
    test: Annotated[int, Param("test utterances a set and language", ge=4)] = 600
    arms: Annotated[tuple[ArmName, ...], Param("encoders to train; what they need is added", min_length=1)] = (
        "stage 1 continued", "via intermediate", "MLM alone", "scratch",
    )  # fmt: skip
    seeds: Annotated[int, Param("seeds, counted from the run's", ge=1)] = 1
    teacher_size: Annotated[str, Param("shape of the teacher")] = "mini-2.3B"
    intermediate_size: Annotated[str, Param("shape of the intermediate student")] = "mini-170M"
    student_size: Annotated[str, Param("shape of the final student")] = "mini-17M"
    context: Annotated[int, Param("longest input", unit="tokens", ge=8)] = 40
    line: Annotated[int, Param("public lines are cut to this", unit="tokens", ge=8)] = 14
    rate: Annotated[float, Param("share of tokens to predict", gt=0, lt=1)] = 0.5
    batch: Annotated[int, Param("sentences a micro-batch", ge=1)] = 96
    accumulate: Annotated[int, Param("micro-batches a step", ge=1)] = 1
    stage1_steps: Annotated[int, Param("steps on public text", unit="steps", ge=1)] = 150
    stage2_steps: Annotated[int, Param("steps of stage 2, and of its control", unit="steps", ge=1)] = 400
    student_steps: Annotated[int, Param("steps of every student and of the intermediate", unit="steps", ge=1)] = 400
    lr: Annotated[float, Param("peak learning rate of stage 1", gt=0)] = 4e-3
    student_lr: Annotated[float, Param("peak learning rate of every student and of the intermediate", gt=0)] = 4e-3
    stage2_lr: Annotated[float, Param("peak learning rate of stage 2 and its control", gt=0)] = 4e-3
    second_text: Annotated[
        Literal["in-domain", "public"], Param("what stage 2 reads (public: no stage 2 at all, an ablation)")
    ] = "in-domain"
    mlm: Annotated[float, Param("a: weight of L_mlm beside 1 - a of L_soft", ge=0, le=1)] = 0.5
    tau: Annotated[float, Param("temperature of L_soft", gt=0)] = 1.0
    hidden: Annotated[float, Param("b: weight of matching hidden states (our ablation, not the paper's)", ge=0)] = 0.0
    teacher_mode: Annotated[Literal["eval", "train"], Param("mode of a frozen teacher; train is the classic bug")] = (
        "eval"
    )
    dropout: Annotated[float, Param("dropout of the encoders", ge=0, lt=1)] = 0.0
    spread: Annotated[float, Param("standard deviation of initial weights", gt=0)] = 0.08
    tune_steps: Annotated[int, Param("fine-tuning steps", unit="steps", ge=1)] = 300
    tune_batch: Annotated[int, Param("utterances a fine-tuning batch", ge=1)] = 32
    tune_lr: Annotated[float, Param("peak learning rate of fine-tuning", gt=0)] = 2e-3
    tunes: Annotated[int, Param("fine-tunings of every encoder, other heads and batches, averaged", ge=1)] = 1
    slot_weight: Annotated[float, Param("weight of the slot loss beside the intent loss", ge=0)] = 2.0
    heads: Annotated[int, Param("width of the heads' hidden layer", ge=1)] = 64
    pooling: Annotated[Literal["max", "first"], Param("how an utterance's states become one")] = "max"
    frozen: Annotated[tuple[ArmName, ...], Param("encoders that are fine-tuned frozen too")] = (
        "stage 1 continued", "stage 2", "via intermediate", "scratch",
    )  # fmt: skip
    label_counts: Annotated[tuple[int, ...], Param("fewer labels a language, for the curve over labels")] = ()
    label_arms: Annotated[tuple[ArmName, ...], Param("encoders fine-tuned on fewer labels too")] = (
        "stage 1 continued", "stage 2", "via intermediate", "scratch",
    )  # fmt: skip
    precision: Annotated[Literal["no", "bf16", "fp16"], Param("mixed precision")] = "no"
    save_every: Annotated[int | None, Param("steps between checkpoints", unit="steps", ge=1)] = None
    workers: Annotated[int, Param("seeds trained at the same time (0: one a core)", ge=0)] = 0


_DESK: tuple[ArmName, ...] = (
    "stage 1 continued", "stage 2", "intermediate", "via intermediate", "direct", "stage 1 teacher", "public text",
    "MLM alone", "stage 1 student", "written student", "spoken student", "scratch",
)  # fmt: skip
PRESETS = {
    # arms are dropped before steps: after a shorter stage 2 the teacher reads intents worse than after stage 1
    "quick": Config(
        arms=("stage 1 continued", "via intermediate", "scratch"), frozen=("stage 1 continued", "stage 2"),
        test=400,
    ),
    "desk": Config(
        arms=_DESK, seeds=4, stage1_steps=300, stage2_steps=800, student_steps=800, tunes=3, label_counts=(30, 60),
    ),
    # the paper's models and in-domain text were never released: a public stage-1 teacher, MASSIVE as the assistant
    "full": Config(
        data="AmazonScience/massive", public="allenai/c4", teacher="facebook/xlm-roberta-xl",
        languages=("en", "de", "es", "fr", "it", "pt"), vocabulary=150_000, public_lines=2_000_000, pool=10_000_000,
        labels=11_514, test=2974, arms=_DESK, seeds=3, teacher_size="2.3B", intermediate_size="170M",
        student_size="17M", context=128, line=128, rate=0.15, batch=64, accumulate=16, stage1_steps=100_000,
        stage2_steps=20_000, student_steps=50_000, lr=3e-4, student_lr=3e-4, stage2_lr=3e-5, dropout=0.1, spread=0.02,
        tune_steps=20_000, tune_batch=128, tune_lr=3e-5, slot_weight=4.0, heads=2048, precision="bf16", save_every=1000,
    ),
}  # fmt: skip
