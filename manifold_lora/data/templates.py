"""Chat templates: which one a record takes, and rendering by it in a child process."""

import atexit
import contextlib
import datetime
import json
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from manifold_lora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks the answers
SECONDS = 5.0  # for the renderings of one record
STARTING_SECONDS = 60.0
WORKER = Path(__file__).with_name("template_worker.py")
Messages = Sequence[Mapping[str, Any]]


class TemplateError(InputError):
    """A template cannot render a chat; the message says why."""


class TemplateTimeout(TemplateError):
    """A template takes too long for a chat."""


class Rendering(NamedTuple):
    """A chat as text."""

    text: str
    spans: list[tuple[int, int]]  # of the answers, in characters, if it marks them


def choose_template(
    tokenizer: "PreTrainedTokenizerBase", name: str | None = None, tools: bool = False
) -> str | None:
    """The chat template of a tokenizer by its name; None if it has none at all.

    Without a name it is the default one, or with tools the one called "tool_use".

    Raises:
        TemplateError: there is none of that name, or several and no default one.
    """
    templates = tokenizer.chat_template
    if not templates:
        return None
    if isinstance(templates, str):
        templates = {"default": templates}
    if name is None:
        name = "tool_use" if tools and "tool_use" in templates else "default"
    if name not in templates:
        raise TemplateError(
            f"the tokenizer has no chat template called {name!r}, only "
            f"{', '.join(sorted(templates))}: name one of them in the records' "
            '"chat_template", or call one of them "default" in tokenizer_config.json'
        )
    return templates[name]


class Renderer:
    """Renders chats as transformers does, in a child process.

    Templates come with models from strangers: one that takes more than 5 seconds or
    1 GiB of memory is stopped.

    Args:
        tokenizer: its special tokens are what templates may write.
        date: "YYYY-MM-DD" for templates that write today's date; None is today.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", date: str | None = None):
        special = {k: str(x) for k, x in tokenizer.special_tokens_map.items()}
        try:
            day = datetime.date.fromisoformat(date) if date else datetime.date.today()
        except ValueError:
            raise InputError(
                f"--date must be a date such as 2026-01-31, got {date!r}."
            ) from None
        self._shared = {"special_tokens": special, "date": day.isoformat()}

    def render(
        self,
        template: str,
        chats: Sequence[tuple[Messages, bool]],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[Rendering]:
        """The renderings of chats, each with or without a generation prompt.

        Raises:
            TemplateError: the template rejects a chat, or takes too long or too much.
        """
        request = self._shared | {
            "template": template,
            "renderings": list(chats),
            "tools": list(tools),
            "tags": bool(GENERATION.search(template)),
        }
        answer = _worker.ask(json.dumps(request), SECONDS)
        if isinstance(answer, dict):
            raise TemplateError(f"the chat template rejects it: {answer['error']}")
        return [Rendering(text, [(a, b) for a, b in spans]) for text, spans in answer]


class _Worker:
    """The child process, started when needed; it ends by itself when it is idle."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()

    def ask(self, request: str, seconds: float) -> Any:
        """The answer to a request, both as JSON."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.stop()
                self._start()
            return self._exchange(request, seconds)

    def _exchange(self, line: str, seconds: float) -> Any:
        assert self._process is not None and self._process.stdin is not None
        answer = None
        try:
            if line:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            raise TemplateTimeout(
                f"the chat template takes more than {seconds:g} seconds"
            ) from None
        except OSError:  # it has ended
            pass
        if answer is None:
            self.stop()
            raise TemplateError("the chat template ends the process that renders it")
        return json.loads(answer)

    def _start(self) -> None:
        # -P: the directory of the script is not one to import from.
        process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        answers: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            with contextlib.suppress(ValueError, OSError):  # closed meanwhile
                for answer in process.stdout:
                    answers.put(answer)
            answers.put(None)
            process.wait()

        self._process, self._answers = process, answers
        threading.Thread(target=read, daemon=True).start()
        self._exchange("", STARTING_SECONDS)  # its first line says that it is ready

    def stop(self) -> None:
        """End the process, if there is one."""
        if (process := self._process) is None:
            return
        self._process = None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError, ValueError):
                assert pipe is not None
                pipe.close()


_worker = _Worker()
atexit.register(_worker.stop)
