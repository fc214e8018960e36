"""Starting the ranks: hosts, processes, their output and their end. Knows nothing of mlx."""
