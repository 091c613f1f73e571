"""Small tokenizers, and a reference encoding of their token ids."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, START, END, EOT = SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
HEADER = (
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
)
PROMPT = (
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Llama 3's chat format, content trimmed.
LLAMA3 = (
    "{% for message in messages %}" + HEADER + "{{ message.content | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}" + PROMPT
)


def llama3_with_tags(end_inside: bool) -> str:
    """The same format with {% generation %}, around the end-of-turn token or not."""
    inside, outside = ("{{ '<|eot_id|>' }}", "") if end_inside else ("", "<|eot_id|>")
    return (
        "{% for message in messages %}"
        + HEADER
        + "{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content | trim }}" + inside + "{% endgeneration %}"
        "{{ '"
        + outside
        + "' }}{% else %}{{ message.content | trim }}{{ '<|eot_id|>' }}"
        "{% endif %}{% endfor %}" + PROMPT
    )


def make_tokenizer(
    *,
    template: str | None = None,
    bos: bool = True,
    eos: str | None = EOS,
    lines: list[str] | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token per byte, or trained on `lines`."""
    if lines is None:
        vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
        core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    else:
        core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if lines is None:
        core.add_special_tokens(list(SPECIAL))
    else:
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=list(SPECIAL),
            initial_alphabet=LETTERS,
            show_progress=False,
        )
        core.train_from_iterator(lines, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=eos, chat_template=template
    )


def spell(*pieces: str) -> list[int]:
    """Token ids of the one-token-per-byte tokenizer, letter by letter."""
    ids = []
    for piece in pieces:
        if piece in SPECIAL:
            ids.append(SPECIAL.index(piece))
        else:
            letters = piece.replace(" ", "Ġ").replace("\n", "Ċ")
            ids += [len(SPECIAL) + LETTERS.index(letter) for letter in letters]
    return ids


def saved(tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    tokenizer.save_pretrained(directory)
    return directory
