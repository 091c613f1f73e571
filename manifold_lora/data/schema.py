"""What a training record is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Turn:
    """One message of a chat; `trained` turns carry the loss."""

    role: str  # system, user, assistant or tool
    text: str
    trained: bool = False
    # Further keys of the message for the chat template, such as tool_calls.
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One training record: as a chat, as a prompt with its completion, or both.

    If it has both, a tokenizer with a chat template uses the chat and any other one
    the plain form. A plain text is a completion of the empty prompt.
    """

    turns: tuple[Turn, ...] = ()  # empty: no chat form
    prompt: str = ""
    completion: str = ""  # empty: no plain form
    tools: tuple[dict[str, Any], ...] = ()  # for the chat template
    template: str | None = None  # name of the chat template; None: the default one
    location: str = ""  # file and line, for messages
