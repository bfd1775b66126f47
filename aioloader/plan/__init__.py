"""A pipeline as it is described, what that says of its samples, and how nodes are made of it; pure."""
