"""From the description of a pipeline to what runs."""
