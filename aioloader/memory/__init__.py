"""Host memory of batches: used again, as soon as nobody can see what was in it."""
