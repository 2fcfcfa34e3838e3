"""Runs upstream's convert_hf_to_gguf.py for one job after another, in one process, since its imports take seconds.

    python upstream_model_child.py LLAMA_CPP

Each line on standard input is a job: a JSON list of the pre-tokenizer's name and the arguments. Each is answered by a
line on standard output: null, or what ended the conversion. Upstream knows a pre-tokenizer by a hash of what the
tokenizer makes of a long text, which no small vocabulary has, so that its name is given.
"""

from __future__ import annotations

import json
import runpy
import sys
import traceback
from pathlib import Path

SCRIPT = "convert_hf_to_gguf.py"


def convert(script: Path, arguments: list[str]) -> str | None:
    sys.argv = [script.name, *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except (Exception, SystemExit):
        return traceback.format_exc()[-1500:]
    return None


def main(llama_cpp: Path) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    import torch
    from conversion import TextModel

    torch.set_num_threads(1)
    for line in sys.stdin:
        pre, *arguments = json.loads(line)
        TextModel.get_vocab_base_pre = lambda model, tokenizer, name=pre: name
        print(json.dumps(convert(llama_cpp / SCRIPT, arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
