"""Models whose images are cut into tiles, small."""

from __future__ import annotations


def token_names(side: int = 8) -> dict[str, str]:
    """The 66 special tokens of nanoVLM's models with tiles, fewer for fewer tiles per side."""
    places = [(row, column) for row in range(1, side + 1) for column in range(1, side + 1)]
    return {
        "image_token": "<|image|>",
        "global_image_token": "<|global_image|>",
        **{f"r{row}c{column}": f"<row_{row}_col_{column}>" for row, column in places},
    }
