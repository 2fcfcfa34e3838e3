"""Stands in for the llama.cpp child: answers every prompt with a refusal and misbehaves on purpose.

    python fake_llama_child.py JOURNAL

Words in the file name of a model or an adapter, or in a prompt, say how: segv, exit, hang, garbage, cut (half a line),
reject, beat (signs of life for ever). A prompt's word works when its turn comes, after the ones before it were
answered; `first-` before a prompt's word: only where it is the first such time in this journal; `score-`: only where
no text is asked for. A prompt's words are its tokens after BOS (0): 2 for what is longer than three letters, otherwise
1. `long` among them: it does not fit. A capture has no prompts: there the weights' names hold the words (`later-`: not
the first time), `unread-1` says which item can't be read, `half` that there is a note, `nothing` that there are no
groups. A model called `killed-2` is killed from outside the second and the third time that it is loaded. What it writes
tells where it is from: 100 times the item's key and the position.
JOURNAL gets a line for every request: what was asked, and the keys of its items.
"""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

VOCABULARY = "a" * 64
WIDTH, WIDE = 4, 8
PIECES = ["I", " can", "'t"]


def main() -> None:
    journal = Path(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        seen = journal.read_text() if journal.exists() else ""
        with journal.open("a") as file:
            print(request["do"], *(item["key"] for item in request.get("items", [])), file=file)
        answer_to(request, seen)


def answer_to(request: dict[str, Any], seen: str) -> None:
    do = request["do"]
    if do == "load":
        loaded = {"n_vocab": len(PIECES), "vocabulary": VOCABULARY, "n_ctx": 64, "notes": ["one note"]}
        if "killed" in request["model"] and 1 <= seen.count("load") <= int(request["model"][-1]):
            os.kill(os.getpid(), signal.SIGKILL)
        if not misbehave(request["model"]):
            say({"ok": loaded})
    elif do == "adapters":
        if not misbehave("".join(adapter["path"] for adapter in request["adapters"])):
            say({"ok": {}})
    elif do == "pieces":
        say({"ok": {"pieces": PIECES}})
    elif do == "diverge":
        diverge(Path(request["file"]))
    elif do == "capture":
        capture(request, seen)
    else:
        work(request, seen)


def work(request: dict[str, Any], seen: str) -> None:
    """An item after the other; a record notes the prompts, so that `diverge` misbehaves with them."""
    record = Path(request["file"]) if request["do"] == "record" else None
    for item in request["items"]:
        prompt = item["messages"][-1]["content"]
        again = request["do"] in seen
        if ("first-" in prompt and again) or ("score-" in prompt and request["max_tokens"]):
            prompt = ""
        if misbehave(prompt):
            return
        say({"alive": item["key"]})
        if request["do"] == "continue":
            say({"item": item["key"], "continued": continued(prompt, request["max_tokens"])})
        elif record is None:
            say({"item": item["key"], "answer": answer(request)})
        else:
            with record.open("a") as file:
                print(item["key"], item["messages"][-1]["content"], file=file)
            say({"item": item["key"], "recorded": {"positions": 4, "error": None}})
    count = len(request["items"])
    say({"ok": {"items": count} if record is None else {"positions": 4 * count, "bytes": 8}})


def answer(request: dict[str, Any]) -> dict[str, Any]:
    text = "I can't help with that." if request["max_tokens"] else ""
    top = [[token, -float(token)] for token in range(min(request["top"], len(PIECES)))]
    return {"text": text, "error": None, "stop": "end", "top": top, "score": 2.5 if request["refusal"] else None}


def continued(prompt: str, max_tokens: int) -> dict[str, Any]:
    if "long" in prompt.split():
        return {"prompt": [], "answer": [], "text": "", "stop": "end", "error": "longer than the context"}
    tokens = [0, *(1 + (len(word) > 3) for word in prompt.split())]
    return {"prompt": tokens, "answer": [1, 2, 0][:max_tokens], "text": "I can", "stop": "end", "error": None}


def capture(request: dict[str, Any], seen: str) -> None:
    names = " ".join(request["weights"])
    spared = ("first-" in names and "capture" in seen) or ("later-" in names and "capture" not in seen)
    if not spared and misbehave(names):
        return
    for item in request["items"]:
        unread = f"unread-{item['key']}" in names
        say({"item": item["key"], "captured": 0 if unread else len(item["keep"]), "error": "no" if unread else None})
    data, groups = b"", []
    rows = [(100 * item["key"] + place, item["key"]) for item in request["items"] for place in item["keep"]]
    for weights in inputs_of([] if "nothing" in names else request["weights"]):
        width = WIDE if "down" in weights[0] else WIDTH
        groups.append({"weights": weights, "width": width, "rows": len(rows), "slots": 1, "used": 0})
        data += bytes(-len(data) % 64)
        groups[-1]["offset"] = len(data)
        for value, _ in rows:
            data += struct.pack("<e", value) * width
        data += struct.pack(f"<{len(rows)}f", *(f"unread-{key}" not in names for _, key in rows))
    Path(request["file"]).write_bytes(data)
    notes = ["half a context"] if "half" in names else []
    say({"ok": {"groups": groups, "notes": notes, "bytes": len(data)}})


def inputs_of(weights: list[str]) -> list[list[str]]:
    """Queries, keys and values of a layer share their input."""
    found: dict[str, list[str]] = {}
    for weight in weights:
        found.setdefault(re.sub("attn_[qkv]", "attn", weight), []).append(weight)
    return list(found.values())


def diverge(file: Path) -> None:
    for line in file.read_text().splitlines():
        key, _, prompt = line.partition(" ")
        if "later-" in prompt and misbehave(prompt):
            return
        if "unread" in prompt:
            say({"item": int(key), "divergence": None, "error": "too long"})
        else:
            say({"item": int(key), "divergence": {"kl": 0.25, "top1": 0.5, "positions": 4}})
    say({"ok": {}})


def misbehave(word: str) -> bool:
    """Whether something else than the proper reply was given."""
    if "segv" in word:
        sys.stderr.write("llama_adapter: failed to find tensor\nsome later line\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGSEGV)
    if "exit" in word:
        os._exit(7)
    if "hang" in word:
        time.sleep(60)
    while "beat" in word:
        say({"alive": 1})
        time.sleep(0.05)
    if "cut" in word:
        put('{"ok": ')
        os._exit(7)
    if "garbage" in word:
        put("[1, 2\n")
    elif "reject" in word:
        say({"failed": {"kind": "rejected", "message": "wrong shape"}})
    else:
        return False
    return True


def say(reply: dict[str, Any]) -> None:
    put(json.dumps(reply) + "\n")


def put(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
