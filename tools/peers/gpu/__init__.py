"""Peers of our operators on a GPU, at the shapes of the contracts: see `python3 tools/peers/gpu --help`."""
