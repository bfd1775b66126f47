"""What can be done to samples: the description of each stage and, for folds, its rule."""
