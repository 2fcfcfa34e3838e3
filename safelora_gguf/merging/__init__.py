"""Merging adapters into a model: `plan` and `pairs` find what adapters do to each tensor, `tables`, `tokens` and
`biases` settle embeddings, vocabularies and biases, `rows` compute (with `kernels`), `edits` put it all together."""
