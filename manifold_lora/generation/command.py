"""The command `generate`: prompts in, texts out."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.console import Console

from manifold_lora.checkpoints.atomic import write_text
from manifold_lora.checkpoints.companions import stop_tokens
from manifold_lora.configuration.flat import part
from manifold_lora.configuration.parts import BaseConfig, Date
from manifold_lora.console import make_console, print_text, printable
from manifold_lora.data.builtin import BASE
from manifold_lora.data.schema import Record, Turn
from manifold_lora.data.templates import Renderer, TemplateError
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.distributed import processes
from manifold_lora.distributed.mesh import make_mesh, read_mesh
from manifold_lora.errors import InputError
from manifold_lora.generation.config import GenerationConfig
from manifold_lora.generation.generate import Generator
from manifold_lora.generation.model import adapted, load_base
from manifold_lora.generation.padding import pad_prompts, until_stop
from manifold_lora.generation.prompts import as_prompt, encode_prompt, read_prompts
from manifold_lora.generation.stopping import TextMonitor
from manifold_lora.models import Llama
from manifold_lora.settings import BatchSize, setting, validate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MONITOR_EVERY = 8  # steps between checks for stop strings, which wait for the device


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Texts to generate: from one prompt, from a file of prompts, or in a chat.

    Args:
        prompt: a text.
        prompts: a file of prompts.
        chat: ask for prompts in the terminal, and keep the conversation.
        adapter: directory of an adapter or of a run.
        system: system message of chats that have none.
        raw: prompts as they are, without the chat template.
        stop: strings that end a text.
        batch_size: prompts of a batch at most.
        date: that chat templates write as today's.
        mesh: sizes of the mesh axes.
        out: JSON Lines file for the texts.

    Raises:
        InputError: all problems, in one message.

    Examples:
        >>> GenerateConfig(prompt="Hello").generation.max_new_tokens
        64
    """

    model: BaseConfig = part(BaseConfig)
    generation: GenerationConfig = part(GenerationConfig)

    prompt: str | None = setting(None, "a text to continue or to answer")
    prompts: Path | None = setting(
        None, "file of prompts: a line each (.txt), or records as training data"
    )
    chat: bool = setting(False, "chat in the terminal; /reset clears it, /exit ends it")
    adapter: Path | None = setting(None, "directory of an adapter or of a run")
    system: str = setting(
        "", "system message of chats that have none", default_text="none"
    )
    raw: bool = setting(False, "continue prompts as they are, without chat template")
    stop: tuple[str, ...] = setting((), "strings that end a text")
    batch_size: BatchSize = setting(8, "prompts that are continued together")
    date: Date | None = setting(
        None,
        "date, as 2026-01-31, that chat templates write as today's",
        default_text="today",
    )
    mesh: str | None = setting(
        None,
        "sizes of the mesh axes, as in data=2,fsdp=4,tensor=2",
        default_text="all devices on fsdp",
    )
    out: Path | None = setting(
        None, "JSON Lines file for prompts and texts", default_text="the terminal"
    )

    def __post_init__(self):
        problems = []
        sources = {
            "--prompt": self.prompt is not None,
            "--prompts": self.prompts is not None,
            "--chat": self.chat,
        }
        given = [name for name, is_given in sources.items() if is_given]
        if len(given) != 1:
            got = f"got {' and '.join(given)}" if given else "got none of them"
            problems.append(f"one of --prompt, --prompts and --chat is needed, {got}")
        if self.prompt is not None and not self.prompt.strip():
            problems.append("--prompt is empty: give a text")
        if "" in self.stop:
            problems.append("--stop has an empty string, which ends every text")
        if self.generation.num_beams > 1 and (self.chat or self.stop):
            problems.append(
                "--beams has its tokens at the end: leave out --chat and --stop, "
                "or set it to 1"
            )
        if self.chat and self.raw:
            problems.append("--raw has no chat: leave out --raw or --chat")
        if self.chat and self.out is not None:
            problems.append("--chat writes no file: leave out --out")
        if self.out is not None and self.out.is_dir():
            problems.append(f"--out {self.out} is a directory: give a file")
        validate(self, problems)


def generate_texts(
    config: GenerateConfig, console: Console | None = None
) -> list[dict[str, Any]]:
    """Generate texts and print them as they grow, or write them to a file.

    The Python counterpart of `manifold-lora generate`; `generate` takes token ids.

    Args:
        config: what to generate.
        console: where texts are printed; by default the terminal.

    Returns:
        For each prompt its `prompt`, `text` and number of `tokens`; none of a chat.

    Raises:
        InputError: something in the configuration, the model or the prompts is wrong.
    """
    processes.initialise()
    console = console or make_console(quiet=not processes.is_main())
    source = config.model.path or BASE
    tokenizer = load_tokenizer(source)
    records = _records(config)
    writer = _Texts(config, tokenizer, stop_tokens(source, tokenizer), console)
    encoded = [writer.encode(record) for record in records]
    with jax.set_mesh(make_mesh(read_mesh(config.mesh))):
        model = load_base(config.model)
        with adapted(model, config.adapter):
            if config.chat:
                _chat(writer, model)
                return []
            started = time.perf_counter()
            results = list(writer.answer(model, records, encoded))
            seconds = time.perf_counter() - started
    results.sort(key=lambda item: item.pop("index"))
    if config.out is not None and processes.is_main():
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in results)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(config.out, "".join(lines))
        total = sum(item["tokens"] for item in results)
        print_text(
            console,
            f"Wrote {config.out}: {len(results)} texts, {total} tokens, "
            f"{total / seconds:.0f} tokens/s",
        )
    return results


