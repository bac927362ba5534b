#!/usr/bin/env python3
"""The classic script: `python3 core/train.py --dataset data.jsonl --model qwen3 --output outputs`.

The same flags as `trainer train`, and `UltimateTrainer` for scripts that build on it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV_PYTHON = ROOT / ".venv" / "bin" / "python"
sys.path.insert(0, str(ROOT))


def use_installed_python() -> None:
    """Go on in `.venv`, which `make` set up, where this Python has not what is needed."""
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        return
    if VENV_PYTHON.exists() and Path(sys.prefix) != VENV_PYTHON.parent.parent:
        os.execv(VENV_PYTHON, [str(VENV_PYTHON), __file__, *sys.argv[1:]])
    sys.exit(
        f"error: {sys.executable} has not what training needs (torch, transformers, ...). Run "
        f"`make demo` in {ROOT} once, or `pip install -e {ROOT} -c {ROOT}/constraints.txt`."
    )


if __name__ == "__main__":
    use_installed_python()

from trainer.child import quiet_libraries  # noqa: E402  (only after the right Python runs)

quiet_libraries()

from trainer.cli import main  # noqa: E402
from trainer.commands.classic import UltimateTrainer  # noqa: E402

__all__ = ["UltimateTrainer"]

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
