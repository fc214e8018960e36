"""From a checkpoint to the part of the model that one rank computes."""
