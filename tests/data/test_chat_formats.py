"""Public chat formats: ids and masks are those of transformers on the same template.

Each format is written with {% generation %} around an answer and what ends its turn,
which gives transformers' own mask, and without, as models come.
"""

from typing import Any

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from manifold_lora.data.records import Record, Turn
from manifold_lora.data.tokens import encode

LOOP = "{% for m in messages %}"
ANSWER = "{% if m.role == 'assistant' %}"
PROMPT = "{% if add_generation_prompt %}"


# Name: BOS, EOS, further special tokens, template with [[ ]] around the answers.
FORMATS = {
    "llama 2": (
        "<s>",
        "</s>",
        [],
        "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + "
        "messages[0].content + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + "
        "(system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
        "{% else %}[[{{ ' ' + m.content.strip() + ' ' + eos_token }}]]{% endif %}"
        "{% endfor %}",
    ),
    "llama 3": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>"],
        LOOP + "{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        + ANSWER
        + "[[{{ m.content | trim + '<|eot_id|>' }}]]{% else %}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        + PROMPT
        + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    "chatml": (
        "<s>",
        "<|im_end|>",
        ["<|im_start|>"],
        LOOP
        + "{{ '<|im_start|>' + m.role + '\n' }}"
        + ANSWER
        + "[[{{ m.content + '<|im_end|>' }}]]{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}"
        + PROMPT
        + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "smollm2": (
        "<|im_start|>",
        "<|im_end|>",
        [],
        LOOP + "{% if loop.first and messages[0].role != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' }}"
        + ANSWER
        + "[[{{ m.content + '<|im_end|>' }}]]{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}"
        + PROMPT
        + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "zephyr": (
        "<s>",
        "</s>",
        [],
        LOOP
        + "{{ '<|' + m.role + '|>\n' }}"
        + ANSWER
        + "[[{{ m.content + eos_token }}]]{% else %}{{ m.content + eos_token }}"
        "{% endif %}{{ '\n' }}{% endfor %}"
        + PROMPT
        + "{{ '<|assistant|>\n' }}{% endif %}",
    ),
    "vicuna": (
        "<s>",
        "</s>",
        [],
        "{{ bos_token }}" + LOOP + "{% if m.role == 'system' %}{{ m.content + ' ' }}"
        "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}"
        "{{ 'ASSISTANT:' }}[[{{ ' ' + m.content + eos_token }}]]{% endif %}{% endfor %}"
        + PROMPT
        + "{{ 'ASSISTANT:' }}{% endif %}",
    ),
    "mistral": (
        "<s>",
        "</s>",
        ["[INST]", "[/INST]"],
        "{{ bos_token }}" + LOOP + "{% if m.role != 'assistant' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
        "[[{{ ' ' + m.content + eos_token }}]]{% endif %}{% endfor %}",
    ),
    "r1": (
        "<|begin|>",
        "<|end|>",
        ["<|User|>", "<|Assistant|>"],
        "{{ bos_token }}"
        + LOOP
        + "{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
        "{% elif m.role == 'system' %}{{ m.content }}{% else %}{{ '<|Assistant|>' }}"
        "[[{{ m.content.split('</think>')[-1] + eos_token }}]]{% endif %}{% endfor %}"
        + PROMPT
        + "{{ '<|Assistant|><think>\n' }}{% endif %}",
    ),
}
CORPUS = ["user assistant system what is it?", " It is so.\n\nYes, it is.", "é ü 7 8 9"]
CHATS = {
    "single": ["What is it?", "It is so."],
    "multi-turn": [
        "What\nis it?",
        "It is so.\n\nYes",
        "And 7?",
        " 8 é\U0001f600",
        "é",
        "9",
    ],
    "with a system text": ["Be brief.", "What is it?", "No."],
}


def byte_level(special: list[str]) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(core, special, alphabet)
    return core


def sentencepiece(special: list[str]) -> Tokenizer:
    """As Llama 2's tokenizer.json: a space in front, byte fallback."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    train(core, ["<unk>", *special], list("▁aeiostu\n"), fallback)
    return core


def metaspace(special: list[str]) -> Tokenizer:
    """As newer sentencepiece conversions: a space in front of the text only."""
    core = sentencepiece(special)
    core.normalizer = normalizers.Sequence([])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return core


def train(core, special, alphabet, further=()):
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*special, *further],
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    core.train_from_iterator([*CORPUS, *CORPUS], trainer)


CORES = {f.__name__: f for f in (byte_level, sentencepiece, metaspace)}


def tokenizer_of(name: str, core: str) -> PreTrainedTokenizerFast:
    bos, eos, further, _ = FORMATS[name]
    special = [*dict.fromkeys([bos, eos, *further])]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=CORES[core](special), bos_token=bos, eos_token=eos
    )
    tokenizer.add_special_tokens({"additional_special_tokens": further})
    return tokenizer


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("name", FORMATS)
def test_ids_and_masks_are_those_of_transformers(name, core, chat):
    tokenizer, template = tokenizer_of(name, core), FORMATS[name][3]
    roles = ["system"] * (len(chat) % 2) + ["user", "assistant"] * (len(chat) // 2)
    messages = [
        {"role": role, "content": text} for role, text in zip(roles, chat, strict=True)
    ]
    tags = template.replace("[[", "{% generation %}").replace(
        "]]", "{% endgeneration %}"
    )
    expected: Any = tokenizer.apply_chat_template(
        messages,
        chat_template=tags,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    plain = template.replace("[[", "").replace("]]", "")
    turns = [Turn(m["role"], m["content"], m["role"] == "assistant") for m in messages]
    for given in (plain, tags):
        tokenizer.chat_template = given
        (example,), _ = encode([Record(tuple(turns))], tokenizer, 9999)
        assert example.input_ids.tolist() == expected["input_ids"]
        np.testing.assert_array_equal(example.loss_mask, expected["assistant_masks"])


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("What is it?", " It is so."),
        ("def f():\n", "    return 7"),
        ("", "  é\U0001f600"),
    ],
)
def test_plain_records_are_tokenised_as_a_whole(core, prompt, completion):
    tokenizer = tokenizer_of("zephyr", core)
    (example,), _ = encode(
        [Record(prompt=prompt, completion=completion)], tokenizer, 99
    )
    whole = tokenizer(prompt + completion)["input_ids"]
    assert example.input_ids.tolist() == [*whole, tokenizer.eos_token_id]
    trained = tokenizer.decode(example.input_ids[example.loss_mask])
    assert completion.strip() in trained
