"""HTTP: the client that asks an engine to receive, and the parameter server's own API."""
