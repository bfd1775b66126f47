"""How a pipeline runs: nodes, windows, the supervisor, and the two faces."""
