"""Training runs that farcli can repeat from a seed."""
