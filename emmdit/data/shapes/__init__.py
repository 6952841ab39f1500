"""The embedded world of coloured shapes (DESIGN 6): scenes, captions, renders and the reader of pictures."""

from .dataset import ShapesDataset
from .read import Found, contents_match, read_scene
from .render import GROUND, PALETTE, SHAPES, render_scene
from .world import FIXED_PROMPTS, TASKS, Scene, ShapeObject, ShapesWorld, unknown_words

__all__ = [
    "FIXED_PROMPTS",
    "GROUND",
    "PALETTE",
    "SHAPES",
    "TASKS",
    "Found",
    "Scene",
    "ShapeObject",
    "ShapesDataset",
    "ShapesWorld",
    "contents_match",
    "read_scene",
    "render_scene",
    "unknown_words",
]
