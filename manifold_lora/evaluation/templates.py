"""The prompts of the commonsense protocol, byte for byte as its authors have them.

Those of Hu et al., LLM-Adapters (2023), which DoRA uses unchanged, are indented by
sixteen spaces after the first line, and end in them. StelLA's (Li et al., 2025) are
not; `train` writes the same for records of instruction and output.
"""

from typing import NamedTuple

from manifold_lora.data.formats import ALPACA, ALPACA_WITH_INPUT

RESPONSE = "### Response:"


class Template(NamedTuple):
    """The prompt of an instruction, and where its answer is read."""

    no_input: str
    with_input: str
    answer: int  # which part of the text, split at "### Response:"

    def prompt(self, instruction: str, input: str = "") -> str:
        r"""The text that a response continues.

        >>> TEMPLATES["stella"].prompt("Is {ice} cold?")[-30:]
        'Is {ice} cold?\n\n### Response:\n'
        """
        text = self.with_input if input else self.no_input
        # In one pass: braces in the instruction stay as they are.
        return text.format(instruction=instruction, input=input)


def _body(indent: str, *sections: str) -> str:
    """Sections with a line each, the last of them empty."""
    lines = [
        f"\n\n{indent}### {name}:\n{indent}{{{name.lower()}}}" for name in sections
    ]
    return "".join(lines) + f"\n\n{indent}{RESPONSE}\n{indent}"


_SPACES = " " * 16
TEMPLATES = {
    "llm-adapters": Template(
        f"{ALPACA} {_body(_SPACES, 'Instruction')}",  # with a space after "request."
        ALPACA_WITH_INPUT + _body(_SPACES, "Instruction", "Input"),
        answer=1,
    ),
    "stella": Template(
        ALPACA + _body("", "Instruction"),
        ALPACA_WITH_INPUT + _body("", "Instruction", "Input"),
        answer=-1,
    ),
}
