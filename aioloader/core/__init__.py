"""What everything else uses, from entries to checks of arguments; it imports nothing but errors and masking."""
