"""What a `DataLoader` is made of: its arguments, the plan of an epoch, and what runs without workers."""
