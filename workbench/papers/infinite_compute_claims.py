"""What "Pre-training under infinite compute" claims, and how each claim is measured here.

Margins were set on run seed 9 (groups 90..) of the tuning split, before any judging group was trained.
"""

from workbench.evaluation.claims import Claim

TITLE = "Pre-training under infinite compute"
AUTHORS = "Konwoo Kim, Suhas Kotha, Percy Liang, Tatsunori Hashimoto"
ARXIV = "2509.14786"
ABOUT = (
    "With data fixed and compute free, more epochs and parameters over-fit unless weight decay grows far beyond 0.1; "
    "ensembles have a lower asymptote than one ever larger model, and most of it survives distillation into one."
)  # fmt: skip
NOTEBOOK = "01_infinite_compute.ipynb"

CLAIMS = (
    Claim(
        "overfit", "At the usual weight decay, more epochs over-fit: validation loss rises", "300M: best at 8 epochs",
        "Fig. 2", "overfit_gap", "nats", ">=", 0.1,
    ),
    Claim(
        "decay", "Tuning weight decay jointly beats the tuned standard recipe at equal data",
        "3.75 → 3.57 at 300M (0.18)", "Fig. 3", "decay_gain", "nats", ">=", 0.05,
    ),
    Claim(
        "thirty", "The best weight decay is about 30 times the usual 0.1", "3.2 / 0.1 = 32× at 600M and 1.4B",
        "§3", "decay_ratio", "×", ">=", 8.0,
    ),
    Claim(
        "monotone", "Regularised, the loss falls as the model grows", "0.05 / N^1.02 + 3.43", "Fig. 3", "width_gain",
        "nats", ">=", 0.0,
    ),
    Claim(
        "ensemble", "An ensemble of small models beats the best single model of any size", "3.34 limit against 3.43",
        "Fig. 4", "ensemble_gain", "nats", ">=", 0.05,
    ),
    Claim(
        "slope", "Members with more epochs and less decay gain more from being averaged", "K = 1: 3.71, yet limit 3.27",
        "Fig. 5", "slope_gain", "nats", ">=", 0.02,
    ),
    Claim(
        "flip", "Members tuned for K → ∞ reach a lower limit than the best single model's setting", "3.34 → 3.27",
        "Fig. 5", "limit_gain_k", "nats", ">=", 0.0,
    ),
    Claim(
        "joint", "First K then N to infinity is lower than N alone (extrapolated)", "3.43 → 3.17 (0.26)", "Fig. 6",
        "joint_gain", "nats", ">=", 0.05,
    ),
    Claim(
        "efficiency", "An ensemble is worth several times the data of the standard recipe", "5.17× (3.75× measured)",
        "Fig. 7", "efficiency_ensemble", "×", ">=", 1.5,
    ),
    Claim(
        "distil", "A student of the ensemble's text beats real text alone at equal steps", "3.57 → 3.36", "Fig. 9",
        "distil_gain", "nats", ">=", 0.02,
    ),
    Claim(
        "retained", "The student keeps most of the ensemble's gain", "83 %", "Fig. 9", "retained", "%", ">=", 50.0,
    ),
    Claim(
        "self", "Self-distillation alone improves on real text at equal steps", "3.57 → 3.43", "§5, Fig. 9",
        "self_gain", "nats", ">=", 0.0,
    ),
    Claim(
        "real", "Synthetic text alone is worse than mixed with real text", "4.069 against 3.437", "Tab. 4", "real_gain",
        "nats", ">=", 0.02,
    ),
)  # fmt: skip
