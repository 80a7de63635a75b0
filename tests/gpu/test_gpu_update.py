"""Every integration test of an update, on a GPU: CUDA IPC, events, pinned arenas."""

from __future__ import annotations

from tests.integration.test_update import *
