"""From metas to an update plan: pure functions, the same on every rank, no device touched."""
