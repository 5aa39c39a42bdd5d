"""What a run of "Less Data, More Security" can be told (parameters, presets, arms), and its claims."""

from pathlib import Path
from typing import Annotated, Any, Literal

from workbench.config import Param, config
from workbench.evaluation.claims import Claim, claim

TITLE = "Less Data, More Security: domain-adaptive continued pre-training"
AUTHORS = "Salahuddin, Hussain, Löppönen, Jutila, Papadimitratos"
ARXIV = "2507.02964"
ABOUT = (
    "Plain next-token training of an already trained language model on a small curated security corpus, with a small "
    "learning rate: it answers security questions better, on a fraction of the data others use, and forgets little."
)  # fmt: skip
NOTEBOOK = "08_cyber_dap.ipynb"
REFERENCE = Path(__file__).resolve().parents[2] / "outputs" / "reference" / "cyber_dap"

Arm = Literal[
    "base", "dap", "gentle", "aggressive", "1 %", "42 %", "frozen embeddings", "lora", "replay", "shuffled words",
    "general text", "less curated",
]  # fmt: skip


@config
class Config:
    """Everything a run depends on besides its seed."""

    teacher: Annotated[
        str, Param('the base model: "reference" (small, committed), "train" (small, made here), a Hub id or a folder')
    ] = "reference"
    bases: Annotated[int, Param("small base models; seed s adapts base s mod this (0: each seed its own)", ge=0)] = 1
    base_steps: Annotated[int, Param("optimiser steps of a small base model", unit="steps", ge=1)] = 1500
    base_lr: Annotated[float, Param("its peak learning rate", gt=0)] = 3e-3
    data: Annotated[
        str, Param('domain text: "cwe", or a Hub id or folder of jsonl/parquet with a "text" column (and, for '
                   'questions, "name", "description", "group")')
    ] = "cwe"  # fmt: skip
    general: Annotated[
        str, Param('text that forgetting is measured on: "documentation", or a Hub id or folder with a "text" column')
    ] = "documentation"
    benchmarks: Annotated[tuple[str, ...], Param("cti-mcq:PATH, cybermetric:PATH, seceval:PATH")] = ()
    answer_tokens: Annotated[
        int, Param("tokens to answer a benchmark in; 0: as its own harness (a reasoning model needs thousands)", ge=0)
    ] = 0
    tokens: Annotated[int, Param("most tokens of the curated corpus", unit="tokens", ge=256)] = 24_576
    general_tokens: Annotated[int, Param("most tokens of general text", unit="tokens", ge=256)] = 65_536
    hungry: Annotated[float, Param("tokens of the less curated arm over those the others train on", gt=0)] = 2.0
    arms: Annotated[tuple[Arm, ...], Param("what to train and measure", min_length=1)] = ("base", "dap")
    seeds: Annotated[int, Param("seeds of each arm, counted from the run's seed", ge=1)] = 1
    epochs: Annotated[int, Param("passes over the curated corpus", ge=1)] = 6
    lr: Annotated[float, Param("constrained peak learning rate; gentle is 0.3 times, aggressive 5 times it", gt=0)] = (
        1e-3
    )
    lora_lr: Annotated[float, Param("peak learning rate of the LoRA arm", gt=0)] = 1e-2
    lora_rank: Annotated[int, Param("rank of the LoRA arm", ge=1)] = 8
    replay: Annotated[float, Param("share of general text in a batch of the replay arm", gt=0, lt=1)] = 0.25
    warmup: Annotated[float, Param("share of the steps that warm up", ge=0, le=1)] = 0.04
    schedule: Annotated[Literal["cosine", "constant"], Param("learning rate after the warm-up")] = "cosine"
    decay: Annotated[float, Param("weight decay", ge=0)] = 0.1
    context: Annotated[int, Param("tokens of a packed sequence", unit="tokens", ge=8)] = 128
    batch: Annotated[int, Param("sequences a micro-batch", ge=1)] = 8
    accumulate: Annotated[int, Param("micro-batches a step", ge=1)] = 1
    precision: Annotated[Literal["no", "bf16", "fp16"], Param("mixed precision")] = "no"
    across: Annotated[bool, Param("attention crosses the documents of a packed sequence")] = True
    recompute: Annotated[bool, Param("activation checkpointing")] = False
    shard: Annotated[bool, Param("shard parameters, gradients and optimiser over the ranks (FSDP)")] = False
    save_every: Annotated[int | None, Param("steps between checkpoints", unit="steps", ge=1)] = None
    questions: Annotated[int, Param("most questions of each set", ge=0)] = 120
    siblings: Annotated[int, Param("wrong options from the right one's own family, of three", ge=0, le=3)] = 1
    letters: Annotated[
        tuple[Arm, ...], Param("arms whose letters are asked for too: log-likelihood, and generated and read")
    ] = ("base", "dap", "aggressive", "replay")
    held_out: Annotated[int, Param("tokens a loss is measured on", unit="tokens", ge=256)] = 8_192
    workers: Annotated[int, Param("arms trained at the same time (0: one a core)", ge=0)] = 0


