"""Files <-> tensors: GGUF, safetensors, PEFT. Knows formats and architectures, and nothing about safety.

Useful alone, to read and write models and adapters without loading a model into memory. Reading is lazy:
headers first, one tensor at a time. Writing is atomic: a file appears whole or not at all.
"""
