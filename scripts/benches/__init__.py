"""The benches of `scripts/bench`: each measures one figure on a mesh of three real agents."""
