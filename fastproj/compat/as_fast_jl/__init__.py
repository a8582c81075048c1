"""A folder to put on ``sys.path``: it makes ``import fast_jl`` find fastproj."""
