"""How ranks reach each other: the control plane, collectives, and the host's shared memory."""
