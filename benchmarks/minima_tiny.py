"""Run every step of MiniMA and MiniChat by one command, at the smallest size: `make minima`.

    base teacher --+
    conversations -+-> adapt -> cache -> prune -> train -> tune -> eval -> answers -> judge -> report
    judge's server +

The teacher that jobs/runs/minima-tiny.yaml names is trained first, conversations are made from the standard library's
docstrings, and a real vLLM server with random weights is the judge. What is finished is not made again.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
RUN, BASE = (ROOT / "jobs" / "runs" / f"{name}.yaml" for name in ("minima-tiny", "minima-tiny-base"))
OUT = Path("runs/minima-tiny")
NUM_CONVERSATIONS = 600
SERVER_START_S = 600
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def main() -> int:
    """Make the inputs of the run, then run it, and return its exit code."""
    epilog = "All flags are those of `capgap run`."
    _, flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=epilog).parse_known_args()
    for stage in ("corpus", "teacher"):
        code = _capgap("run", str(BASE), "--only", stage)
        if code:
            return code
    OUT.mkdir(parents=True, exist_ok=True)
    _write_conversations(OUT / "conversations.jsonl")
    with _judge(OUT / "judge-model", str(yaml.safe_load(RUN.read_text())["judge"]["base_url"])):
        return _capgap("run", str(RUN), *flags)


def _capgap(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "capgap.jobs.cli", *arguments], check=False).returncode


def _write_conversations(path: Path) -> None:
    """Write conversations of two turns: what a function of the standard library does, and where it is."""
    if path.exists():
        return
    lines = []
    for module, name, sentence in _documented():
        said = [
            {"role": "user", "content": f"What does {name} do?"},
            {"role": "assistant", "content": sentence},
            {"role": "user", "content": "Where is it?"},
            {"role": "assistant", "content": f"In the module {module}."},
        ]
        lines.append(json.dumps({"messages": said}) + "\n")
        if len(lines) == NUM_CONVERSATIONS:
            break
    path.write_text("".join(lines))


def _documented() -> Iterator[tuple[str, str, str]]:
    """Yield module, name and first sentence of public functions and classes, in the order of the files."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.glob("*.py")):
        for node in ast.parse(path.read_bytes()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            sentence = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").strip()
            if 20 < len(sentence) < 160:
                yield path.stem, node.name, sentence


@contextmanager
def _judge(folder: Path, base_url: str) -> Iterator[None]:
    """Run a judge's server at that address within the context."""
    if not folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(OUT / "base" / "teacher" / "model")
        tokenizer.chat_template = TEMPLATE
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8192,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    port = base_url.split(":")[2].partition("/")[0]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "judge", "--host", "127.0.0.1", "--port", port, "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(256 << 20), "--max-num-seqs", "8"]
    with (OUT / "judge-server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + SERVER_START_S
            while not _is_up(port):
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"the judge's server did not start; see {log.name}")
                time.sleep(0.5)
            yield
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _is_up(port: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
