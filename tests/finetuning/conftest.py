"""Makes the tiny models of `tests/adapters` importable here."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "adapters"))
