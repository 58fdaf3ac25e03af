"""The file forms of weights, each read a tensor at a time."""
