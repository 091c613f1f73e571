"""The command `generate`."""

import builtins
import json

import pytest

from manifold_lora.checkpoints.huggingface import load_llama
from manifold_lora.cli.main import main
from manifold_lora.data.builtin import BASE
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.generation.command import GenerateConfig, generate_texts
from manifold_lora.generation.config import GenerationConfig
from manifold_lora.generation.generate import generate

SHORT = GenerationConfig(max_new_tokens=6)


def expected(text, count=6):
    tokenizer, model = load_tokenizer(BASE), load_llama(BASE)
    ids = generate(model, [tokenizer(text)["input_ids"]], max_new_tokens=count)[0]
    end = tokenizer.eos_token_id
    ids = ids.tolist()
    ids = ids[: ids.index(end)] if end in ids else ids
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def run(capsys, *arguments):
    code = 0
    try:
        main(["generate", *map(str, arguments)])
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


def test_one_prompt_is_streamed(capsys):
    prompt = "LATIN SMALL LETTER A:"
    code, shown, error = run(capsys, "--prompt", prompt, "--max-new-tokens", 6)
    assert (code, error) == (0, "")
    assert shown == expected(prompt) + "\n"


def test_a_file_of_prompts_in_their_order(tmp_path, capsys):
    prompts = ["DIGIT ONE:", "GREEK CAPITAL LETTER OMEGA WITH TONOS:", "COMMA:"]
    file, out = tmp_path / "prompts.txt", tmp_path / "new" / "texts.jsonl"
    file.write_text("\n".join(prompts))
    arguments = ("--prompts", file, "--out", out, "--max-new-tokens", 6)
    code, shown, _ = run(capsys, *arguments, "--batch-size", 2)
    assert code == 0 and f"Wrote {out}: 3 texts" in shown.replace("\n", "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    assert [line["text"] for line in lines] == [expected(p) for p in prompts]


def test_stop_strings(capsys):
    prompt = "LATIN SMALL LETTER A:"
    text = expected(prompt, 40)
    stop = text[8:10]
    results = generate_texts(
        GenerateConfig(
            prompt=prompt,
            stop=(stop,),
            generation=GenerationConfig(max_new_tokens=40),
        )
    )
    assert results[0]["text"] == text[: text.find(stop)]


def test_a_chat(monkeypatch, capsys, tmp_path):
    """Each question is asked with all that was said before, until /reset."""
    asked = iter(["one", "two", "/reset", "three", "/exit"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(asked))
    seen = []

    def encode(record, tokenizer, renderer, *, raw):
        seen.append([(turn.role, turn.text) for turn in record.turns])
        return [5, 6, 7]

    monkeypatch.setattr("manifold_lora.generation.command.encode_prompt", encode)
    generate_texts(GenerateConfig(chat=True, system="S", generation=SHORT))
    shown = capsys.readouterr().out
    first = seen[1][2][1]
    assert seen[0] == [("system", "S"), ("user", "one")]
    assert seen[1] == [*seen[0], ("assistant", first), ("user", "two")]
    assert seen[2] == [("system", "S"), ("user", "three")]
    assert first and shown.count(first) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "one of --prompt, --prompts and --chat is needed, got none"),
        (("--prompt", "a", "--chat"), "got --prompt and --chat"),
        (("--prompt", " "), "--prompt is empty"),
        (("--prompt", "a", "--stop", ""), "--stop has an empty string"),
        (("--prompt", "a", "--stop", "b", "--beams", 2), "--beams has its"),
        (("--prompt", "a", "--adapter", "nowhere"), "nowhere does not exist"),
        (("--prompt", "a", "--model", "nowhere"), "nowhere has no tokenizer"),
        (("--prompt", "a" * 9000), "more than the model's context"),
        (("--chat", "--raw"), "--raw has no chat"),
    ],
)
def test_one_message_and_exit_code_2(capsys, arguments, words):
    code, shown, error = run(capsys, *arguments)
    assert (code, shown) == (2, "") and words in error
    assert error.startswith("manifold-lora: ") and "Traceback" not in error
