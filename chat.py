"""Talk to a model in the terminal: a training checkpoint, or what export.py writes (but GGUF).

    python chat.py --model_path checkpoints/best_model.pt
    python chat.py --model_path exported_models/model.onnx --greedy
    echo "What is the capital of France?" | python chat.py --prompt -

/help lists what can be typed in place of a message. Ctrl-C stops a reply, Ctrl-D ends.
"""

import argparse
import json
import locale
import math
import os
import select
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Callable, List, Optional

if __name__ == "__main__":  # Ctrl-C in the second that the imports take is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# Read when NumPy is loaded. Two threads win a third on an idle machine and lose tenfold where another program runs.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch  # noqa: E402

from artifacts import Runtime, open_model  # noqa: E402
from model import InputError, sample  # noqa: E402
from tokenizer import StreamDecoder, harmless, render_chat  # noqa: E402

STOPPED = "stopped"  # by Ctrl-C
PENALTY_WINDOW = 64  # newest tokens of a reply that the repetition penalty looks at


# ---------------------------------------------------------------------------------------------------- settings


def setting(default, help: str, low: float, high: float):
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass
class Settings:
    """How replies are drawn. Each field is a flag, and a NAME of /set."""

    temperature: float = setting(0.7, "randomness; 0 always takes the likeliest token", 0, 100)
    top_k: int = setting(40, "draw from so many of the likeliest tokens; 0: from all", 0, 2**20)
    top_p: float = setting(0.9, "draw from the likeliest tokens that share this probability; 1: from all", 0, 1)
    repetition_penalty: float = setting(1.1, "makes tokens of this reply less likely; 1: off", 0.1, 10)
    max_new_tokens: int = setting(512, "longest reply", 1, 2**20)
    seed: Optional[int] = setting(None, "makes replies repeatable", 0, 2**63 - 1)

    def assign(self, name: str, text: str) -> None:
        """Sets a field from what a user typed, or InputError."""
        if name not in SETTINGS:
            raise InputError(f"there is no setting {name!r:.40}; there are {', '.join(SETTINGS)}")
        if text == "none" and SETTINGS[name].default is None:
            return setattr(self, name, None)
        low, high = SETTINGS[name].metadata["low"], SETTINGS[name].metadata["high"]
        kind = float if SETTINGS[name].type is float else int
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a number" if kind is float else "a whole number"
            none = ", or none" if SETTINGS[name].default is None else ""
            raise InputError(f"{name} must be {what} from {low} to {high}{none}, not {text!r:.40}")
        setattr(self, name, value)


SETTINGS = {known.name: known for known in fields(Settings)}


# ----------------------------------------------------------------------------------------------------- session


