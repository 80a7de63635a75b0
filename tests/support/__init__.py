"""Real processes for the tests: a worker, a rank that drives it, and what they say to each other."""
