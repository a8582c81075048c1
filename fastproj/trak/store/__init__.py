"""What a run keeps on disk: features by checkpoint and sample, scores by experiment."""