def repeated_length(ids: List[int]) -> int:
    """How many ids at the end only repeat the ones before: 0 unless the same n-gram fills the last 48 ids or more."""
    for period in range(1, min(64, len(ids) // 4) + 1):
        if ids[-1] == ids[-1 - period]:
            length = period * max(4, math.ceil(48 / period))
            if len(ids) >= length and ids[-length + period:] == ids[-length:-period]:
                return length - period
    return 0


@dataclass
class Turn:
    """What was said and the reply, with the ids of the two as later prompts hold them (none for an empty reply)."""

    said: str
    reply: str
    ids: List[int]


class Session:
    """A conversation with a model: turns, what of them the model still sees, and how replies are drawn.

    With `raw` the model continues texts in place of answering, and each text stands for itself.
    """

    def __init__(self, runtime: Runtime, settings: Settings, system: str = "", raw: bool = False):
        self.runtime, self.settings, self.raw = runtime, settings, raw
        self.turns: List[Turn] = []
        self.left_out = 0  # oldest turns that the last prompt had no room for
        self.last_reply = "no reply yet"
        self.generator = torch.Generator()
        self.reseed()
        self.set_system(system)

    def reseed(self) -> None:
        if self.settings.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.settings.seed)

    def set_system(self, text: str) -> None:
        messages = [{"role": "system", "content": text}] if text.strip() else []
        ids = render_chat(self.runtime.tokenizer, messages)[0]
        if len(ids) > self.runtime.context_length // 2:
            raise InputError(f"the system prompt has {len(ids)} tokens, more than half of the model's context")
        self.system, self.system_ids = messages, ids

    def budget(self) -> int:
        """Tokens that a prompt may have, so that a reply of max_new_tokens, or a quarter of the context, fits."""
        context = self.runtime.context_length
        return context - min(self.settings.max_new_tokens, max(1, context // 4))

    def prompt(self, text: str) -> List[int]:
        """The ids that ask for a reply to `text`: the system prompt, the newest turns that fit whole, the message."""
        tokenizer, room = self.runtime.tokenizer, self.budget()
        if self.raw:
            return [tokenizer.end_of_text_id, *tokenizer.encode(text)][-room:]
        ids = render_chat(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)[0]
        room -= len(self.system_ids) + len(ids)
        if room < 0:
            raise InputError(f"too long: {len(ids)} tokens, and the model's context of {self.runtime.context_length} "
                             f"has room for {room + len(ids)}")
        self.left_out = len(self.turns)
        while self.left_out and len(self.turns[self.left_out - 1].ids) <= room:
            self.left_out -= 1
            room -= len(self.turns[self.left_out].ids)
        return [*self.system_ids, *(i for turn in self.turns[self.left_out:] for i in turn.ids), *ids]

    def answer(self, text: str, write: Callable[[str], None]) -> str:
        """Writes the reply to `text` as it comes and keeps the turn. Returns why it ended early, or nothing."""
        if self.raw and not text and self.turns:
            last = self.turns.pop()
            text = last.said + last.reply
        ids = self.prompt(text)
        s, tokenizer, context = self.settings, self.runtime.tokenizer, self.runtime.context_length
        stop_ids = set(tokenizer.special_ids.values())
        decoder, reply, pieces, why = StreamDecoder(tokenizer), [], [], ""
        started = first = time.perf_counter()
        try:
            logits = self.runtime.start(ids)
            while not why:
                token = sample(logits, s.temperature, s.top_k, s.top_p, s.repetition_penalty, reply[-PENALTY_WINDOW:],
                               self.generator)
                first = first if reply else time.perf_counter()
                if token in stop_ids:
                    break
                reply.append(token)
                pieces.append(decoder.push(token))
                write(pieces[-1])
                if repeated := repeated_length(reply):
                    reply, why = reply[:-repeated], "cut: the reply went round in a loop"
                    pieces = [tokenizer.decode(reply)]
                elif len(reply) >= s.max_new_tokens:
                    why = f"stopped at {s.max_new_tokens} tokens: max_new_tokens"
                elif len(ids) + len(reply) >= context:
                    why = f"stopped: the context of {context} tokens is full"
                else:
                    logits = self.runtime.step(token)
            if not why:
                pieces.append(decoder.flush())
                write(pieces[-1])
        except KeyboardInterrupt:
            why = STOPPED
        rate = max(0, len(reply) - 1) / max(1e-9, time.perf_counter() - first)
        self.last_reply = f"{len(reply)} tokens, the first after {first - started:.2f} s, then {rate:.0f} a second"
        self.keep(text, "".join(pieces))
        return why or ("" if reply else "the model has nothing to say to that")

    def keep(self, said: str, reply: str) -> None:
        messages = [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
        whole = reply.strip() and not self.raw
        self.turns.append(Turn(said, reply, render_chat(self.runtime.tokenizer, messages)[0] if whole else []))

    def record(self) -> dict:
        """The conversation as a line of jsonl that train.py reads."""
        turns = [turn for turn in self.turns if turn.reply.strip()]
        if not turns:
            raise InputError("there is nothing to save yet")
        if self.raw:
            return {"text": "\n".join(turn.said + turn.reply for turn in turns)}
        return {"messages": self.system + [
            {"role": role, "content": content} for turn in turns
            for role, content in (("user", turn.said), ("assistant", turn.reply))]}


# ---------------------------------------------------------------------------------------------------- terminal

def is_plain() -> bool:
    """Whether the user, or the terminal, wants no colours."""
    return "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"


def say(text: str) -> None:
    """A word of the program itself, beside the conversation: on stderr, so that replies pipe alone."""
    sys.stdout.flush()
    text = harmless(text)
    dim = sys.stderr.isatty() and not is_plain()
    print(f"\033[2m{text}\033[0m" if dim else text, file=sys.stderr, flush=True)


def typed_ahead(seconds: float) -> bool:
    """Whether more input waits in the terminal, after at most so long."""
    try:
        import msvcrt
    except ImportError:
        return bool(select.select([sys.stdin], [], [], seconds)[0])
    time.sleep(seconds)
    return msvcrt.kbhit()


class Console:
    """Where messages come from: lines edited in a terminal, a paste of several lines being one; or lines of a pipe."""

    def __init__(self):
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.prompt = "> "
        if not self.interactive:
            return
        if locale.setlocale(locale.LC_CTYPE) == "C" and sys.stdin.encoding.lower() == "utf-8":
            os.environ["LC_ALL"] = "C.UTF-8"  # or readline, which asks again, takes Chinese for keys with Alt
        try:
            import readline
        except ImportError:  # Windows, whose console edits lines itself
            return
        marks = "off" if os.environ.get("TERM") == "dumb" else "on"  # asked for by an escape sequence
        readline.parse_and_bind(f"set enable-bracketed-paste {marks}")
        if not is_plain():
            self.prompt = "\001\033[1m\002> \001\033[0m\002"  # the marks keep escapes out of readline's widths

    def read(self) -> str:
        """The next message; EOFError where there are no more."""
        if not self.interactive:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.rstrip("\n")
        # What waits before the prompt was typed during the reply, a message a line. What comes with the speed of a
        # machine right after a line is a paste in a terminal that does not mark pastes.
        typed_before = typed_ahead(0)
        lines = [input(self.prompt)]
        while not typed_before and typed_ahead(0.01):
            lines.append(input())
        return "\n".join(lines)


def reply(session: Session, text: str) -> str:
    """Shows the reply to `text`, and why it ended early, which is returned."""
    written = ""

    def write(piece: str) -> None:
        nonlocal written
        written = piece or written
        sys.stdout.write(harmless(piece))
        sys.stdout.flush()

    left_out = session.left_out
    why = session.answer(text, write)
    if not written.endswith("\n"):
        write("\n")
    if why:
        say(f"({why})")
    if why == STOPPED and not sys.stdin.isatty():  # whoever pipes in a hundred messages means them all
        raise KeyboardInterrupt
    if session.left_out and not left_out:
        say(f"(the context of {session.runtime.context_length} tokens is full: the oldest turns now fall out of it)")
    return why


# ---------------------------------------------------------------------------------------------------- commands


def show_help(session: Session, argument: str) -> None:
    for name, (what, help, _) in COMMANDS.items():
        say(f"{name + ' ' + what:<20}{help}")
    say("Ctrl-C stops a reply, Ctrl-D ends. Lines pasted together are one message.\n"
        "For a message that begins with /, type // in its place.")


def reset(session: Session, argument: str) -> None:
    session.turns, session.left_out, session.runtime.held = [], 0, []
    say("(a new conversation)")


def set_system(session: Session, argument: str) -> None:
    session.set_system(argument)
    say("(the system prompt is set)" if argument else "(no system prompt)")


def retry(session: Session, argument: str) -> None:
    if not session.turns:
        raise InputError("there is no reply yet to try again")
    last = session.turns.pop()
    try:
        reply(session, last.said)
    except InputError:
        session.turns.append(last)
        raise


def is_record(line: bytes) -> bool:
    """Whether this is a line of the jsonl that /save writes."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and bool({"messages", "text"} & values.keys())


def save(session: Session, argument: str) -> None:
    line = json.dumps(session.record(), ensure_ascii=False) + "\n"
    if not argument:
        raise InputError("/save needs the name of a file")
    try:
        with open(os.path.expanduser(argument), "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if size and not is_record(file.readline()):
                raise InputError(f"{argument} is there already and holds something else; choose another name")
            file.seek(max(0, size - 1))
            try:
                file.write(b"\n" * (file.read() not in (b"", b"\n")) + line.encode("utf-8", "replace"))
                file.flush()
            except OSError:
                file.truncate(size)
                raise
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"cannot write {argument}: {getattr(error, 'strerror', None) or error}") from error
    say(f"(saved to {argument})")


def set_value(session: Session, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if value or name not in ("", *SETTINGS):
        session.settings.assign(name, value.strip())
        if name == "seed":
            session.reseed()
    for shown in [name] if name in SETTINGS else SETTINGS:
        value = getattr(session.settings, shown)
        say(f"({shown} = {'none' if value is None else value})")


def show_statistics(session: Session, argument: str) -> None:
    runtime = session.runtime
    say(f"model: {runtime.kind}, vocabulary of {runtime.tokenizer.vocab_size} tokens")
    say(f"turns: {len(session.turns)}, of them forgotten: {session.left_out}; tokens in use: {len(runtime.held)} of "
        f"{runtime.context_length}")
    say(f"last reply: {session.last_reply}")


def quit_chat(session: Session, argument: str) -> None:
    raise EOFError


COMMANDS = {
    "/help": ("", "this list", show_help),
    "/reset": ("", "start a new conversation; the system prompt stays", reset),
    "/system": ("TEXT", "tell the model who it is; without TEXT, take that back", set_system),
    "/retry": ("", "drop the last reply and draw another", retry),
    "/save": ("FILE", "add the conversation to a .jsonl that train.py can read", save),
    "/set": ("NAME VALUE", "change a setting; /set alone shows them all", set_value),
    "/stats": ("", "speed, and how full the context is", show_statistics),
    "/quit": ("", "end", quit_chat),
}


def take(session: Session, text: str) -> None:
    """Does what a line asks for: a command, or a message to reply to."""
    if text.startswith("/") and not text.startswith("//"):
        name, _, argument = text.strip().partition(" ")
        if name not in COMMANDS:
            raise InputError(f"no command {name:.40}: /help lists them, // begins a message that begins with /")
        COMMANDS[name][2](session, argument.strip())
    elif text.strip() or session.raw:
        reply(session, text[1:] if text.startswith("//") else text)


def converse(session: Session, console: Console) -> None:
    """Messages and commands until the end of input."""
    if console.interactive:
        runtime = session.runtime
        say(f"{runtime.kind}, context of {runtime.context_length} tokens. /help lists commands, Ctrl-D ends.")
    while True:
        try:
            take(session, console.read())
        except InputError as error:
            say(str(error))
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print()
            say("(Ctrl-D or /quit ends the chat)")
        except EOFError:
            if console.interactive:
                print()
            return


# -------------------------------------------------------------------------------------------------------- main


def choose_device(name: Optional[str]) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
        return name
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name:.40}: {str(error).splitlines()[0]:.200}") from error


def run(options: argparse.Namespace) -> None:
    settings = Settings()
    for name in SETTINGS:
        if (text := getattr(options, name)) is not None:
            settings.assign(name, text)
    if options.greedy:
        if options.temperature is not None:
            raise InputError("--greedy is --temperature 0: give one of the two")
        settings.temperature = 0.0
        if options.repetition_penalty is None:
            settings.repetition_penalty = 1.0
    runtime = open_model(Path(os.path.expanduser(options.model_path)), choose_device(options.device))
    if not (runtime.is_chat or options.raw):
        say("this model was trained on plain text alone: it continues what it is given")
    session = Session(runtime, settings, options.system, options.raw or not runtime.is_chat)
    if options.prompt is None:
        return converse(session, Console())
    text = sys.stdin.read().removesuffix("\n") if options.prompt == "-" else options.prompt
    if not text.strip() and not session.raw:
        raise InputError("the prompt is empty")
    if reply(session, text) == STOPPED:
        raise KeyboardInterrupt


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="checkpoints/best_model.pt",
                        help="a checkpoint, or a file or folder that export.py wrote (default: %(default)s)")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this once, on stdout alone; - reads standard input")
    parser.add_argument("--system", metavar="TEXT", default="", help="who the model is and how it should answer")
    parser.add_argument("--raw", action="store_true", help="continue plain text in place of chatting")
    for name, known in SETTINGS.items():
        shown = "" if known.default is None else f" (default: {known.default})"
        parser.add_argument(f"--{name}", metavar="N", help=known.metadata["help"] + shown)
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token: temperature 0, no penalty")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    options = parser.parse_args(arguments)
    try:
        run(options)
        sys.stdout.flush()
    except InputError as error:
        if options.traceback:
            traceback.print_exc()
        say(f"chat.py: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # of the standard streams, as all else that opens files says why itself
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader of our output has had enough
            return 1
        say(f"chat.py: cannot read or write: {error.strerror or error}")
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name) or open(os.devnull, mode)  # where the caller has closed it
        setattr(sys, name, stream)
        # Chinese also where the system's encoding is another
        stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    sys.exit(main())
