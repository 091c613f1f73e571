"""The child process that renders chat templates: JSON lines in, JSON lines out.

A template is a program that comes with a model, so it runs apart, with a limit of
memory; `templates.py` limits its time. Run as a script: it imports nothing of ours.
"""

import datetime
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEMORY = 1 << 30  # bytes beyond what the imports take
IDLE_SECONDS = 20
ADDED = 1 << 16  # characters a template may write beyond a few times the chat


def limit_memory() -> None:
    """Let allocations fail beyond the limit, where the system knows such limits."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, OSError, ValueError):  # not Linux
        pass


def fix_date(module: Any, date: str) -> None:
    """Make `strftime_now` of transformers' templates write this date."""
    moment = datetime.datetime.fromisoformat(date)

    class FixedDatetime(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return moment.replace(tzinfo=tz)

    module.datetime = FixedDatetime


def iter_lines() -> Iterator[str]:
    """The lines of stdin; a signal ends the process if none comes for long."""
    set_alarm = getattr(signal, "alarm", lambda seconds: None)  # not on Windows
    while True:
        set_alarm(IDLE_SECONDS)
        line = sys.stdin.readline()
        set_alarm(0)
        if not line:
            return
        yield line


def main() -> None:
    """Render what stdin asks for until it ends."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "critical"
    from transformers.utils import chat_template_utils

    limit_memory()
    print(json.dumps("ready"), flush=True)
    for line in iter_lines():
        request, answer = json.loads(line), []
        fix_date(chat_template_utils, request["date"])
        try:
            for messages, prompt in request["renderings"]:
                texts, spans = chat_template_utils.render_jinja_template(
                    conversations=[messages],
                    tools=request["tools"] or None,
                    chat_template=request["template"],
                    return_assistant_tokens_mask=request["tags"],
                    add_generation_prompt=prompt,
                    **request["special_tokens"],
                )
                if len(texts[0]) > ADDED + 4 * len(line):
                    raise ValueError(f"it writes {len(texts[0]):,} characters")
                answer.append([texts[0], spans[0] if spans else []])
            text = json.dumps(answer)
        except MemoryError:
            answer = []
            text = json.dumps({"error": "it takes more than 1 GiB of memory"})
        except RecursionError:
            text = json.dumps({"error": "it recurses too deeply"})
        except Exception as error:  # whatever the template's own code raises
            text = json.dumps({"error": f"{error}"[:500] or type(error).__name__})
        print(text, flush=True)


if __name__ == "__main__":
    main()
