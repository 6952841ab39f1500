"""What `emmdit inspect-data` found, to look at: text, a contact sheet with captions, charts of lengths and sizes."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from emmdit.data.precompute.precompute import Item


def as_text(report: dict[str, Any], bar: int = 40, rejects: int = 20) -> str:
    """The report to read: a line for each fact."""
    lines = [
        f"{name:<10} {report[name]}" for name in ("source", "licence", "card", "columns", "encoder") if report.get(name)
    ]
    looked, rows = report["looked_at"], report["rows"]
    left = sum(report["rejected"].values())
    lines.append(
        f"{'rows':<10} {rows:,} ({report['kind']}); looked at {looked:,}: {report['good']:,} good, {left:,} left out"
    )
    lines += [f"  left out   {count:,} {reason}" for reason, count in report["rejected"].items()]
    for reject in report["rejects"][:rejects]:
        key = f" ({reject['key']})" if reject["key"] else ""
        lines.append(f"    row {reject['row']}{key}: {reject['reason']}: {reject['detail']}")
    if len(report["rejects"]) > rejects:
        lines.append(f"    and {len(report['rejects']) - rejects:,} more, see report.json")
    if sizes := report["sizes"]:
        for name in ("width", "height", "short_side", "ratio"):
            row, digits = sizes[name], 2 if name == "ratio" else 0
            points = ", ".join(f"{key} {row[key]:.{digits}f}" for key in ("min", "p5", "median", "p95", "max"))
            lines.append(f"{name.replace('_', ' '):<10} {points}")
        common = ", ".join(f"{r['width']} x {r['height']} ({r['images']:,})" for r in sizes["most_frequent"])
        lines.append(f"{'frequent':<10} {common} (width x height)")
    captions = report["captions"]
    several = ", ".join(f"{images:,} images with {count}" for count, images in captions["an_image"].items())
    lines.append(f"{'captions':<10} {captions['captions']:,} ({several}); {captions['repeated']:,} repeat another one")
    for row in captions["in"]:
        if row["lengths"] is None:
            continue
        points = ", ".join(f"{key} {row['lengths'][key]:.0f}" for key in ("min", "p5", "median", "mean", "p95", "max"))
        cut = (
            ""
            if row["cut"] is None
            else f"; {row['cut']:,} ({row['cut'] / captions['captions']:.1%}) cut at {row['max_length']}"
        )
        lines.append(f"{'length':<10} in {row['unit']}: {points}{cut}")
        most = max(step["count"] for step in row["histogram"])
        for step in row["histogram"]:
            mark = "#" * round(bar * step["count"] / most) or "." * bool(step["count"])
            lines.append(f"  {step['from']:>5}-{step['to'] - 1:<5} {step['count']:>8,} {mark}".rstrip())
    if buckets := report["buckets"]:
        what = f"steps of {buckets['step']} px, up to {buckets['max_ratio']:g}:1" if "step" in buckets else "as encoded"
        lines.append(
            f"{'buckets':<10} at {buckets['resolution']} px, {what}: {buckets['cropped']:.1%} of the area cropped; "
            f"the square crop takes {buckets['cropped_square']:.1%}"
        )
        for row in buckets["rows"]:
            lost = "" if row["cropped"] is None else f", {row['cropped']:.1%} cropped"
            lines.append(f"  {row['width']:>5} x {row['height']:<5} {row['images']:>8,} {row['share']:>6.1%}{lost}")
    if latents := report.get("latents"):
        lines.append(
            f"{'latents':<10} {latents['shape']} {latents['dtype']}: mean {latents['mean']:.3f}, standard deviation "
            f"{latents['std']:.3f} over {latents['samples']:,} samples"
        )
    return "\n".join(lines)


def contact_sheet(items: list[Item], side: int = 160, columns: int = 6, lines: int = 4) -> Image.Image:
    """Thumbnails in reading order with number and caption below; a row that is left out as its reason."""
    font = ImageFont.load_default(11)
    height, gap = side + 14 * (lines + 1) + 4, 8
    rows = -(-len(items) // columns)
    columns = min(columns, len(items))
    canvas = Image.new("RGB", (columns * (side + gap) + gap, rows * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for place, item in enumerate(items):
        left, top = gap + place % columns * (side + gap), gap + place // columns * (height + gap)
        if item.pixels is not None:
            image = Image.fromarray(item.pixels)
            canvas.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
        else:
            draw.rectangle((left, top, left + side - 1, top + side - 1), fill="#eeeeee", outline="#bb2222")
            text = _wrapped(f"{item.reason}: {item.detail}" if item.reason else "no picture", 24, 9)
            draw.multiline_text((left + 6, top + 6), text, fill="#bb2222", font=font)
        caption = next((text for text in item.captions if text), "")
        size = " ({} x {})".format(*item.original) if item.original != (0, 0) else ""
        draw.text((left, top + side + 2), f"row {item.row}{size}", fill="#666666", font=font)
        draw.multiline_text((left, top + side + 16), _wrapped(caption, 27, lines), fill="black", font=font)
    return canvas


def _wrapped(text: str, width: int, lines: int) -> str:
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return "\n".join(textwrap.wrap(printable, width, max_lines=lines, placeholder=" ..."))


def charts(report: dict[str, Any], file: Path) -> None:
    """Lengths of the captions, short sides and buckets, side by side as one PNG."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    counted = [row for row in report["captions"]["in"] if row["histogram"]]
    parts = (
        len(counted) + 2 * (report["sizes"] is not None) - (report["buckets"] is None and report["sizes"] is not None)
    )
    if not parts:
        return
    figure = Figure(figsize=(4.6 * parts, 3.4), layout="constrained")
    axes = iter(figure.subplots(1, parts, squeeze=False)[0])
    for row in counted:
        axis = next(axes)
        _bars(axis, row["histogram"])
        axis.set_title(f"captions in {row['unit']}", fontsize=9)
        if row["max_length"] is not None:
            axis.axvline(row["max_length"], color="#bb2222", linewidth=1)
            axis.set_xlabel(f"cut at {row['max_length']}: {row['cut']:,} of {report['captions']['captions']:,}")
    if report["sizes"] is not None:
        axis = next(axes)
        _bars(axis, report["sizes"]["short_sides"])
        axis.set_title("short side in pixels", fontsize=9)
    if report["sizes"] is not None and report["buckets"] is not None:
        axis = next(axes)
        rows = report["buckets"]["rows"]
        axis.bar([f"{row['width']}x{row['height']}" for row in rows], [row["images"] for row in rows], color="#4477aa")
        axis.tick_params(axis="x", rotation=90, labelsize=7)
        axis.set_title("buckets, width x height", fontsize=9)
    figure.savefig(file, dpi=110)


def _bars(axis: Any, steps: list[dict[str, int]]) -> None:
    axis.bar(
        [step["from"] for step in steps],
        [step["count"] for step in steps],
        [step["to"] - step["from"] for step in steps],
        align="edge",
        color="#4477aa",
        edgecolor="white",
    )
