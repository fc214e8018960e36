"""Lockstep: one large language model across several machines, with MLX."""

__version__ = "0.1.0"
