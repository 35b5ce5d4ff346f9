"""Real commands tune a trained student, are killed and go on; transformers and vLLM chat with what comes out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import capgap, capgap_until, run_of
from transformers import AutoModelForCausalLM, AutoTokenizer

ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "import what? <|assistant|>"},
    {"role": "assistant", "content": "import os3"},
    {"role": "user", "content": "import what?"},
]
CHAT = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=64)
output = llm.chat(json.loads(sys.argv[2]), SamplingParams(max_tokens=12, temperature=0.0))[0]
print("asked", list(output.prompt_token_ids), "answered", list(output.outputs[0].token_ids))
"""


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["all", "adapters"])
def test_a_killed_tuning_goes_on_to_the_same_bits_and_chats_in_vllm_as_in_transformers(
    finished: Path, tmp_path: Path, weights: str
) -> None:
    chats = tmp_path / "chat.jsonl"
    turns = [["import what?", f"import os{i}", "again?", f"import os{i}"] for i in range(60)]
    messages = [{"messages": [{"role": "system", "content": f"Be brief {i}."}, *ASKED[1:3]]} for i in range(60)]
    chats.write_text("".join(json.dumps(record) + "\n" for record in (*turns, *messages)))
    tune = {
        "sources": [str(chats)],
        "max_len": 48,
        "heldout_fraction": 0.1,
        "learning_rate": 3e-3,
        "num_epochs": 6,
        "batch_sequences": 4,
        "checkpoint_every_steps": 5,
        **({"lora": {"dropout": 0.1}} if weights == "adapters" else {}),
    }
    outs = [tmp_path / name for name in ("whole", "killed")]
    for out in outs:
        out.mkdir()
        for stage in ("corpus", "teacher", "cache", "student", "train"):
            (out / stage).symlink_to(finished / stage)
    arguments = [[*run_of(out, "--tune", json.dumps(tune)), "--only", "tune/distilled"] for out in outs]
    done = capgap(*arguments[0])
    assert done.returncode == 0, done.stderr
    made = [out / "tune" / "distilled" / "seed-0" for out in outs]
    code = capgap_until(lambda: any((made[1] / "work" / "checkpoints").glob("step-*.ckpt")), *arguments[1])
    assert code == -9 and not (made[1] / "manifest.json").exists()
    done = capgap(*arguments[1])
    assert done.returncode == 0, done.stderr
    manifests = [json.loads((folder / "manifest.json").read_bytes()) for folder in made]
    assert manifests[0]["totals"] == manifests[1]["totals"]
    weights_of = [{f["path"]: f["sha256"] for f in m["files"] if f["path"].endswith(".safetensors")} for m in manifests]
    assert weights_of[0] == weights_of[1]
    folder = str(made[0] / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    asked = prompt["input_ids"][0].tolist()
    marks = [tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ("system", "user", "assistant")]
    assert [one for one in asked if one in marks] == [marks[0], *(marks[1:] * 2)], "none of the text's"
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, len(asked) :].tolist()
    served = subprocess.run(
        [sys.executable, "-c", CHAT, folder, json.dumps(ASKED)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert served.returncode == 0, served.stderr[-2000:]
    assert f"asked {asked} answered {answer}" in served.stdout
