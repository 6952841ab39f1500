"""Image metrics: FID, KID, CMMD, CLIP score. How to add one: `base.py`."""
