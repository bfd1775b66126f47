"""What a loader measures of itself: counters, a frozen snapshot of them, and a sentence that explains them."""
