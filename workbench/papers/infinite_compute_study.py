"""The paper's experiments, one function each: train what is needed, store one result per judging group, return it all.

A group is one judging seed: its own members, students and pools. Losses are nats a token on the report half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from workbench.data.text import Windows
from workbench.evaluation.language import ensemble_losses, soup
from workbench.evaluation.scaling_laws import PowerLaw, bootstrap_asymptote, data_efficiency, fit_power_law
from workbench.papers.infinite_compute import (
    Cell,
    Config,
    Study,
    Trained,
    distil,
    ensemble_curve,
    k_limit,
    load_model,
    member_cells,
    member_seed,
    n_limit,
    optima,
    retained,
    search,
)  # fmt: skip
from workbench.papers.infinite_compute_settings import STANDARD_DECAY, Setting

TUNING_SPLIT, TUNING_SEED = 100, 100  # another shuffle of the text, a seed no judging group uses


def groups(config: Config, seed: int) -> list[int]:
    """The judging groups of a run: run seed 0 judges groups 0.., seed 1 groups 10.., and so on."""
    return [10 * seed + i for i in range(config.seeds)]


def single(size: str, tokens: int, setting: Setting, group: int) -> Cell:
    """One model of a group: its member 0, so that an ensemble of the same setting shares it."""
    return member_cells(size, tokens, setting, group, 1)[0]


def overfit(study: Study, judging: Sequence[int]) -> dict[float, dict[int, list[Trained]]]:
    """Decay → epochs → a model a group: the standard decay against the tuned one, at one learning rate (Fig. 2).

    Stores overfit_gap: how much the last doubling of the epochs costs at the standard decay.
    """
    c = study.config
    tuned = optima(c.tokens, c.overfit_size).regularised
    kinds = (STANDARD_DECAY, tuned.decay)
    plan = {
        (decay, epochs): [single(c.overfit_size, c.tokens, Setting(epochs, tuned.lr, decay), g) for g in judging]
        for decay in kinds
        for epochs in c.overfit_epochs
    }
    study.train([cell for cells in plan.values() for cell in cells], text="epochs until it over-fits")
    curves: dict[float, dict[int, list[Trained]]] = {decay: {} for decay in kinds}
    for (decay, epochs), cells in plan.items():
        curves[decay][epochs] = study.train(cells)
    last, before = sorted(c.overfit_epochs)[-1], sorted(c.overfit_epochs)[-2]
    for i, g in enumerate(judging):
        ends = curves[STANDARD_DECAY]
        study.record.result("overfit_gap", ends[last][i].report - ends[before][i].report, seed=g)
    return curves


@dataclass(frozen=True)
class Recipes:
    """Models by (recipe, D, size), one a group; the standard recipe's data law, where there are budgets enough."""

    models: Mapping[tuple[str, int, str], list[Trained]]
    data_law: PowerLaw | None

    def losses(self, recipe: str, tokens: int, group: int) -> dict[int, float]:
        """Parameter count → report loss of the group-th group."""
        found = {
            m[group].parameters: m[group].report for (r, d, _), m in self.models.items() if (r, d) == (recipe, tokens)
        }
        return dict(sorted(found.items()))


def recipes(study: Study, judging: Sequence[int]) -> Recipes:
    """Both recipes at every size and budget (Fig. 2, 3). Stores decay_gain, width_gain, efficiency_regularised."""
    c = study.config
    budgets = sorted({c.tokens, *c.budgets})
    plan = {
        (recipe, d, size): [single(size, d, getattr(optima(d, size), recipe), g) for g in judging]
        for recipe in ("standard", "regularised")
        for d in budgets
        for size in c.sizes
    }
    study.train([cell for cells in plan.values() for cell in cells], text="two recipes")
    models = {key: study.train(cells) for key, cells in plan.items()}
    found = Recipes(models, None)
    for i, g in enumerate(judging):
        standard, regularised = (found.losses(r, c.tokens, i) for r in ("standard", "regularised"))
        study.record.result("decay_gain", fmean(standard.values()) - fmean(regularised.values()), seed=g)
        ordered = list(regularised.values())
        study.record.result("width_gain", ordered[0] - ordered[-1], seed=g)
    if len(budgets) < 3:
        return found
    best = {d: fmean(min(found.losses("standard", d, i).values()) for i in range(len(judging))) for d in budgets}
    law = fit_power_law(list(best), list(best.values()))
    for i, g in enumerate(judging):
        loss = min(found.losses("regularised", c.tokens, i).values())
        gain = data_efficiency(law, loss, c.tokens, best[c.tokens])
        study.record.result("efficiency_regularised", gain, seed=g)
    return Recipes(models, law)


