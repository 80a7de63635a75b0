"""A small real inference engine: one process, one worker, a transformer behind the engines' HTTP routes.

The default engine of the demo and of the tests. Serving needs the `demo` extra; nothing else in the
package imports this one.

    python -m ckpt_engine.embedded_engine --model DIR --port 0
"""

from __future__ import annotations

from ckpt_engine.errors import CkptEngineError


def missing_extra(error: ImportError) -> CkptEngineError:
    """What to raise when a package of the `demo` extra cannot be imported."""
    return CkptEngineError(
        f"The embedded engine could not import {error.name or 'a package that it needs'} ({error}). "
        "Install what it needs with: pip install 'ckpt-engine[demo]'"
    )
