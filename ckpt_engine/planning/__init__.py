"""From metas to an update plan: pure functions, the same on every rank, no device touched."""

from ckpt_engine.planning.receivers import assign_receiver_ranks, balance_receiver_ranks

__all__ = ["assign_receiver_ranks", "balance_receiver_ranks"]
