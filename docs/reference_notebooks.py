"""Make a page from each notebook in docs/notebooks, with the outputs that are stored in it.

mkdocs runs this script when it builds the site; the pages exist only there. The script reads the notebook's JSON
itself, because nbconvert would need a dozen more packages.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mkdocs_gen_files

NOTEBOOKS = Path(__file__).parent / "notebooks"


def notebook_page(path: Path, pictures: dict[str, bytes]) -> Iterator[str]:
    """Yield the paragraphs of a notebook's page, and put its pictures into `pictures` by their names on the page."""
    notebook: dict[str, Any] = json.loads(path.read_text())
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
            continue
        yield f"```python\n{source}\n```"
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{number}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                yield f"![The picture that the code above draws]({name})"
            else:
                yield "```\n" + "".join(output.get("text") or data["text/plain"]).rstrip("\n") + "\n```"


for path in sorted(NOTEBOOKS.glob("*.ipynb")):
    pictures: dict[str, bytes] = {}
    download = f"This page is a [notebook]({path.name}) that you can download and run yourself."
    title, *rest = notebook_page(path, pictures)
    with mkdocs_gen_files.open(f"notebooks/{path.stem}.md", "w") as page:
        page.write("\n\n".join([title, download, *rest]) + "\n")
    for name, content in pictures.items():
        with mkdocs_gen_files.open(f"notebooks/{name}", "wb") as picture:
            picture.write(content)
