"""Fuzz targets of the readers: valid files, mutated; a short run in `make test`, a long one by `make fuzz`."""
