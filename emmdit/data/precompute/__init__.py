"""Resumable data jobs: precomputed latents and generated datasets."""
