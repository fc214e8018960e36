"""A group of which only one rank is there."""


class TwoRanks:
    """Their group, as seen by rank 0 while the other does something else."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2
