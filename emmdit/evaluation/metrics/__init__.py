"""Image metrics: FID, KID, CMMD, CLIP score."""
