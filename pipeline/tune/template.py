"""The chat template of a tuned model: the tokenizer's own, a given one, or `roles`, with special tokens for roles.

    <|system|>Be brief.<|user|>How much is 3 + 4?<|assistant|>7.</s><|user|>And 5?<|assistant|>12.</s>

The marks of `roles` are added to the tokenizer as special tokens. A prompt always ends with a mark, so an answer gets
the same tokens after its prompt as on its own. The template puts a space into any text of a message that would be a
special token, so no message can be mistaken for a mark, neither in training nor where the model is served.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from capgap.pipeline.corpus.plain_text import apart, special_texts
from capgap.schemas.errors import InputError

ROLE_MARKS = ("<|system|>", "<|user|>", "<|assistant|>")

_ROLES = """\
{%- set specials = SPECIALS -%}
{%- macro plain(text) -%}
{%- set said = namespace(text=text) -%}
{%- for special, instead in specials -%}
{%- set said.text = said.text | replace(special, instead) -%}
{%- endfor -%}
{{- said.text -}}
{%- endmacro -%}
{{- BEGIN -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' ~ plain(message['content']) ~ eos_token -}}
{%- elif message['role'] == 'user' -%}
{{- '<|user|>' ~ plain(message['content']) -}}
{%- elif message['role'] == 'system' -%}
{{- '<|system|>' ~ plain(message['content']) -}}
{%- else -%}
{{- raise_exception('no role ' ~ message['role'] ~ ', but system, user and assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def chosen_template(setting: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the setting, or its default: `roles` for a tokenizer without a chat template, and `own` for any other."""
    return setting or ("roles" if tokenizer.chat_template is None else "own")


def with_template(tokenizer: PreTrainedTokenizerBase, setting: str | None) -> tuple[PreTrainedTokenizerBase, str]:
    """Give a tokenizer its chat template in place, and return it with a name of the template for errors.

    Args:
        tokenizer: The tokenizer, which also receives the role marks if the template is `roles`.
        setting: `own`, `roles`, the path of a Jinja file, or None for the default.

    Raises:
        InputError: The file does not exist, or is not text in UTF-8.
    """
    chosen = chosen_template(setting, tokenizer)
    if chosen == "own":
        return tokenizer, "the tokenizer's own chat template"
    if chosen == "roles":
        tokenizer.add_special_tokens({"extra_special_tokens": list(ROLE_MARKS)}, replace_extra_special_tokens=False)
        tokenizer.chat_template = roles_template(tokenizer)
        return tokenizer, "the chat template roles"
    try:
        tokenizer.chat_template = Path(chosen).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "no chat template can be read",
            where=f"tune.chat_template: {chosen}",
            found=error.strerror if isinstance(error, OSError) else error,
            expected="own, roles, or a Jinja file in UTF-8",
        ) from None
    return tokenizer, f"the chat template {chosen}"


def roles_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template `roles` for a tokenizer that has the role marks; it lists the tokenizer's special tokens."""
    parted = [[text, apart(text)] for text in special_texts(tokenizer) if apart(text) != text]
    specials = json.dumps(parted, ensure_ascii=False)
    begins = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return _ROLES.replace("SPECIALS", specials).replace("BEGIN", "bos_token" if begins else "''")


@torch.no_grad()
def extend_vocabulary(model: PreTrainedModel, old_size: int, new_size: int) -> None:
    """Give the ids from `old_size` to `new_size` weights of their own in the embedding and the head, in place.

    A new row of the embedding is sampled from a normal distribution with the mean and the standard deviation of the old
    rows, from a fixed seed. The rows must differ, because adapters do not train them and could not distinguish equal
    ones. In a head that is not tied to the embedding, a new row is the mean of the old ones, so that no new token
    begins with a high probability. Padding rows are used first, and rows are added only if these are too few.

    Args:
        model: The model.
        old_size: Size of the vocabulary without the new ids.
        new_size: Size of the vocabulary with the new ids.
    """
    if new_size <= old_size:
        return
    head = model.get_output_embeddings()
    if model.get_input_embeddings().weight.shape[0] < new_size:
        model.resize_token_embeddings(new_size, mean_resizing=False)
        grown = model.get_output_embeddings()
        if grown is not head:  # the old head may compute with few bits, which the new one of transformers does not
            head.weight, head.bias, head.out_features = grown.weight, grown.bias, grown.out_features
            model.set_output_embeddings(head)
    embedding = model.get_input_embeddings()
    old_VH = embedding.weight[:old_size].float()
    noise_VH = torch.randn(new_size - old_size, old_VH.shape[1], generator=torch.Generator().manual_seed(0))
    sampled_VH = old_VH.mean(0) + old_VH.std(0) * noise_VH.to(old_VH.device)
    if head.weight is not embedding.weight:
        head.weight[old_size:new_size] = head.weight[:old_size].float().mean(0).to(head.weight.dtype)
    embedding.weight[old_size:new_size] = sampled_VH.to(embedding.weight.dtype)
    if head.bias is not None:
        head.bias[old_size:new_size] = head.bias[:old_size].float().mean().to(head.bias.dtype)
