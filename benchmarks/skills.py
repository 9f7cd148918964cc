"""Accuracy by skill on the held-out list: python benchmarks/skills.py --model_path checkpoints/best_model.pt

Every reply is decoded greedily. A line of corpus/heldout.jsonl holds `messages` up to a user's question, `keys`, and
how they are matched (`match`); a reply that runs on to the limit without ending is wrong whatever it says.
  any          one of the keys occurs, without regard to case: Chinese ones anywhere, others as whole words or numbers
  last_number  the last number of the reply is the key
  exact        the reply is the key, save for case, blanks and punctuation at its ends
  story        the key occurs, and the reply has at least 20 characters (Chinese) or 60 (English)
"""
import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import GPT, Checkpoint, InputError  # noqa: E402
from tokenizer import Tokenizer, render_chat  # noqa: E402 (the repository's root has to be on the path first)

MAX_NEW_TOKENS = 160
STORY_LENGTH = {"zh": 20, "en": 60}  # characters
EDGES = " \n\t.。!！?？\"“”'"


def holds(reply: str, key: str) -> bool:
    """Whether a key occurs in a reply; one that starts or ends in a Latin letter or a digit does so as whole words."""
    edge = "[A-Za-z0-9]"
    before = f"(?<!{edge})" if re.match(edge, key) else ""
    after = f"(?!{edge})" if re.search(f"{edge}$", key) else ""
    return re.search(before + re.escape(key) + after, reply, re.IGNORECASE) is not None


def is_right(reply: str, keys: list[str], match: str, language: str) -> bool:
    """Whether a reply that ended by itself answers an item; the docstring above says how each `match` judges."""
    if match == "any":
        return any(holds(reply, key) for key in keys)
    if match == "last_number":
        return re.findall(r"\d+", reply)[-1:] == keys
    if match == "exact":
        return reply.strip(EDGES).lower() in [key.strip(EDGES).lower() for key in keys]
    if match == "story":
        return len(reply) >= STORY_LENGTH[language] and any(key.lower() in reply.lower() for key in keys)
    raise InputError(f"unknown match {match!r:.40}; known are any, last_number, exact, story")


def read_items(path: Path) -> list[dict]:
    """The held-out items of a file; a line that is none is an InputError with its number."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    items = []
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
            item["skill"] + item["language"] + item["match"], item["messages"][-1]["content"], item["keys"][0]
        except (ValueError, KeyError, TypeError, IndexError):
            raise InputError(f"{path}:{number}: not a held-out item (skill, language, messages, keys, match)") from None
        items.append(item)
    if not items:
        raise InputError(f"{path}: no items in it")
    return items


def answer(model: GPT, tokenizer: Tokenizer, messages: list[dict]) -> tuple[str, bool]:
    """The greedy reply to a conversation, and whether it ended by itself."""
    ids, _ = render_chat(tokenizer, messages, add_generation_prompt=True)
    reply = list(model.generate(ids, max_new_tokens=MAX_NEW_TOKENS, temperature=0,
                                stop_ids=(tokenizer.im_end_id, tokenizer.end_of_text_id)))
    return tokenizer.decode(reply).strip(), len(reply) < MAX_NEW_TOKENS


def table(judged: list[tuple[dict, bool, bool]]) -> str:
    """Accuracy by skill and language as a Markdown table, from (item, right, ended) of each item."""
    def percent(rows: list[tuple[dict, bool, bool]]) -> str:
        return f"{100 * sum(right for _, right, _ in rows) / len(rows):.1f}" if rows else "-"

    lines = ["| skill | zh % | en % | all % | items | ran on |", "|---|---|---|---|---|---|"]
    for skill in [*dict.fromkeys(item["skill"] for item, _, _ in judged), "all"]:
        rows = [row for row in judged if skill in (row[0]["skill"], "all")]
        languages = [percent([row for row in rows if row[0]["language"] == language]) for language in ("zh", "en")]
        ran_on = sum(not ended for _, _, ended in rows)
        lines.append(f"| {skill} | {' | '.join(languages)} | {percent(rows)} | {len(rows)} | {ran_on} |")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    """Ask the model every item, and print failures and the table."""
    from tqdm import tqdm

    items = read_items(arguments.heldout)
    checkpoint = Checkpoint.load(arguments.model_path)
    model, tokenizer = checkpoint.build_model(), Tokenizer.from_dict(checkpoint.tokenizer)
    judged, failures = [], []
    for item in tqdm(items, desc="asking", unit="item"):
        reply, ended = answer(model, tokenizer, item["messages"])
        right = ended and is_right(reply, item["keys"], item["match"], item["language"])
        judged.append((item, right, ended))
        if not right:
            failures.append((item, reply, ended))
    shown: dict[str, int] = {}
    for item, reply, ended in failures:
        shown[item["skill"]] = shown.get(item["skill"], 0) + 1
        if shown[item["skill"]] <= arguments.show_failures:
            asked = " | ".join(message["content"] for message in item["messages"])
            print(f"[{item['skill']}] {asked}\n    wanted {item['keys']}, got{'' if ended else ' (ran on)'}: {reply}")
    print(table(judged))


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy by skill on the held-out list.")
    parser.add_argument("--model_path", type=Path, default=ROOT / "checkpoints" / "best_model.pt",
                        help="checkpoint to ask (default: checkpoints/best_model.pt)")
    parser.add_argument("--heldout", type=Path, default=ROOT / "corpus" / "heldout.jsonl", help="items to ask")
    parser.add_argument("--show_failures", type=int, default=0, metavar="N", help="print up to N wrong replies a skill")
    try:
        run(parser.parse_args())
    except InputError as error:
        print(f"skills.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
