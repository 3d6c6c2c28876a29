"""Experiments with gossip: what a mesh of so many peers does under such and such faults, measured over many seeds."""
