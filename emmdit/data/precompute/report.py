"""What of the data set a training sees, by source and by bucket, and what each bucket loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from emmdit.data.buckets import cropped, size
from emmdit.data.order import Order


def report(order: Order, names: Sequence[str] | None = None, sizes: np.ndarray | None = None) -> dict[str, Any]:
    """`sources` and `buckets`, a dict for each; nothing is dropped but what is cropped.

    Sources: `samples`, `draws` an epoch, `passes` (draws per sample and epoch). Buckets: `height`, `width`, `samples`,
    `draws` and `runs` an epoch, `waits` (samples that the first epoch leaves to the next, because they fill no run),
    `cropped` (mean part of a picture's area; None where the sizes are not known).

    Args:
        names: of the sources, where the order mixes some.
        sizes: (samples, 2) height and width of the pictures before the crop.
    """
    sources = []
    for place, name in enumerate(names or ()):
        draws = sum(group.draws[place] for group in order.groups)
        count = order.counts[place]
        sources.append({"name": name, "samples": count, "draws": draws, "passes": draws / count})
    buckets = []
    for group in order.groups if len(order.groups) > 1 else ():
        height, width = size(group.bucket)
        lost = None
        if sizes is not None:
            known = sizes[group.members]
            known = known[known.min(1) > 0]
            lost = float(cropped(known, (height, width)).mean()) if len(known) else None
        row = {"height": height, "width": width, "samples": sum(group.counts), "draws": group.length}
        buckets.append({**row, "runs": group.length / order.run, "waits": group.length % order.run, "cropped": lost})
    return {"epoch": order.length, "run": order.run, "sources": sources, "buckets": buckets}


def report_text(found: dict[str, Any]) -> str:
    """A line for each source and bucket; empty for a single source in a single bucket."""
    lines = []
    if found["sources"] or found["buckets"]:
        lines.append(f"{found['epoch']:,} draws an epoch")
    for row in found["sources"]:
        share = row["draws"] / found["epoch"]
        lines.append(
            f"  {row['name']}: {row['samples']:,} samples, {share:.1%} of the draws, {row['passes']:.2f} passes"
        )
    for row in found["buckets"]:
        lost = "" if row["cropped"] is None else f", {row['cropped']:.1%} of the area cropped"
        lines.append(
            f"  {row['height']} x {row['width']} (height x width): {row['samples']:,} samples, {row['runs']:.2f} runs "
            f"of {found['run']:,}, {row['waits']:,} samples wait for the next epoch{lost}"
        )
    return "\n".join(lines)
