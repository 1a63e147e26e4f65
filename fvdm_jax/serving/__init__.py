"""The page on which videos are made, for this machine alone."""
