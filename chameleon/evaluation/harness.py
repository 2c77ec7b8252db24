"""The command of lm-evaluation-harness with our model registered: `python -m chameleon.evaluation.harness run …`."""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

from chameleon.evaluation.lm_eval_model import ChameleonLM

__all__ = ["ChameleonLM"]

if __name__ == "__main__":
    sys.argv[0] = "lm_eval"
    cli_evaluate()
