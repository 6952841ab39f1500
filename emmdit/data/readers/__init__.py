"""Storage formats: one reader a file."""
