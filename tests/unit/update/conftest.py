from __future__ import annotations

import sys
from pathlib import Path

# Lets the tests of this folder import its helper modules, whatever pytest's import mode.
sys.path.insert(0, str(Path(__file__).parent))
