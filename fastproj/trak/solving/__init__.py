"""From features to scores: the ridge, the linear system, and who computes which part of it."""
