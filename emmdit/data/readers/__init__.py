"""Storage formats: one reader a file, listed in `emmdit.data.readers.open`."""
