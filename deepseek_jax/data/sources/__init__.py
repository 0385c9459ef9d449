"""TFDS builders, one a file, each made from what is already installed."""
