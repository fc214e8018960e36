"""What every rank runs: join, load, then the same steps in the same order."""
