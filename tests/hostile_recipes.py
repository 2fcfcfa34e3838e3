"""Recipes and journals that lie, and the cards of models that do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEP = '[convert-model]\nsource = "x"\nout = "y.gguf"\n'
SMOKE = '[smoke]\nmodel = "x"\n'
TWICE = '[[step]]\ncommand = "merge"\nname = "{}"\nmodel = "x"\nout = "y"\nadapter = "z"\n'
BILLION = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)

RECIPES: dict[str, tuple[str | bytes, str]] = {
    "100,000 steps": ('[[step]]\ncommand="merge"\n' * 100_000, "more than"),
    "10,000 steps": ("[[step]]\n" * 10_000, "command"),
    "300 steps": ('[[step]]\ncommand="merge"\n' * 300, "expected 1 to 256"),
    "12,000 tables": ("".join(f"[a{number}]\n" for number in range(12_000)), "step 'a0'"),
    "nothing": ("", "0 steps"),
    "no text": (b"\xff\xfe", "no TOML"),
    "zeros": (b"\0" * 1000, "no TOML"),
    "16,000 brackets": ("a=" + "[" * 16_000, "no TOML|nested"),
    "a key of 50,000 dots": ("a" + ".a" * 50_000 + "=1", "50000 dots"),
    "500 keys of 120 dots": ("".join(f"a{n}{'.a' * 120}=1\n" for n in range(500)), "'a0'"),
    "500 tables of 120 dots": ("".join(f"[a{n}{'.a' * 120}]\n" for n in range(500)), "step 'a0'"),
    "a number of 5000 digits": (f"{SMOKE}max-tokens = {'9' * 5000}", "no TOML"),
    "a number of 400 digits": (f"{SMOKE}min-refusal = {'9' * 400}", "expected a number"),
    "infinity": (f"{SMOKE}min-refusal = inf", "expected a number"),
    "a date": ("[smoke]\nmodel = 1979-05-27", "expected a text"),
    "escapes for a step": ('["\\u001b[2J[red]\\n"]\n', "expected one of"),
    "escapes for a path": ('[convert-model]\nsource = "\\u001b[2J\\n"\nout = "y.gguf"', "no such file"),
    "a zero in a path": ('[convert-model]\nsource = "\\u0000"\nout = "y.gguf"', "expected a text"),
    "a key of 16 kB": (f"[merge]\n{'a' * 16_000} = 1", "no option is called"),
    "a path of 16 kB": (f'[convert-model]\nsource = "{"x" * 16_000}"\nout = "y.gguf"', "letters"),
    "a reference of 8 kB": (f'[convert-model]\nsource = "@{"x" * 8000}"\nout = "y.gguf"', "no earlier step"),
    "a name of 16 kB": (f'[[step]]\ncommand = "merge"\nname = "{"x" * 16_000}"', "up to 64"),
    "its own output": ('[convert-model]\nsource = "@convert-model"\nout = "y.gguf"', "no earlier step"),
    "one name twice": (TWICE.format("a-2") + TWICE.format("a") * 2, "are called 'a-2'"),
    "2,000 adapters": (f'[merge]\nmodel = "x"\nout = "y"\nadapter = [{"1," * 2000}]', "2000 values"),
    "an adapter of lists": ('[merge]\nmodel = "x"\nout = "y"\nadapter = [["a"]]', "expected a text"),
    "no adapter": ('[merge]\nmodel = "x"\nout = "y"\nadapter = []', "at least one"),
    "an option of the run": (f"{STEP}json = true", "of the whole run"),
    "an output that is a list": ('[convert-model]\nsource = "x"\nout = ["a", "b"]', "expected a text"),
}

RECIPE_PATHS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a terabyte": (lambda path: (path.touch(), os.truncate(path, 1 << 40)), "more than"),
    "a pipe": (os.mkfifo, "no regular file"),
    "a directory": (Path.mkdir, "directory"),
    "a link to itself": (lambda path: path.symlink_to(path), "links"),
    "/dev/zero": (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
    "nothing": (lambda _: None, "no such file"),
}

RECORD: dict[str, Any] = {"key": "k", "outputs": {}, "report": {}, "status": 0, "cards": {}}


def journal(done: Any = None, started: Any = None) -> str:
    return json.dumps(
        {"format": 1, "done": {} if done is None else done, "started": {} if started is None else started}
    )


JOURNALS: dict[str, str] = {
    "a list": "[]",
    "100,000 brackets": "[" * 100_000,
    "steps in a list": journal([]),
    "a number for a step": journal({"convert-model": 5}),
    "a step of nothing": journal({"convert-model": None}),
    "a number for outputs": journal({"convert-model": RECORD | {"outputs": 5}}),
    "a list of outputs": journal({"convert-model": RECORD | {"outputs": [1]}}),
    "a number for a state": journal({"convert-model": RECORD | {"outputs": {"/etc/passwd": 5}}}),
    "a number for cards": journal({"convert-model": RECORD | {"cards": 5}}),
    "a step without outputs": journal({"convert-model": {"key": "k"}}),
    "a number for a start": journal(started={"convert-model": 5}),
    "numbers for paths": journal(started={"convert-model": [5]}),
    "a zero in a path": journal(started={"convert-model": ["a\0b"]}),
}

CARDS: dict[str, Callable[[Path], object]] = {
    name: lambda path, text=text: path.write_text(text)
    for name, text in {
        "a billion laughs": f"---\n{BILLION}license: *m\nbase_model: *m\ntags: *m\n---\n",
        "an anchor in itself": "---\na: &a [*a]\nlicense: *a\nbase_model: *a\n---\n",
        "a merge of itself": "---\n<<: &x {<<: *x}\n---\n",
        "a command": '---\nlicense: !!python/object/apply:os.system ["touch pwned"]\n---\n',
        "no end": "---\nlicense: mit\n" * 50_000,
        "100,000 brackets": f"---\nbase_model: {'[' * 100_000}\n---\n",
        "12,000 brackets": f"---\nbase_model: {'[' * 12_000}\n---\n",
        "100,000 bases": "---\nbase_model:\n" + "- a/b\n" * 100_000 + "---\n",
        "deeper and deeper": "---\n" + "".join(f"{' ' * n}k{n}:\n" for n in range(150)) + "---\n",
        "a license of 3 MB": f"---\nlicense: {'x' * (3 << 20)}\n---\n",
        "a license of escapes": '---\nlicense: "\\x1b[2J\\n---\\n"\n---\n',
        "quotes": '---\nlicense: "' + '\\"' * 10**6 + '"\n---\n',
        "colons": f"---\n{'a:' * 7000}\n---\n",
    }.items()
} | {
    "a pipe": os.mkfifo,
    "a directory": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path),
    "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "100 MB": lambda path: (path.touch(), os.truncate(path, 100 << 20)),
}  # fmt: skip
