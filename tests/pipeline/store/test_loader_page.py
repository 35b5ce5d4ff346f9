"""The example of docs/loader.md runs, and needs torch and the store alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from capgap.pipeline.store.codec import SAMPLED
from capgap.schemas.manifest import Manifest

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "loader.md").read_text()
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lightning", "transformers", "vllm", "tokenizers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
"""
ALONE = """
unwanted = ("lightning", "transformers", "vllm", "capgap.kernels", "capgap.jobs", "capgap.pipeline.workflow")
print([name for name in unwanted if name in sys.modules])
"""


def test_the_example_runs_in_ten_lines_without_the_rest_of_capgap(codecs, make_reader, tmp_path: Path) -> None:
    (code,) = re.findall(r"<!-- a test runs this -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    reader = make_reader(codecs[SAMPLED], ((5, 5), (4, 3)))
    manifest = Manifest.model_construct(
        stage="cache",
        instance="cache",
        settings={},
        inputs={},
        identity="",
        content="",
        files=(),
        shard_sets={"sampled": reader.shard_set},
        versions={},
        started="",
        wall_s=0.0,
        command=(),
    )
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "shards").rename(tmp_path / "runs" / "mine" / "cache")
    (tmp_path / "runs" / "mine" / "cache" / "manifest.json").write_text(manifest.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + code + ALONE], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert [line.split()[-1] for line in lines] == ["8", "16", "24", "32"]
    assert all(line.startswith("torch.Size([8, 12]) torch.Size([96, ") for line in lines)
