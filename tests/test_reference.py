"""The committed reference runs: every verdict follows from the committed metrics, and the README shows it."""

import json
import re
from pathlib import Path

import pytest

from workbench import papers
from workbench.evaluation.claims import judge
from workbench.runs import report
from workbench.training.record import read_records

ROOT = Path(__file__).resolve().parents[1]
KEPT = sorted(p.parent for p in (ROOT / "outputs" / "reference").glob("*/claims.json"))


@pytest.mark.parametrize("kept", KEPT, ids=lambda p: p.name)
def test_each_verdict_is_what_the_stored_metrics_give(kept):
    records = list(read_records(kept / "metrics.jsonl"))
    stored = {c["claim"]["id"]: c for c in json.loads((kept / "claims.json").read_text())}
    # judged with today's claims: a margin or a sentence changed after the run shows here
    today = {c.id: json.loads(json.dumps(judge(c, records).as_dict())) for c in papers.load(kept.name).CLAIMS}
    assert today.keys() == stored.keys()
    for claim, judgement in today.items():
        before = stored[claim]
        assert judgement["claim"] == before["claim"]
        assert (judgement["verdict"], judgement["why"]) == (before["verdict"], before["why"])
        assert judgement["values"] == before["values"]
        if judgement["interval"]:
            assert judgement["interval"] == pytest.approx(before["interval"], rel=1e-9)


@pytest.mark.parametrize("kept", KEPT, ids=lambda p: p.name)
def test_a_reference_is_small_and_names_its_command(kept):
    assert sum(f.stat().st_size for f in kept.iterdir()) < 250_000
    assert (kept / "command.txt").read_text() == report.command(kept) + "\n"


@pytest.mark.skipif(not KEPT, reason="no reference run is committed")
def test_the_readme_shows_the_committed_verdicts():
    between = re.search(r"<!-- claims:[^>]*-->\n(.*?)<!-- /claims -->", (ROOT / "README.md").read_text(), re.S)
    assert between, "README.md lacks the markers between which the claims table stands"
    assert between[1].strip() == report.markdown(report.references()).strip()
