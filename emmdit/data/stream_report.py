"""Report of what an epoch of the training stream holds, by source and by bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from emmdit.data.buckets import cropped
from emmdit.data.stream import Order


def report(
    order: Order,
    names: Sequence[str] = (),
    buckets: Sequence[tuple[int, int]] = (),
    sizes: np.ndarray | None = None,
) -> dict[str, Any]:
    """`sources` and `buckets`, a dict for each.

    Sources: `samples`, `draws` an epoch, `share` of all draws, `passes` (draws per sample and epoch).
    Buckets: `height`, `width`, `samples`, `draws` and `chunks` an epoch, `carried_over` (samples that the first epoch
    leaves to the next, because they do not fill a chunk), `cropped` (mean part of an image's area; None where the sizes
    are unknown).

    Args:
        names: of the sources, where the order mixes some.
        buckets: (height, width) of each bucket.
        sizes: (samples, 2) height and width of the images before the crop.
    """
    sources = []
    for place, name in enumerate(names):
        draws = sum(group.draws[place] for group in order.groups)
        count = order.counts[place]
        row = {"name": name, "samples": count, "draws": draws, "share": draws / order.length, "passes": draws / count}
        sources.append(row)
    rows = []
    for group in order.groups if order.chunk is not None else ():
        lost = None
        if sizes is not None:
            known = sizes[group.members]
            known = known[known.min(1) > 0]
            lost = float(cropped(known, buckets[group.bucket]).mean()) if len(known) else None
        height, width = buckets[group.bucket]
        row = {"height": height, "width": width, "samples": sum(group.counts), "draws": group.length}
        row |= {"chunks": group.length / order.chunk, "carried_over": group.length % order.chunk, "cropped": lost}
        rows.append(row)
    return {"epoch": order.length, "chunk": order.chunk, "sources": sources, "buckets": rows}
