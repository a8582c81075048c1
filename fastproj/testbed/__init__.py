"""Real data, small models, and many of them trained at once.

The demo and the benchmarks stand on it; nothing else in fastproj imports from here.
"""
