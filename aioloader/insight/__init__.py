"""What a loader knows about itself: counters, a frozen snapshot of them, and a sentence."""
