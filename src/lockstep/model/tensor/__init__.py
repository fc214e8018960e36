"""Tensor parallel: every rank computes a slice of every layer, and sums meet in all_reduces.

    shares       numbers -> everybody's heads, columns and rows (pure)
    attention    which attention blocks can be cut, and where (reads names and shapes)
    mlp          the same for feed-forward blocks and experts
    pieces       a cut of one module -> the slice of each of its parameters
    plan         a whole model -> all of these, for all ranks
    collectives  what is reduced and gathered, and in which module
    origins      which tensors of the checkpoint a parameter is made of
    loader       checkpoint + cut -> this rank's evaluated slices

Only one path serves even and uneven cuts alike. mlx-lm's own `shard()` methods cover 24 of its models and
even cuts; a second path would double what must be shown to be right.
"""
