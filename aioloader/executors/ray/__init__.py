"""Work in actors of a Ray cluster. Nothing here imports Ray before it is asked for."""
