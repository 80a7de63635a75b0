"""The protocol between a parameter server and an engine's worker, and its two ends."""
