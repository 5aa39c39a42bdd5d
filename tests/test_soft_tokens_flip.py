"""Soft tokens: training that reinforces the wrong thing must flip a verdict."""

import copy

from workbench.evaluation.claims import judge
from workbench.losses.policy_gradient import advantages
from workbench.papers import soft_tokens as paper
from workbench.papers import soft_tokens_study as studies
from workbench.training.record import Record


def verdicts(path, base, task, config):
    """Verdicts on "sample_gap" and "soft_learns" from three short trainings of hard and of soft chains."""
    modes, record = paper.six_modes(config), Record(path)
    for run in range(100, 103):
        questions = studies.test_questions(config, task, "test", run)
        greedy, sampled = {}, {}
        for arm in ("base", "hard", "soft"):
            model = copy.deepcopy(base)
            if arm != "base":
                paper.train(config, task, model, arm, run, progress=False)
            for into, name, n in ((greedy, "hard greedy", 1), (sampled, "hard sample", 8)):
                counts = studies.right_counts(model, task, questions, modes[name], samples=n, seed=run, rows=1024)
                into[arm] = sum(counts) / (n * len(questions))
        record.result("sample_gap", sampled["hard"] - sampled["soft"], seed=run)
        record.result("soft_learns", greedy["soft"] - greedy["base"], seed=run)
    claims = {c.id: c for c in paper.CLAIMS}
    return {id: judge(claims[id], record.records("result")) for id in ("sample_gap", "soft_learns")}


def test_a_reward_of_the_wrong_sign_flips_the_verdict(tmp_path, monkeypatch):
    """Drawn tokens learn to be sampled right within 60 steps; reinforce what was wrong instead, and they unlearn.

    Soft chains learn too little in so few steps to be judged (a thousand are needed); the wrong sign shows there too.
    """
    config = paper.Config(steps=60, warmup=5, lr=3e-4, lr_soft=1e-4, norms=False, problems=128)
    task = paper.load_task(config, 100)
    base = paper.load_base(config, task, 100, progress=False)
    intact = verdicts(tmp_path / "intact", base, task, config)
    monkeypatch.setattr(paper, "advantages", lambda rewards, baseline: -advantages(rewards, baseline))
    broken = verdicts(tmp_path / "broken", base, task, config)
    assert intact["sample_gap"].verdict == "holds", intact
    assert broken["sample_gap"].verdict == "does not hold", broken
    assert broken["soft_learns"].verdict == "does not hold", broken
    assert broken["soft_learns"].interval.mean < intact["soft_learns"].interval.mean - 0.05, (intact, broken)
