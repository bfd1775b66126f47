"""Host memory of batches, used again as soon as nothing refers to it any more; shared memory that is mapped here."""
