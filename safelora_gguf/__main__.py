"""`python -m safelora_gguf`."""

from safelora_gguf.cli import main

main()
