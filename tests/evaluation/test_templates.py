"""The prompts of the commonsense protocol, against the authors' strings."""

import json

import pytest

from manifold_lora.evaluation.commonsense import LABELS, extract
from manifold_lora.evaluation.templates import TEMPLATES
from tests.smollm2 import SHARED

STRINGS = SHARED / "commonsense_templates.json"


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("llm-adapters", "llm_adapters_eval"),
        ("llm-adapters", "dora_eval"),
        ("stella", "stella_eval"),
    ],
)
def test_prompts_are_those_of_the_authors(name: str, theirs: str):
    if not STRINGS.is_file():
        pytest.skip("needs the authors' strings beside the repository")
    strings = json.loads(STRINGS.read_text())[theirs]
    assert TEMPLATES[name].no_input == strings["no_input"]
    assert TEMPLATES[name].with_input == strings["with_input"]


def test_prompt_with_its_spaces():
    first = "Below is an instruction that describes a task. Write a response that "
    assert TEMPLATES["llm-adapters"].prompt("Is {ice} cold?") == (
        f"{first}appropriately completes the request. \n"
        "\n"
        "                ### Instruction:\n"
        "                Is {ice} cold?\n"
        "\n"
        "                ### Response:\n"
        "                "
    )
    assert (
        TEMPLATES["stella"]
        .prompt("Is it?", "{ice}")
        .endswith("### Instruction:\nIs it?\n\n### Input:\n{ice}\n\n### Response:\n")
    )


@pytest.mark.parametrize(
    ("text", "task", "label"),
    [
        ("the correct answer is true", "boolq", "true"),
        ("false. No: true", "boolq", "false"),
        ("True", "boolq", ""),
        ("untrue", "boolq", "true"),
        ("Solution2, so solution1", "piqa", "solution1"),
        ("answer5", "ARC-Easy", "answer5"),
        ("answer6 or answer12", "openbookqa", "answer1"),
        ("", "winogrande", ""),
    ],
)
def test_the_first_label_is_the_prediction(text: str, task: str, label: str):
    assert extract(text, LABELS[task]) == label
