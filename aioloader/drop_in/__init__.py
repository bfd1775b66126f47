"""What is behind `DataLoader`: its arguments, the plan of an epoch, and what runs without workers."""
