"""The Distillation Workbench: papers on pre-training and distillation that run, and whose claims are judged."""

__version__ = "0.1.0"
