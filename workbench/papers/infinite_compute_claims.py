"""What "Pre-training under infinite compute" claims, and how each claim is measured here."""

from workbench.evaluation.claims import Claim

TITLE = "Pre-training under infinite compute"
AUTHORS = "Kim, Kotha, Liang, Hashimoto"
ARXIV = "2509.14786"
ABOUT = "t"
NOTEBOOK = "01_infinite_compute.ipynb"
CLAIMS: tuple[Claim, ...] = ()
