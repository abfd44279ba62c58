"""Ways to rank visual tokens, one file each."""
