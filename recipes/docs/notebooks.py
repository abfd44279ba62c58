"""Run the notebooks of examples/ on Sapling itself, without Jupyter: `python -m recipes.docs.notebooks`, some ten minutes.

Tests run the same cells on a tiny model.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples"


def code(path: Path) -> list[str]:
    """The code cells of a notebook, in order."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def main() -> None:
    """Run all notebooks, each in a namespace of its own; the first error ends it."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        print(f"== {path.name}", flush=True)
        names: dict[str, object] = {}
        for number, source in enumerate(code(path)):
            exec(compile(source, f"{path.name}, cell {number}", "exec"), names)


if __name__ == "__main__":
    main()
