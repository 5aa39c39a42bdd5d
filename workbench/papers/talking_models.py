"""Talking Models: two models talk through a shared message space while the small one learns its downstream task.

Symbols (ours; the paper calls the student g and the teacher h): a and b are a model's lower and higher states, Enc and
Dec its voice, m messages of width k. The form of the losses is our reading of the abstract, the public reviews and the
patent's abstract: the paper's own equations could not be opened here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.losses.distillation import output_loss
from workbench.losses.knowledge import correlation_distance, feature_kd, logit_kd, state_distance
from workbench.models.stages import Stages, resize_tokens
from workbench.papers.talking_models_settings import (
    ABOUT,
    ARXIV,
    AUTHORS,
    CLAIMS,
    NOTEBOOK,
    PRESETS,
    TITLE,
    TUNED,
    Config,
    Setup,
)  # fmt: skip

__all__ = ["ABOUT", "ARXIV", "AUTHORS", "CLAIMS", "NOTEBOOK", "PRESETS", "TITLE", "TUNED", "Config", "Setup"]


class Voice(nn.Module):
    """Enc and Dec of one model: its states (B, N, D) to messages (B, N, k), any message to a state of its own.

    One pair serves the lower and the higher state, as both have width D.
    """

    def __init__(self, width: int, message: int, hidden: int):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, message)
        )
        self.decoder = nn.Sequential(nn.Linear(message, hidden), nn.GELU(), nn.Linear(hidden, width))

    def encode(self, state: Tensor) -> Tensor:
        """m = Enc(state)."""
        return self.encoder(state)

    def decode(self, message: Tensor, tokens: int | None = None) -> Tensor:
        """Dec(m), on as many tokens as the listening model has."""
        return self.decoder(resize_tokens(message, tokens))


@dataclass
class Exchange:
    """What was said about one batch; lists have one entry a round. Student states (B, N_S, D_S), messages (B, N, k)."""

    a_S: Tensor
    b_S: Tensor
    a_T: Tensor  # the teacher's own reading of the input
    b_T: Tensor
    words: dict[str, Tensor] = field(default_factory=dict)  # each of the four states in its own model's words
    questions: list[Tensor] = field(default_factory=list)
    replies: list[Tensor] = field(default_factory=list)
    heard: list[Tensor] = field(default_factory=list)  # b'_S, the replies in the student's own space


def relative_error(state: Tensor, copy: Tensor) -> Tensor:
    """Mean squared error over the state's variance (a constant): unlike a normalised distance it fixes the scale too,
    which the teacher's middle layers depend on."""
    spread = state.detach().float().var().clamp(min=1e-6)
    return (state.float() - copy.float()).square().mean() / spread


