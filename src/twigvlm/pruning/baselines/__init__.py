"""Published ways to rank visual tokens, one small file per method, all under the same budget formula."""