def _records(config: GenerateConfig) -> list[Record]:
    if config.prompt is not None:
        return [as_prompt(config.prompt, config.system)]
    return read_prompts(config.prompts, config.system) if config.prompts else []


class _Texts:
    """Answers prompts with a tokenizer, and shows the answers."""

    def __init__(
        self,
        config: GenerateConfig,
        tokenizer: "PreTrainedTokenizerBase",
        stop: Sequence[int],
        console: Console,
    ):
        self.config, self.tokenizer, self.stop = config, tokenizer, stop
        self.console = console
        self._renderer = Renderer(tokenizer, config.date)

    def encode(self, record: Record) -> list[int]:
        try:
            return encode_prompt(
                record, self.tokenizer, self._renderer, raw=self.config.raw
            )
        except TemplateError as error:
            where = f"{record.location}: " if record.location else ""
            raise InputError(f"{where}{error}.") from error

    def monitor(self, streaming: bool) -> TextMonitor:
        """What ends texts at the stop strings and, where streaming, prints the text."""
        return TextMonitor(
            self.tokenizer,
            self.stop,
            self.config.stop,
            self._print if streaming else None,
        )

    def _print(self, piece: str) -> None:
        self.console.print(
            printable(piece), end="", markup=False, emoji=False, soft_wrap=True
        )

    def answer(
        self, model: Llama, records: Sequence[Record], encoded: Sequence[list[int]]
    ) -> Iterator[dict[str, Any]]:
        """Generate a text for each prompt, batch by batch, the longest ones first."""
        generation, rows = self.config.generation, self.config.batch_size
        rows = min(rows, len(records))
        generator = Generator(model, generation, self.stop)
        order = sorted(range(len(records)), key=lambda i: -len(encoded[i]))
        streaming = len(records) == 1 and generation.num_beams == 1
        for first in range(0, len(order), rows):
            indices = order[first : first + rows]
            ids, mask = pad_prompts([encoded[i] for i in indices], rows)
            monitor = self.monitor(streaming and self.config.out is None)
            new_ids = generator(
                ids,
                mask,
                indices=np.resize(indices, rows),
                monitor=monitor if streaming or self.config.stop else None,
                every=1 if streaming else _MONITOR_EVERY,
            )
            for i, row in zip(indices, new_ids.tolist(), strict=False):
                text = monitor.text(row)
                result = {"index": i, "prompt": prompt_text(records[i]), "text": text}
                result["tokens"] = len(until_stop(row, self.stop))
                if self.config.out is None:
                    self._show(result, monitor, row, streaming, len(records))
                yield result

    def _show(
        self,
        result: dict[str, Any],
        monitor: TextMonitor,
        row: list[int],
        streaming: bool,
        count: int,
    ) -> None:
        if streaming:
            monitor.finish(row)
            self.console.print()
            return
        if count > 1:
            print_text(
                self.console, f"[{result['index'] + 1}] {result['prompt']}", "dim"
            )
        print_text(self.console, result["text"])


def prompt_text(record: Record) -> str:
    """What a prompt asks, in one text: its last message, or the plain prompt."""
    return record.turns[-1].text if record.turns else record.prompt


def _chat(texts: _Texts, model: Llama) -> None:
    """Ask for messages until the end of the input, and answer each."""
    config = texts.config
    opening = (Turn("system", config.system),) if config.system else ()
    generator = Generator(model, config.generation, texts.stop)
    turns = opening
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            texts.console.print()
            return
        if line == "/exit":
            return
        if line == "/reset":
            turns = opening
        if not line or line == "/reset":
            continue
        asked = (*turns, Turn("user", line))
        monitor = texts.monitor(streaming=True)
        try:
            ids, mask = pad_prompts([texts.encode(Record(turns=asked))])
            with contextlib.suppress(
                KeyboardInterrupt
            ):  # ends the answer, not the chat
                row = generator(ids, mask, monitor=monitor)[0].tolist()
                monitor.finish(row)
                turns = (*asked, Turn("assistant", monitor.text(row)))
        except InputError as error:
            print_text(
                texts.console, f"{error} /reset begins a new conversation.", "red"
            )
        texts.console.print()
