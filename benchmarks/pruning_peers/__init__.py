"""What other tools would prune of the trained networks."""
