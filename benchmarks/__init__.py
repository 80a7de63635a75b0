"""Speed and memory, measured as JSON lines. Every figure stands beside a limit or a peer of the same run."""
