"""Draw docs/images/packages.svg from the import contracts in pyproject.toml.

python docs/packages_picture.py            write the picture
python docs/packages_picture.py --check    exit 1 if the picture does not match the contracts
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "packages.svg"

WIDTH, MARGIN, GAP = 900, 24, 14
BOX_HEIGHT, LAYER_HEIGHT = 46, 68
TOP = 64
COLORS = {"never imports torch": "#d8ecd8", "some modules never import torch": "#fbf1cf", "may import torch": "#f6d9cf"}
ABOUT = {
    "cli": "one file per command",
    "worker": "what runs on the nodes",
    "clusters": "submit, state, logs, cancel",
    "evaluate": "answers, verdicts, scores",
    "train": "the training loop",
    "export": "the Hugging Face folder",
    "data": "sources, masks, packing",
    "checkpoint": "store, shards, mirror",
    "tracking": "metrics, goodput, W&B",
    "runs.run_store": "run directories",
    "runs.journal": "events and their fold",
    "plan": "pure: batch, memory, GPUs",
    "config": "Hydra in, RunConfig out",
}


def contracts() -> list[dict[str, Any]]:
    """Read the import contracts."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)
    return list(settings["tool"]["importlinter"]["contracts"])


def layers() -> list[list[str]]:
    """Return the layers from top to bottom, each as its module names without the `launcher.` prefix."""
    layered = next(contract for contract in contracts() if contract["type"] == "layers")
    return [
        [name.strip(" ()").removeprefix("launcher.") for name in layer.replace(":", "|").split("|")]
        for layer in layered["layers"]
    ]


def torch_use(module: str) -> str:
    """Describe whether a module may import torch, according to the contract that forbids it."""
    forbidden = next(contract for contract in contracts() if "torch" in contract.get("forbidden_modules", ()))
    names = {name.removeprefix("launcher.") for name in forbidden["source_modules"]}
    if module in names or module.partition(".")[0] in names or module == "errors":
        return "never imports torch"
    partly = any(name.startswith(f"{module}.") for name in names)
    return "some modules never import torch" if partly else "may import torch"


def render() -> str:
    """Draw the picture."""
    rows = layers()
    height = TOP + LAYER_HEIGHT * len(rows) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="14">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        *_legend(),
    ]
    for number, names in enumerate(rows):
        parts += _layer(names, TOP + number * LAYER_HEIGHT)
    bottom = TOP + LAYER_HEIGHT * (len(rows) - 1) + BOX_HEIGHT
    parts.append(
        f'<path d="M{WIDTH - MARGIN - 22} {TOP} V{bottom}" stroke="#555" stroke-width="2" marker-end="url(#head)"/>'
        f'<text x="{WIDTH - MARGIN - 8}" y="{(TOP + bottom) // 2}" fill="#333" text-anchor="middle" '
        f'transform="rotate(90 {WIDTH - MARGIN - 8} {(TOP + bottom) // 2})">may import</text>'
    )
    return "\n".join([*parts, "</svg>", ""])


def _legend() -> list[str]:
    parts = []
    x = MARGIN
    for meaning, color in COLORS.items():
        parts.append(f'<rect x="{x}" y="18" width="18" height="18" rx="4" fill="{color}" stroke="#888"/>')
        parts.append(f'<text x="{x + 26}" y="32" fill="#333">{meaning}</text>')
        x += 60 + 8 * len(meaning)
    return parts


def _layer(names: Sequence[str], top: int) -> list[str]:
    """Draw the boxes of one layer side by side."""
    room = WIDTH - 2 * MARGIN - 50
    width = (room - GAP * (len(names) - 1)) / len(names)
    parts = []
    for column, name in enumerate(names):
        left = MARGIN + column * (width + GAP)
        middle = left + width / 2
        about = ABOUT.get(name, "")
        parts.append(
            f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="6" '
            f'fill="{COLORS[torch_use(name)]}" stroke="#888"/>'
        )
        parts.append(
            f'<text x="{middle:.0f}" y="{top + (20 if about else 28)}" text-anchor="middle" font-weight="bold" fill="#222">'
            f"{escape(name)}</text>"
        )
        if about:
            parts.append(
                f'<text x="{middle:.0f}" y="{top + 37}" text-anchor="middle" font-size="12" fill="#333">{escape(about)}</text>'
            )
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the picture and return the exit code."""
    parser = argparse.ArgumentParser(description="Draw the packages and the direction of their imports.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the picture is not current")
    if not parser.parse_args(argv).check:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        PICTURE.write_text(render(), encoding="utf-8")
        return 0
    if PICTURE.is_file() and PICTURE.read_text(encoding="utf-8") == render():
        return 0
    print(f"{PICTURE.relative_to(ROOT)} differs from the contracts in pyproject.toml; write it with: make docs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
