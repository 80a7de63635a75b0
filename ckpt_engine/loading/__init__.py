"""What engines' adapters share: an update's tensors, and what the engine's own models would do with them."""
