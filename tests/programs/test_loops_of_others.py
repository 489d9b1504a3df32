"""Lightning (automatic and manual optimisation) and skorch train with a wrapped optimiser, where they are installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from launching import WHOLE_TORCH, run_ranks

PROGRAM = Path(__file__).with_name("loops_of_others.py")
PACKAGES = {"pytorch_lightning": "lightning", "skorch": "skorch"}


def test_they_train_as_a_plain_loop_with_all_data():
    found = [word for package, word in PACKAGES.items() if importlib.util.find_spec(package)]
    if not found:
        pytest.skip("neither is installed: pip install pytorch-lightning skorch")
    result = run_ranks(2, [sys.executable, str(PROGRAM), *found], timeout=180, env=WHOLE_TORCH)
    assert result.returncode == 0, result.output
    assert result.stdout.count(": trained") == 2 * (2 * ("lightning" in found) + ("skorch" in found)), result.output