class Pupil(nn.Module):
    """One arm in training: the student, what helps it learn, and the teacher. Only the student is kept afterwards.

    teacher: frozen unless setup.frozen is False. probe: a fixed linear map (D_T to outputs) on the teacher's mean
    higher state, for setup.method "probe".
    """

    def __init__(
        self, student: Stages, teacher: Stages, setup: Setup, config: Config, *, seed: int,
        probe: nn.Linear | None = None,
    ):  # fmt: skip
        super().__init__()
        self.setup, self.config = setup, config
        self.student = student.train()
        self.teacher = teacher.eval().requires_grad_(not setup.frozen)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if setup.method == "messages":
                self.voice_S = Voice(student.width, config.message, config.voice)
                self.voice_T = Voice(teacher.width, config.message, config.voice)
            elif setup.method == "features":
                self.regressor = nn.Linear(student.width, teacher.width)
        if probe is not None:
            self.probe = probe.requires_grad_(False)

    def read(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The teacher's own states a_T and b_T of the input, without gradient where it is frozen."""
        with torch.set_grad_enabled(not self.setup.frozen and torch.is_grad_enabled()):
            a_T = self.teacher.low(inputs)
            return a_T, self.teacher.mid(a_T)

    def talk(self, inputs: Mapping[str, Tensor]) -> Exchange:
        """N rounds about one input.

        Two-way: m = Enc_S(a_S) is the question; the teacher takes it for its own state, Dec_T(m), thinks it through
        with its middle layers, and replies Enc_T(mid_T(Dec_T(m))); the student hears b'_S = Dec_S(reply), and asks on
        from there. One-way: the reply is Enc_T(b_T), whatever the student sees.
        """
        S, T, voice_S, voice_T = self.student, self.teacher, self.voice_S, self.voice_T
        a_S = S.low(inputs)
        said = Exchange(a_S, S.mid(a_S), *self.read(inputs))
        for name, voice in (("a_S", voice_S), ("b_S", voice_S), ("a_T", voice_T), ("b_T", voice_T)):
            said.words[name] = voice.encode(getattr(said, name))
        question = said.words["a_S"]
        for _ in range(self.setup.rounds):
            if self.setup.two_way:
                said.questions.append(question)
                # gradients pass THROUGH the frozen layers to Dec_T, Enc_S and the student: the question is learnt
                said.replies.append(voice_T.encode(T.mid(voice_T.decode(question, said.a_T.shape[1]))))
            else:
                said.replies.append(said.words["b_T"])
            said.heard.append(voice_S.decode(said.replies[-1], a_S.shape[1]))
            if len(said.heard) < self.setup.rounds:
                question = voice_S.encode(said.heard[-1])
        return said

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """d of two batches of states or messages, as config.distance says."""
        return correlation_distance(x, y) if self.config.distance == "correlation" else state_distance(x, y)

    def interaction(self, said: Exchange) -> Tensor:
        """L_interact = mean over rounds of d(b_S, b'_S), one side without gradient where config.stop says so."""
        b_S = said.b_S.detach() if self.config.stop == "student" else said.b_S
        heard = [h.detach() if self.config.stop == "reply" else h for h in said.heard]
        return torch.stack([self.distance(b_S, h) for h in heard]).mean()

    def message_consistency(self, said: Exchange) -> Tensor:
        """L_MC = d(Enc_S(a_S), Enc_T(a_T)): both models word one input alike (the higher states too: mc_high)."""
        distances = []
        for ours, theirs in [("a_S", "a_T"), *([("b_S", "b_T")] if self.config.mc_high else [])]:
            mine = said.words[ours]
            distances.append(self.distance(mine, resize_tokens(said.words[theirs], mine.shape[1])))
        return torch.stack(distances).mean()

    def state_consistency(self, said: Exchange) -> Tensor:
        """L_SC = sum over both models of d(s, Dec(Enc(s))), the mean over s = a, b."""
        errors = [
            relative_error(getattr(said, name), (self.voice_S if name.endswith("S") else self.voice_T).decode(message))
            for name, message in said.words.items()
        ]
        return torch.stack(errors).sum() / 2

    def task_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (classes) or mean squared error (one number)."""
        if target.is_floating_point():
            return F.mse_loss(prediction[:, 0].float(), target)
        return F.cross_entropy(prediction.float(), target)

    def forward(self, batch: tuple[Mapping[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """All losses of the arm on one batch (inputs, target); "loss" is their weighted sum."""
        inputs, target = batch
        s, S, T = self.setup, self.student, self.teacher
        if s.method == "messages":
            said = self.talk(inputs)
            task = self.task_loss(S.head(said.b_S), target)
            parts = {
                "interact": (s.w1, self.interaction(said)), "mc": (s.w2, self.message_consistency(said)),
                "sc": (s.w3, self.state_consistency(said)),
            }  # fmt: skip
        else:
            b_S = S.mid(S.low(inputs))
            prediction = S.head(b_S)
            task, parts = self.task_loss(prediction, target), {}
            if s.method == "features":
                regressed = self.regressor(resize_tokens(b_S, T.tokens))
                parts["features"] = (s.kd, feature_kd(regressed, self.read(inputs)[1]))
            elif s.method in ("logits", "probe"):
                with torch.no_grad():
                    b_T = self.read(inputs)[1]
                    wanted = T.head(b_T) if s.method == "logits" else self.probe(b_T.mean(1))
                if target.is_floating_point():
                    parts["logits"] = (s.kd, output_loss(prediction, wanted))
                else:
                    parts["logits"] = (s.kd, logit_kd(prediction, wanted, temperature=self.config.temperature))
        # a term of weight 0 is measured but not trained on
        total = task + sum(weight * value for weight, value in parts.values() if weight)
        return {"loss": total, "task": task.detach(), **{name: value.detach() for name, (_, value) in parts.items()}}


@torch.no_grad()
def predict(model: nn.Module, inputs: Mapping[str, Tensor], *, batch: int = 512) -> Tensor:
    """The student's (or teacher's) predictions (n, outputs), by itself: no message is exchanged."""
    n = len(next(iter(inputs.values())))
    model.eval()
    return torch.cat([model({k: v[i : i + batch] for k, v in inputs.items()}) for i in range(0, n, batch)])


def prediction_error(prediction: Tensor, target: Tensor) -> float:
    """Root mean squared error (numbers, in their own unit) or the share of wrong classes."""
    if target.is_floating_point():
        return (prediction[:, 0] - target).square().mean().sqrt().item()
    return (prediction.argmax(1) != target).float().mean().item()


def effective_rank(states: Tensor) -> float:
    """exp of the entropy of the covariance's spectrum of (n, k): how many directions messages really use."""
    values = torch.linalg.svdvals((states - states.mean(0)).double()).square()
    p = values / values.sum().clamp(min=1e-30)
    return float((-(p * p.clamp(min=1e-30).log()).sum()).exp())


def bench(folder: Any) -> None:
    """Cost of communication, of teacher and student: `workbench bench talking_models`."""
    from workbench.papers.talking_models_bench import measure

    measure(folder)