def certified_decay(study: Study) -> dict[str, tuple[Setting, bool, dict[Setting, float]]]:
    """The search at every size, from the stored optimum, on the tuning split. Stores decay_ratio = λ* / 0.1 by size."""
    found = {}
    for size in study.config.sizes:
        found[size] = search(
            study, size, study.config.tokens, recipe="regularised", split=TUNING_SPLIT, seed=TUNING_SEED
        )
        study.record.result("decay_ratio", found[size][0].decay / STANDARD_DECAY, seed=size, certified=found[size][1])
    return found


@dataclass(frozen=True)
class Ensembles:
    """Members by (setting's kind, size), a list a group; their loss for K = 1..; the first K = 1.. contrast curves."""

    members: Mapping[tuple[str, str], list[list[Trained]]]
    curves: Mapping[tuple[str, str], list[list[float]]]
    contrasts: Mapping[str, list[float]]

    def limits(self, group: int) -> dict[int, float]:
        """N → the K → ∞ asymptote of members tuned for it (step i of the joint recipe, K before N)."""
        return {
            self.members[kind, size][group][0].parameters: k_limit(curves[group]).E
            for (kind, size), curves in self.curves.items()
            if kind == "member"
        }


def ensembles(study: Study, judging: Sequence[int], singles: Recipes) -> Ensembles:
    """K members a group and size (Fig. 4 to 6). Stores ensemble_gain, slope_gain, limit_gain_k, joint_gain, efficiency.

    ensemble_gain: the best regularised single model of any size minus the ensemble of the smallest size.
    """
    c = study.config
    small = c.ensemble_sizes[0]
    kinds = [("member", size) for size in c.ensemble_sizes]
    if c.members >= 3 and len(judging) > 1:
        kinds.append(("regularised", small))
    plan = {
        (kind, size): [
            member_cells(size, c.tokens, getattr(optima(c.tokens, size), kind), g, c.members) for g in judging
        ]
        for kind, size in kinds
    }
    study.train([x for sets in plan.values() for cells in sets for x in cells], text="ensemble members")
    members = {key: [study.train(cells) for cells in sets] for key, sets in plan.items()}
    curves = {key: [ensemble_curve(study, m) for m in sets] for key, sets in members.items()}
    first = members["member", small][0]
    contrasts = {
        "probability mean": ensemble_curve(study, first, average="probabilities"),
        "weight soup": [_soup_loss(study, first[: k + 1]) for k in range(len(first))],
    }
    found = Ensembles(members, curves, contrasts)
    for i, g in enumerate(judging):
        regularised = singles.losses("regularised", c.tokens, i)
        at_k = curves["member", small][i]
        study.record.result("ensemble_gain", min(regularised.values()) - at_k[-1], seed=g)
        if ("regularised", small) in curves:
            usual = curves["regularised", small][i]
            study.record.result("slope_gain", (at_k[0] - at_k[-1]) - (usual[0] - usual[-1]), seed=g)
            study.record.result("limit_gain_k", k_limit(usual).E - k_limit(at_k).E, seed=g)
        if len(c.ensemble_sizes) >= 3:
            joint = n_limit(found.limits(i)).E
            study.record.result("joint_gain", n_limit(regularised).E - joint, seed=g)
        if singles.data_law:
            best = min(curve[i][-1] for (kind, _), curve in curves.items() if kind == "member")
            baseline = fmean(min(singles.losses("standard", c.tokens, j).values()) for j in range(len(judging)))
            gain = data_efficiency(singles.data_law, best, c.tokens, baseline)
            study.record.result("efficiency_ensemble", gain, seed=g)
    return found


