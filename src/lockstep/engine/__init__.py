"""Deciding steps (rank 0) and executing them (every rank)."""
