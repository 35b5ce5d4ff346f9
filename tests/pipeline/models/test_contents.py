"""Whatever a stranger's file holds in the place of what it should: one InputError, from whoever reads it first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_model, tiny_tokenizer, tiny_vllm_llama

from capgap.pipeline.models.checks import Expected, check_model
from capgap.pipeline.models.contents import contents_of
from capgap.pipeline.models.load import load_model
from capgap.pipeline.models.tokenizers import chat_template_of, load_tokenizer
from capgap.schemas.errors import InputError

DEEP = ("[" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000)
NONE_OF_IT = (*DEEP, "", "null", "[]", "1", '{"model_type": "lla', "\xff\xfe", '{"x": ' + "9" * 6000 + "}")
REGEX = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
CONFIGS: dict[str, Any] = {
    "num_attention_heads": 0,
    "num_key_value_heads": 0,
    "hidden_size": "wide",
    "vocab_size": 10**30,
    "hidden_act": "nonsense",
    "dtype": "float99",
    "model_type": [],
    "rope_parameters": {"rope_type": "nonsense"},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    save_model(folder, tiny_vllm_llama(2, 32), tiny_tokenizer())
    return folder


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def _check(folder: Path) -> None:
    check_model(str(folder), "teacher.path", False, Expected(None, "the corpus", 32))


def _with(folder: Path, name: str, **values: Any) -> None:
    before = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(before | values))


@pytest.mark.parametrize("text", NONE_OF_IT, ids=range(len(NONE_OF_IT)))
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_holds_something_else_is_an_error_of_input(model: Path, name: str, text: str) -> None:
    (model / name).write_text(text, encoding="latin-1")
    with pytest.raises(InputError):
        _check(model)


@pytest.mark.parametrize("text", ["[]", "null", '{"eos_token": 7}', DEEP[0]])
def test_special_tokens_that_are_none_are_an_error_of_input(model: Path, text: str) -> None:
    (model / "special_tokens_map.json").write_text(text)
    with pytest.raises(InputError, match="the tokenizer cannot be read; found"):
        load_tokenizer(model)


@pytest.mark.parametrize("text", ["[]", "null", *DEEP])
def test_a_generation_config_that_is_none_is_an_error_of_input(model: Path, text: str) -> None:
    (model / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"the model cannot be loaded; found .*generation_config\.json"):
        load_model(str(model), "cpu")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_of_no_possible_model_is_an_error_of_input(model: Path, name: str) -> None:
    _with(model, "config.json", **{name: CONFIGS[name]})
    with pytest.raises(InputError, match="the configuration cannot be used; found"):
        _check(model)


def test_an_expression_that_is_none_is_an_error_of_input_for_every_reader(model: Path) -> None:
    _with(model, "tokenizer.json", pre_tokenizer=REGEX)
    for read in (load_tokenizer, chat_template_of, _check):
        with pytest.raises(InputError, match=r"cannot be read; found .*unmatched parenthesis"):
            read(model)


@pytest.mark.parametrize("length", [1 << 62, (1 << 64) - 1, 200_000_000])
def test_a_header_of_weights_of_an_absurd_length_is_an_error_of_input(model: Path, length: int) -> None:
    (model / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="ends too early: 10 bytes, which is not even its header"):
        _check(model)


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", ".", "x" * 5000, 3])
def test_an_index_that_names_no_file_of_the_folder_is_an_error_of_input(model: Path, name: object) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match=r"index of the weights cannot be read|files of weights are missing"):
        _check(model)


@pytest.mark.parametrize("text", DEEP)
def test_brackets_without_end_are_an_error_of_input_in_index_and_header(model: Path, text: str) -> None:
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode())
    with pytest.raises(InputError, match="not a complete safetensors file"):
        _check(model)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match="the index of the weights cannot be read"):
        _check(model)


def test_a_panic_is_an_error_of_input_and_an_interrupt_stays_one() -> None:
    # as PyO3 has it: no Exception
    panic = type("PanicException", (BaseException,), {})
    said = "model: it cannot be read; found PanicException: index out of bounds, expected files"
    with pytest.raises(InputError, match=said), contents_of("it cannot be read", "model", "files"):
        raise panic("index out of bounds\nand more")
    for error in (KeyboardInterrupt(), MemoryError(), RuntimeError("CUDA error"), OSError("gone")):
        with pytest.raises(type(error)), contents_of("it cannot be read", "model", "files"):
            raise error
