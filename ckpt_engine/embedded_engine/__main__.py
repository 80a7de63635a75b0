"""`python -m ckpt_engine.embedded_engine`: see `server.main`."""

from __future__ import annotations

import os
import sys

from ckpt_engine.errors import CkptEngineError

if __name__ == "__main__":
    # Before transformers is imported, which reads it then.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from ckpt_engine.embedded_engine.server import main

        sys.exit(main())
    except CkptEngineError as error:
        sys.exit(f"error: {error}")
