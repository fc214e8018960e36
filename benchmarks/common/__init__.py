"""What the benchmarks share: models, processes, servers, statistics and reports."""
