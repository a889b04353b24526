"""Reports from run folders only: a page of one run, and a comparison of several."""
