"""Words of everybody: what has no room of its own, and imports nothing but errors."""
