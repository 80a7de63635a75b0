"""Updates running engines: `torchrun --nproc-per-node 8 examples/update.py --checkpoint-path PATH ...`

The same as `ckpt-engine update`, which has the list of options: `python examples/update.py --help`.
"""

from __future__ import annotations

import sys

from ckpt_engine.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "update")
    sys.exit(main())