CHANGES: dict[str, dict[str, Any]] = {
    "gentle": {"lr": 0.3},
    "aggressive": {"lr": 5.0},
    "1 %": {"share": 0.01},
    "42 %": {"share": 0.42},
    "frozen embeddings": {"frozen": True},
    "lora": {"lora": True},
    "replay": {"replay": True},
    "shuffled words": {"stream": "shuffled"},
    "general text": {"stream": "general"},
    "less curated": {"stream": "raw"},
}

# 16 sequences of 4096 tokens on each of 4 ranks, twice: the 0.5M tokens a step of the sheet's constrained setting [?]
_PAPER: dict[str, Any] = {
    "bases": 1, "epochs": 1, "context": 4096, "batch": 1, "accumulate": 16, "precision": "bf16", "recompute": True,
    "shard": True, "save_every": 25, "tokens": 118_800_000, "general_tokens": 20_000_000, "held_out": 1_048_576,
    "data": "trendmicro-ailab/Primus-Seed", "general": "Salesforce/wikitext", "arms": ("base", "dap", "replay"),
    "seeds": 1, "workers": 1,
}  # fmt: skip
PRESETS = {
    "quick": Config(
        arms=("base", "dap", "aggressive", "replay", "shuffled words"), tokens=12_288, epochs=4, questions=60,
        held_out=4_096, workers=1,
    ),
    "desk": Config(
        arms=("base", "dap", "gentle", "aggressive", "1 %", "42 %", "frozen embeddings", "lora", "replay",
              "shuffled words", "general text", "less curated"),
        seeds=5, teacher="train", bases=0, base_steps=3000, tokens=65_536, questions=300, held_out=16_384,
    ),
    "full": Config(**_PAPER, teacher="meta-llama/Llama-3.1-8B", lr=5e-6),
    "full-14b": Config(
        **_PAPER, teacher="deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", lr=2e-6, answer_tokens=4096,
    ),
    "full-70b": Config(**_PAPER, teacher="meta-llama/Llama-3.3-70B-Instruct", lr=1e-6),
}  # fmt: skip


# Settings and margins were fixed on tuning seeds alone, each with a base of its own: seed 100 (base of 1,500 steps, 49k
# tokens) and seed 101 (4,000 steps, 98k tokens); the desk stands between. They gave, in the order below: 1.62 and 1.74
# nats; 9.2 and 11.2, -4.4 and -2.5 points; .51 and .59 nats; 2.9 and 8.4 points; 1.68 and 1.43 nats; forgotten 1.32 and
# 2.22 nats; then .40 and .30, .58 and .54, .56 and .51, 1.07 and 1.85 nats. A margin is about half of the smaller, none
# where the two are near nothing; "keeps general ability" has the margin a reader would take the sentence for, not one
# that passes. Loss on unseen pages, seeds 100 and 101, all parameters at 3e-4, 5e-4, 1e-3, 2e-3 and 5e-3: 4.15, 3.97,
# 3.76, 3.60, 3.51 and 3.65, 3.53, 3.41, 3.34, 3.31 (forgotten .57 to 3.0 and 1.2 to 3.7: the lower, the less). 1e-3 is
# where more rate begins to cost more than it brings. LoRA at 3e-3, 1e-2 and 3e-2 4.50, 4.32, 4.30 and 4.03, 3.92,
# 3.93: its best is taken, all parameters' is not. Passes, seed 101: 2, 6 and 12 gave 3.65, 3.41 and 3.36.
CLAIMS: tuple[Claim, ...] = (
    claim("domain_nll", "DAP learns the domain: fall of the loss on security pages it never saw",
          "no figure in the abstract", "method", "nats", ">=", 0.8),
    claim("qa_trained", "DAP answers better on pages it was trained on: accuracy, after minus before",
          "CTI-MCQ 0.718, best other 0.668", "abstract", "points", ">=", 3.0),
    claim("qa_held_out", "and on fields and pages kept out of the corpus",
          "CTI-MCQ 0.718, best other 0.668", "abstract", "points", ">=", 0.0),
    claim("knowledge_nll", "It is the text that teaches: loss on unseen pages, the better control minus DAP",
          "no control in the abstract", "our control", "nats", ">=", 0.25),
    claim("knowledge_qa", "and the questions tell too: accuracy on trained pages, DAP minus the better control",
          "no control in the abstract", "our control", "points", ">=", 0.0),
    claim("constrained", "A constrained learning rate forgets less: general loss, aggressive minus constrained",
          "asserted without figures", "abstract", "nats", ">=", 0.8),
    claim("retained", "DAP keeps general ability: rise of the loss on general text",
          "asserted without figures", "abstract", "nats", "<=", 0.3),
    claim("more_tokens", "More domain tokens, more gain: loss on unseen pages, 42 % of the corpus minus all of it",
          "1M, 50M and 118.8M tokens", "thesis abstract", "nats", ">=", 0.2),
    claim("less_data", "Less data, more security: loss on unseen pages, twice as much uncurated text minus curated",
          "118.8M against 2.77B and 5B tokens", "abstract", "nats", ">=", 0.2),
    claim("full_beats_lora", "Training all parameters beats LoRA on the same tokens: loss on unseen pages, difference",
          "beaten, no figures at hand", "abstract, version 2", "nats", ">=", 0.2),
    claim("replay_forgets_less", "General text in the batch forgets less at equal domain tokens: general loss, change",
          "not in the paper", "our addition", "nats", ">=", 0.4),
)  # fmt: skip
