"""How good scores are: correlations with retrained models, mislabelled data, reports."""