def _soup_loss(study: Study, members: Sequence[Trained]) -> float:
    corpus = study.corpus(members[0].cell.tokens)
    models = [load_model(t, study.config, corpus.vocabulary) for t in members]
    models[0].load_state_dict(soup(models))
    return ensemble_losses(models[:1], Windows(corpus.report, study.config.context, 1, 0))[0]


def sharing(study: Study, group: int) -> dict[str, list[float]]:
    """K curves when members share their initialisation, their data order, neither or both (ablation of §4)."""
    c = study.config
    size = c.ensemble_sizes[0]
    setting = optima(c.tokens, size).member
    ways = {"neither": (), "order": ("order",), "init": ("init",), "both": ("init", "order")}
    plan = {w: member_cells(size, c.tokens, setting, group, c.members, share=s) for w, s in ways.items()}
    study.train([x for cells in plan.values() for x in cells], text="members that share something")
    return {w: ensemble_curve(study, study.train(cells)) for w, cells in plan.items()}


def fixed_decay(study: Study, group: int) -> dict[str, dict[int, float]]:
    """N → loss with every size at the smallest size's tuned setting, beside the jointly tuned one (ablation of §3)."""
    c = study.config
    one = optima(c.tokens, c.sizes[0]).regularised
    plan = {"one setting for all N": [single(s, c.tokens, one, group) for s in c.sizes]}
    plan["tuned per N"] = [single(s, c.tokens, optima(c.tokens, s).regularised, group) for s in c.sizes]
    study.train([x for cells in plan.values() for x in cells], text="one decay for every size")
    return {k: {t.parameters: t.report for t in study.train(cells)} for k, cells in plan.items()}


@dataclass(frozen=True)
class Distilled:
    """Students by arm, one a group; the losses they are measured against, one a group."""

    students: Mapping[str, list[Trained]]
    single: list[float]  # the regularised single model of the students' size
    ensemble: list[float]  # the teacher: K members together


def distillation(study: Study, judging: Sequence[int], singles: Recipes, teachers: Ensembles) -> Distilled:
    """Students of every arm (Fig. 9, Tab. 4). Stores distil_gain, self_gain, real_gain and retained."""
    c = study.config
    small = c.ensemble_sizes[0]
    arms = [distil(study, teachers.members["member", small][i], g) for i, g in enumerate(judging)]
    alone = [singles.models["regularised", c.tokens, small][i].report for i in range(len(judging))]
    together = [curve[-1] for curve in teachers.curves["member", small]]
    for i, g in enumerate(judging):
        loss = {arm: t.report for arm, t in arms[i].items()}
        control = loss.get("real only")
        if control is not None and "mixture" in loss:
            study.record.result("distil_gain", control - loss["mixture"], seed=g)
        if control is not None and "self" in loss:
            study.record.result("self_gain", control - loss["self"], seed=g)
        if "synthetic only" in loss and "mixture" in loss:
            study.record.result("real_gain", loss["synthetic only"] - loss["mixture"], seed=g)
        if "mixture" in loss:
            study.record.result("retained", retained(alone[i], loss["mixture"], together[i]), seed=g)
    return Distilled({arm: [a[arm] for a in arms] for arm in c.arms}, alone, together)


def asymptote_band(losses: Sequence[Mapping[int, float]], *, seed: int = 0) -> tuple[PowerLaw, tuple[float, float]]:
    """The N-law through the mean over groups, and the bootstrap interval (over groups) of its asymptote."""
    samples = {n: [group[n] for group in losses] for n in losses[0]}
    law = n_limit({n: fmean(v) for n, v in samples.items()})
    return law, bootstrap_asymptote({float(n): v for n, v in samples.items()}, seed=seed, exponent=1.0)


__all__ = [
    "asymptote_band", "certified_decay", "distillation", "ensembles", "fixed_decay", "groups", "member_seed", "overfit",
    "recipes", "sharing", "single",
]  # fmt: skip
