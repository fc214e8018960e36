"""Tensor parallel: every rank computes a slice of every layer, and sums meet in all_reduces.

shares      numbers -> everybody's heads, columns and rows (pure)
blocks      which modules of a model can be cut, and where (reads names and shapes)
pieces      a cut of one module -> the slice of each of its parameters
collectives what is reduced and gathered, and in which module
loader      checkpoint + cut -> this rank's evaluated shard
"""

from lockstep.model.tensor.loader import Loaded, TensorParallel, load, plan

__all__ = ["Loaded", "TensorParallel", "load", "plan"]
